"""``rl-autoscale calibrate``: a latency profile out of a live vLLM server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rl_autoscale.fleet.errors import MissingExtraError, SpecError

if TYPE_CHECKING:
    from rl_autoscale.experiments.validation.compare import MetricError
    from rl_autoscale.fleet.profile import LatencyProfile
    from rl_autoscale.serving.calibration.load import Bench
    from rl_autoscale.sim.fit import Hardware

stderr = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command was asked for, checked."""

    url: str
    gpu: str
    tensor_parallel: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_blocks: int | None
    name: str | None
    max_batch: int
    repeats: int
    hold_out_s: float
    seed: int
    key: str | None = None


def command(
    url: Annotated[str, typer.Option(help="Base address of one idle vLLM replica.")],
    gpu: Annotated[str, typer.Option(help="The GPU's name, for example H100; goes into the profile.")],
    tp: Annotated[int, typer.Option(min=1, help="GPUs per replica (tensor parallelism).")] = 1,
    max_num_seqs: Annotated[int | None, typer.Option(min=2, help="Of the server; default vLLM's for the GPU.")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=16, help="Of the server; default vLLM's for the GPU.")
    ] = None,
    kv_blocks: Annotated[
        int | None, typer.Option(min=1, help="KV blocks of 16 tokens; default what the server says.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: <name>.yaml in the current folder.")] = None,
    name: Annotated[str | None, typer.Option(help="Default: <model>_<gpu>_tp<tp>.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest decode batch that is sent.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Requests per prompt length.")] = 4,
    hold_out: Annotated[
        float, typer.Option(min=0, help="Seconds of random load per regime, to compare with; 0: none.")
    ] = 20.0,
    watch: Annotated[
        float | None, typer.Option(min=1, help="Send nothing: only look at a server in use, for so many seconds.")
    ] = None,
    every: Annotated[float, typer.Option(min=0.02, help="With --watch: seconds from one look to the next.")] = 0.25,
    start_s: Annotated[
        list[float] | None, typer.Option(help="A start-up time you have seen, seconds; may be repeated.")
    ] = None,
    key_variable: Annotated[str | None, typer.Option(help="Environment variable with the API key.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and random load.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measure how fast a model runs on your GPUs, and write a latency profile.

    Needs one vLLM replica that nobody else uses for a few minutes. It is sent
      single prompts of many lengths, one after the other    (prefill)
      batches of 1, 2, 4, ... sequences, two context lengths (decode)
      single prompts beside each of these batches            (mixed)
    and its own metrics say how long iterations took, so that network and client do not
    count. The profile is fitted to that. Then random load at three levels is sent and
    simulated: the difference is what to expect of simulations with this profile.

    Never more than --max-batch requests run at once in the first part. Any error, or
    requests of others, stop everything; Ctrl-C takes all requests back. The file is
    written at the end or not at all.

    With --watch nothing is sent. The metrics page of a server in use is read again and
    again, and what its counters show of single iterations is fitted: what the traffic
    does not have (long prompts, large batches) stays unknown. See docs/calibrate.md.

    --max-num-seqs and --max-num-batched-tokens must be the server's own (its start-up log
    has them): metrics do not tell.

    Examples:
        rl-autoscale calibrate --url http://127.0.0.1:8000 --gpu H100

        rl-autoscale calibrate --url http://gpu7:8000 --gpu H100 --watch 900

        rl-autoscale calibrate --url http://gpu7:8000 --gpu A100 --tp 4 --start-s 92 --start-s 118 --out mine.yaml
    """
    try:
        from rl_autoscale.serving.calibration import server as _server
    except ImportError as error:
        raise MissingExtraError(f"calibration ({error.name})", "serve") from None
    del _server
    from rl_autoscale.cli.profile import hardware_options, print_errors, summary
    from rl_autoscale.experiments.calibration import startup_phase
    from rl_autoscale.sim.profile_file import write_profile

    startup = startup_phase(start_s) if start_s else None
    if out is not None and out.exists() and not overwrite:  # now, not after minutes of measuring
        raise SpecError(f"{out} exists; remove it, choose another --out or pass --overwrite")
    folder = Path() if out is None else out.parent
    if not os.access(folder, os.W_OK):
        raise SpecError(f"{folder}: no folder that can be written to; choose another --out")
    engine = hardware_options(gpu, None, max_num_seqs, max_num_batched_tokens)
    settings = Settings(
        url, engine["gpu"], tp, engine["max_num_seqs"], engine["max_num_batched_tokens"], kv_blocks, name, max_batch,
        repeats, hold_out, seed, _key(key_variable),
    )  # fmt: skip
    profile, errors = asyncio.run(_calibrate(settings, watch, every))
    path = out or Path(f"{profile.name}.yaml")
    write_profile(profile, path, overwrite=overwrite)
    if as_json:
        held = {regime: [item.as_dict() for item in found] for regime, found in errors.items()}
        extra = {"startup": None if startup is None else startup.model_dump(), "hold_out": held}
        typer.echo(json.dumps({"path": str(path)} | summary(profile) | extra, indent=2))
        return
    console = Console()
    console.print("residuals of the fit" if watch is None else profile.notes, highlight=False, markup=False)
    print_errors(console, profile.fit_error)
    if errors:
        console.print("hold-out: predicted against measured, random load at three levels")
        console.print(hold_out_table(errors))
    if startup is not None:
        console.print(f"startup: [{{name: start, mean_s: {startup.mean_s:g}, cv: {startup.cv:g}}}]  # for your pool",
                      markup=False, highlight=False)  # fmt: skip
    console.print(f"wrote {path}", highlight=False)


async def _calibrate(
    settings: Settings, watch_s: float | None, every_s: float
) -> tuple[LatencyProfile, dict[str, tuple[MetricError, ...]]]:
    if watch_s is None:
        return await calibrate(settings)
    from rl_autoscale.cli.calibrate_watch import calibrate_by_watching

    return await calibrate_by_watching(settings, watch_s, every_s), {}


async def calibrate(settings: Settings) -> tuple[LatencyProfile, dict[str, tuple[MetricError, ...]]]:
    """Measure, fit and hold the fit against random load.

    Returns:
        The profile, and the errors by regime; none where no hold-out was asked for.

    Raises:
        SpecError: the server refuses, is used by others, or says too little.
    """
    from rl_autoscale.experiments.calibration import fit_rows, prompts_to_measure
    from rl_autoscale.serving.calibration.load import Bench, Limits, Plan
    from rl_autoscale.serving.calibration.server import HttpServer

    rng = np.random.default_rng(settings.seed)
    async with HttpServer(settings.url, key=settings.key) as server:
        blocks = settings.kv_blocks or (await server.look()).kv_blocks
        if blocks is None:
            raise SpecError(f"{server.url} does not say how many KV blocks it has; give --kv-blocks")
        longest = min(server.max_model_len or blocks * 16, blocks * 16)
        limits = Limits(settings.max_num_seqs, settings.max_num_batched_tokens, longest, blocks * 16)
        prompts = prompts_to_measure(settings.max_num_batched_tokens)
        plan = Plan(prompts, repeats=settings.repeats, max_batch=settings.max_batch)
        bench = Bench(server, limits, plan, rng)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=stderr, transient=True) as progress:
            task = progress.add_task("waiting for an idle server", total=None)
            rows = await bench.measure(
                lambda what, done, total: progress.update(task, description=what, completed=done, total=total)
            )
            profile = fit_rows(rows, hardware_of(settings, server.model, blocks, f"{len(rows)} measured points"))
            errors = await _hold_out(settings, bench, profile, longest, rng, progress)
    notes = "; ".join([profile.notes, *(f"hold-out, {regime}: {_brief(found)}" for regime, found in errors.items())])
    return profile.model_copy(update={"notes": notes}), errors


def hardware_of(settings: Settings, model: str, kv_blocks: int, how: str) -> Hardware:
    """All of the profile that is not fitted."""
    from rl_autoscale import __version__
    from rl_autoscale.cli.profile import default_name
    from rl_autoscale.sim.fit import Hardware

    return Hardware(
        name=settings.name or default_name(model, settings.gpu, settings.tensor_parallel),
        model=model,
        gpu=settings.gpu,
        gpus_per_replica=settings.tensor_parallel,
        kv_blocks=kv_blocks,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        source=f"measured on a live server by rl-autoscale {__version__} calibrate on {datetime.now(UTC):%Y-%m-%d}",
        notes=f"{how}; fit_error holds the residuals of the fit at these points",
    )


async def _hold_out(
    settings: Settings, bench: Bench, profile: LatencyProfile, longest: int, rng: np.random.Generator,
    progress: Progress,
) -> dict[str, tuple[MetricError, ...]]:  # fmt: skip
    from rl_autoscale.experiments.calibration import REGIMES, HoldOutLoad, draw_load, hold_out_errors

    found: dict[str, tuple[MetricError, ...]] = {}
    if settings.hold_out_s == 0:
        return found
    task = progress.add_task("hold-out", total=len(REGIMES))
    for regime, share in REGIMES.items():
        progress.update(task, description=f"hold-out, {regime} load", completed=len(found))
        load = draw_load(profile, share, longest, rng, span_s=settings.hold_out_s)
        served = await bench.random_load(
            load.arrival_s.tolist(), load.prompt_tokens.tolist(), load.output_tokens.tolist()
        )
        columns: dict[str, Any] = {
            key: np.array([getattr(item, key) for item in served]) for key in type(served[0]).__slots__
        }
        sent = HoldOutLoad(columns["arrival_s"], columns["prompt_tokens"], columns["output_tokens"])
        found[regime] = hold_out_errors(profile, sent, columns["first_token_s"], columns["end_s"])
    return found


def hold_out_table(errors: dict[str, tuple[MetricError, ...]]) -> Table:
    """One line per regime and metric; percent, positive where the prediction is too long."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("load", "metric", "requests", "mean %", "median request %", "p99 request %"):
        table.add_column(heading, justify="left" if heading in ("load", "metric") else "right")
    for regime, found in errors.items():
        for item in found:
            table.add_row(
                regime, item.metric.removesuffix("_s"), str(item.num_requests), f"{item.mean * 100:+.1f}",
                f"{item.request_median * 100:.1f}", f"{item.request_p99 * 100:.1f}",
            )  # fmt: skip
    return table


def _brief(found: Sequence[MetricError]) -> str:
    """Median request errors, for a profile's notes."""
    return ", ".join(f"{item.metric.removesuffix('_s')} {item.request_median:.1%}" for item in found)


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise SpecError(f"--key-variable {variable}: the environment has no such variable")
    return os.environ[variable]
