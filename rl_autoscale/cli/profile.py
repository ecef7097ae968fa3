"""``rl-autoscale profile``: list, show and fit latency profiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from rl_autoscale.cli import roofline
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import LatencyProfile, load_profile, shipped_profile_names

T = TypeVar("T")

app = typer.Typer(
    help="Latency profiles: how fast a model runs on a GPU, and how much KV cache it has.", no_args_is_help=True
)

app.command("roofline")(roofline.command)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

REFERENCE_BATCH = 32
REFERENCE_CONTEXT = 1024
"""The decode batch and context at which profiles are compared."""


def summary(profile: LatencyProfile) -> dict[str, Any]:
    """The figures by which profiles are compared; times in seconds, errors as fractions."""
    return {
        "name": profile.name,
        "model": profile.model,
        "gpu": profile.gpu,
        "gpus_per_replica": profile.gpus_per_replica,
        "kv_blocks": profile.kv_blocks,
        "decode_iteration_s": profile.iteration_s(
            num_decode=REFERENCE_BATCH, decode_context_tokens=REFERENCE_BATCH * REFERENCE_CONTEXT
        ),
        "prefill_tokens_per_s": 1.0 / profile.prefill_s_per_token(),
        "fit_error": profile.fit_error,
    }


@app.command("ls")
def list_profiles(as_json: Json = False) -> None:
    """List the profiles that ship with the package."""
    summaries = [summary(load_profile(name)) for name in shipped_profile_names()]
    if as_json:
        typer.echo(json.dumps(summaries, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("name", "model", "GPU"):
        table.add_column(heading, no_wrap=True)
    for heading in ("KV\nblocks", "decode\nms", "prefill\ntok/s", "error\n%"):
        table.add_column(heading, justify="right")
    for row in summaries:
        table.add_row(
            row["name"],
            row["model"].split("/")[-1].removeprefix("Meta-"),
            f"{row['gpus_per_replica']} x {row['gpu']}",
            f"{row['kv_blocks']:,}",
            f"{row['decode_iteration_s'] * 1e3:.1f}",
            f"{row['prefill_tokens_per_s']:,.0f}",
            _worst_mean(row["fit_error"]),
        )
    console = Console()
    console.print(table)
    console.print(
        f"decode: one iteration of {REFERENCE_BATCH} sequences with {REFERENCE_CONTEXT} tokens of context each"
    )
    console.print("error: mean on held-out iterations, of the worst of prefill, decode and mixed")


@app.command("show")
def show_profile(
    name: Annotated[str, typer.Argument(help="A shipped profile, or a path that ends in .yaml.")], as_json: Json = False
) -> None:
    """Show one profile: where it comes from, what it predicts, how wrong it is."""
    profile = load_profile(name)
    if as_json:
        typer.echo(json.dumps(profile.model_dump(mode="json") | {"summary": summary(profile)}, indent=2))
        return
    console = Console()
    console.print(f"[bold]{profile.name}[/bold]  {profile.model}, {profile.gpus_per_replica} x {profile.gpu}")
    console.print(f"source: {profile.source}", highlight=False)
    console.print(f"KV cache: {profile.kv_blocks:,} blocks of 16 tokens per replica", highlight=False)
    console.print(
        f"engine: {profile.max_num_seqs} sequences, {profile.max_num_batched_tokens} tokens at most", highlight=False
    )
    if profile.notes:
        console.print(f"notes: {profile.notes}", highlight=False)
    console.print("\ndecode iteration, ms, by batch (down) and context (across)")
    console.print(_prediction_table(profile))
    console.print("absolute error on held-out iterations")
    print_errors(console, profile.fit_error)


@app.command("fit")
def fit_command(
    aic: Annotated[str | None, typer.Option(help="Hugging Face id of a model that AIConfigurator knows.")] = None,
    table: Annotated[Path | None, typer.Option(help="Measured iterations, .parquet or .csv.")] = None,
    model: Annotated[str | None, typer.Option(help="With --table: the model; selects its rows.")] = None,
    system: Annotated[
        str | None, typer.Option("--system", "--device", help="AIConfigurator's name of the GPU, for example h100_sxm.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="With --table: the GPU's name, for example H100.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="GPUs per replica (tensor parallelism).")] = 1,
    kv_blocks: Annotated[int | None, typer.Option(min=1, help="With --table: KV blocks of a replica.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Default: vLLM's for the GPU.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="Default: vLLM's for the GPU.")] = None,
    source: Annotated[str, typer.Option(help="With --table: tool, version and licence of the measurements.")] = "",
    name: Annotated[str | None, typer.Option(help="Default: <model>_<gpu>_tp<tp>.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: <name>.yaml in the current folder.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sample and of what is held out.")] = 0,
    as_json: Json = False,
) -> None:
    """Fit a profile to AIConfigurator's estimates or to your own measurements, and write it as YAML."""
    from rl_autoscale.sim.profile_file import write_profile

    if (aic is None) == (table is None):
        raise SpecError("give either --aic MODEL (estimates) or --table FILE (measurements)")
    if aic is not None:
        profile = _fit_aic(aic, _required(system, "--system"), tp, name, seed)
    else:
        assert table is not None
        profile = _fit_table(
            table,
            _required(model, "--model"),
            system,
            tp,
            seed,
            hardware_options(gpu, system, max_num_seqs, max_num_batched_tokens)
            | {"kv_blocks": _required(kv_blocks, "--kv-blocks"), "source": source or f"measurements in {table.name}"},
            name,
        )
    path = out or Path(f"{profile.name}.yaml")
    write_profile(profile, path, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps({"path": str(path)} | summary(profile), indent=2))
        return
    console = Console()
    console.print("absolute error on held-out iterations")
    print_errors(console, profile.fit_error)
    console.print(f"wrote {path}", highlight=False)


def _fit_aic(model: str, system: str, tp: int, name: str | None, seed: int) -> LatencyProfile:
    from rl_autoscale.sim.fit_sources import SYSTEMS, fit_from_aic

    gpu = SYSTEMS[system].gpu if system in SYSTEMS else system
    return fit_from_aic(model, system, tp, name=name or default_name(model, gpu, tp), seed=seed)


def _fit_table(
    path: Path, model: str, system: str | None, tp: int, seed: int, options: dict[str, Any], name: str | None
) -> LatencyProfile:
    from rl_autoscale.sim.fit import Hardware, fit_profile, split_rows
    from rl_autoscale.sim.iteration_table import read_table

    rows = read_table(path, where={"model": model, "system": system, "device": system, "tp": tp})
    train, test = split_rows(rows, np.random.default_rng(seed))
    hardware = Hardware(
        name=name or default_name(model, options["gpu"], tp), model=model, gpus_per_replica=tp, **options
    )
    return fit_profile(train, test, hardware)


def hardware_options(
    gpu: str | None, system: str | None, max_num_seqs: int | None, max_num_batched_tokens: int | None
) -> dict[str, Any]:
    """GPU name and engine limits; vLLM's defaults where the GPU is known."""
    from rl_autoscale.sim.fit_sources import SYSTEMS

    known = next((item for key, item in SYSTEMS.items() if gpu == item.gpu or (gpu is None and system == key)), None)
    if known is None:
        return {
            "gpu": _required(gpu, "--gpu"),
            "max_num_seqs": _required(max_num_seqs, "--max-num-seqs"),
            "max_num_batched_tokens": _required(max_num_batched_tokens, "--max-num-batched-tokens"),
        }
    return {
        "gpu": known.gpu,
        "max_num_seqs": max_num_seqs or known.max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens or known.max_num_batched_tokens,
    }


def _required(value: T | None, option: str) -> T:
    if value is None:
        raise SpecError(f"{option} is missing; see rl-autoscale profile fit --help")
    return value


def default_name(model: str, gpu: str, tensor_parallel: int) -> str:
    """Profile name from its parts, for example ``llama-3.1-8b_h100_tp1``."""
    return f"{model.split('/')[-1].lower().removeprefix('meta-')}_{gpu.lower()}_tp{tensor_parallel}"


def _worst_mean(fit_error: dict[str, float]) -> str:
    means = [value for key, value in fit_error.items() if key.endswith("_mean")]
    return f"{max(means) * 100:.1f}" if means else "unknown"


def print_errors(console: Console, fit_error: dict[str, float]) -> None:
    """A profile's ``fit_error`` as a table."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("iteration", "mean %", "p99 %"):
        table.add_column(heading, justify="left" if heading == "iteration" else "right")
    for key in fit_error:
        if key.endswith("_mean"):
            kind = key.removesuffix("_mean")
            p99 = fit_error.get(f"{kind}_p99", float("nan"))
            table.add_row(kind, f"{fit_error[key] * 100:.1f}", f"{p99 * 100:.1f}")
    console.print(table)


def _prediction_table(profile: LatencyProfile) -> Table:
    """Decode iteration times over batch and context, leaving out what the KV cache cannot hold."""
    contexts = (256, 1024, 4096, 16_384)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("batch", *map(str, contexts)):
        table.add_column(heading, justify="right")
    for batch in (1, 8, 32, 128, 256):
        times = [
            f"{profile.iteration_s(num_decode=batch, decode_context_tokens=batch * context) * 1e3:.1f}"
            if batch * context <= profile.kv_blocks * 16
            else "-"
            for context in contexts
        ]
        table.add_row(str(batch), *times)
    return table
