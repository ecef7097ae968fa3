"""``rl-autoscale benchmark``: compare policies, then report."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rl_autoscale.cli.report import print_report, show_benchmark
from rl_autoscale.fleet.errors import SpecError

if TYPE_CHECKING:
    from rl_autoscale.experiments.grid import BenchmarkConfig

stderr = Console(stderr=True)


class BenchmarkBar:
    """A progress bar fed by `run_benchmark`; a context manager. Writes to stderr."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=stderr,
        )
        self._task = self._progress.add_task("reading traces ...", total=None)

    def __enter__(self) -> BenchmarkBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how far it is."""
        self._progress.update(self._task, description=what, completed=done, total=total)


def command(
    scenario: Annotated[
        list[str] | None, typer.Option(help="A shipped scenario or a path ending in .yaml; may be repeated.")
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(help="Comma-separated: names, NAME-tuned, pretrained/NAME, or an exported policy's FOLDER."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="A ready benchmark, many scenarios: quick, rules, deployed, fronts, tuned, deployed-tuned or full."
        ),
    ] = None,
    learned: Annotated[
        list[str] | None,
        typer.Option(help="Trained policies of a suite, a folder or pretrained/NAME; default all that ship."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with everything, instead of the options here.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; default 5, or the suite's.")] = None,
    knob_values: Annotated[
        int | None, typer.Option(min=2, help="Thin every knob sweep to so many values; default 8.")
    ] = None,
    refinements: Annotated[
        int | None, typer.Option(min=0, help="Rounds of knob values added around each target; default 2.")
    ] = None,
    tune_episodes: Annotated[
        int | None, typer.Option(min=1, help="Training episodes per tuned rule and attainment; default 96.")
    ] = None,
    tune_hours: Annotated[
        str | None,
        typer.Option(help="Simulated hours for each of them instead; as-trained: what the learned policy got."),
    ] = None,
    span: Annotated[float | None, typer.Option(help="Cut the test traffic to so many seconds, for a look.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; a benchmark found there is resumed.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default one per core.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Run on a Ray cluster instead: auto, HOST:PORT, or local for this machine.")
    ] = None,
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    track: Annotated[
        str, typer.Option(help="wandb or tensorboard: show the report there too (docs/tracking.md).")
    ] = "none",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Compare policies: GPU-hours at equal SLO attainment, every knob swept, common random numbers.

    Every policy runs with and without early refusal. An interrupted benchmark goes on where it stopped; a changed
    configuration or changed code runs anew. Ends with <out>/report.html. With --suite, --policies adds to the suite's
    and --scenario chooses among its scenarios.

    Examples:
        rl-autoscale benchmark --scenario azure-conversation --policies headroom,hpa,chiron-robust --seeds 3

        rl-autoscale benchmark --scenario bursty --policies learned=runs/bursty/policy,chiron-tuned,hpa-tuned,oracle

        rl-autoscale benchmark --suite quick --learned runs/train/policy
    """
    from rl_autoscale.experiments.benchmark import run_benchmark
    from rl_autoscale.experiments.grid import DEFAULT_POLICIES, BenchmarkConfig, parse_policies
    from rl_autoscale.experiments.ray_workers import RayCluster
    from rl_autoscale.experiments.report import write_report
    from rl_autoscale.experiments.tracking import check_tracker

    check_tracker(track)
    if config is not None and suite is not None:
        raise SpecError("--config and --suite both name a whole benchmark; give one")
    if learned and suite is None:
        raise SpecError("--learned adds trained policies to a --suite; without one, name them in --policies")
    words = [word for word in (policies or "").split(",") if word]
    changes = {
        "num_seeds": seeds,
        "max_knob_values": knob_values,
        "refinements": refinements,
        "tune_episodes": tune_episodes,
        "tune_hours": tune_hours,
        "span_s": span,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if config is not None:
        if scenario or policies or changes:
            raise SpecError("--config says everything itself; leave out --scenario, --policies and the sizes")
        chosen = BenchmarkConfig.from_yaml(config)
    elif suite is not None:
        chosen = _suite(suite, words, learned, scenario or [], changes)
    else:
        given = {
            "scenarios": scenario or ["azure-conversation"],
            "policies": [sweep.model_dump() for sweep in parse_policies(words or DEFAULT_POLICIES)],
            "max_knob_values": 8,
        }
        chosen = BenchmarkConfig.from_dict(given | changes, where="benchmark")
    out = out or Path(f"runs/benchmark-{suite}" if suite else "runs/benchmark")
    folders = traces or []
    with ExitStack() as stack:
        cluster = None if ray is None else stack.enter_context(RayCluster(ray))
        bar = stack.enter_context(BenchmarkBar())
        processes = jobs or os.cpu_count() or 1
        run_benchmark(chosen, out, num_processes=processes, ray=cluster, trace_folders=folders, progress=bar)
    report = write_report(out, trace_folders=folders)
    print_report(report, (report.html,), as_json=as_json)
    show_benchmark(track, out, report)


def _suite(
    name: str, words: list[str], learned: list[str] | None, scenarios: list[str], changes: dict[str, Any]
) -> BenchmarkConfig:
    """A suite with its trained policies, and says so when there are none."""
    from rl_autoscale.experiments.grid import parse_policies
    from rl_autoscale.experiments.suites import learned_sweeps, load_suite, shipped_policies_for

    paths = learned or shipped_policies_for(scenarios)
    if not paths:
        stderr.print("note: no pre-trained policy ships for these scenarios: rules only; --learned FOLDER adds yours")
    return load_suite(name, [*parse_policies(words), *learned_sweeps(paths)], scenarios, **changes)
