"""``rl-autoscale benchmark``: compare policies, then report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rl_autoscale.fleet.errors import SpecError

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
    config: Annotated[Path | None, typer.Option(help="YAML with everything, instead of the options here.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 5,
    knob_values: Annotated[int | None, typer.Option(min=2, help="Thin every knob sweep to so many values.")] = 8,
    refinements: Annotated[int, typer.Option(min=0, help="Rounds of knob values added around each target.")] = 2,
    tune_episodes: Annotated[int, typer.Option(min=1, help="Training episodes per tuned rule.")] = 96,
    tune_hours: Annotated[
        str | None,
        typer.Option(help="Simulated hours per tuned rule instead; as-trained: what the learned policy got."),
    ] = None,
    span: Annotated[float | None, typer.Option(help="Cut the test traffic to so many seconds, for a look.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run; a benchmark found there is resumed.")] = Path(
        "runs/benchmark"
    ),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default one per core.")] = None,
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Compare policies: GPU-hours at equal SLO attainment, every knob swept, common random numbers.

    Every policy runs with and without early refusal. An interrupted benchmark goes on where it stopped; a changed
    configuration or changed code runs anew. Ends with <out>/report.html.

    Examples:
        rl-autoscale benchmark --scenario azure-conversation --policies headroom,hpa,chiron-robust --seeds 3

        rl-autoscale benchmark --scenario bursty --policies learned=runs/bursty/policy,chiron-tuned,hpa-tuned,oracle

        rl-autoscale benchmark --scenario diurnal --scenario chiron --jobs 8 --out runs/both
    """
    from rl_autoscale.experiments.benchmark import run_benchmark
    from rl_autoscale.experiments.grid import DEFAULT_POLICIES, BenchmarkConfig, parse_policies
    from rl_autoscale.experiments.report import as_data, rich_table, write_report
    from rl_autoscale.experiments.tables import all_tables

    if config is not None:
        if scenario or policies:
            raise SpecError("--config names scenarios and policies itself; leave out --scenario and --policies")
        chosen = BenchmarkConfig.from_yaml(config)
    else:
        words = [word for word in (policies or ",".join(DEFAULT_POLICIES)).split(",") if word]
        given = {
            "scenarios": scenario or ["azure-conversation"],
            "policies": [sweep.model_dump() for sweep in parse_policies(words)],
            "num_seeds": seeds,
            "max_knob_values": knob_values,
            "refinements": refinements,
            "tune_episodes": tune_episodes,
            "tune_hours": tune_hours,
            "span_s": span,
        }
        chosen = BenchmarkConfig.from_dict(given, where="benchmark")
    folders = traces or []
    with BenchmarkBar() as bar:
        run_benchmark(chosen, out, num_processes=jobs or os.cpu_count() or 1, trace_folders=folders, progress=bar)
    report = write_report(out, trace_folders=folders)
    if as_json:
        typer.echo(json.dumps(as_data(report.findings), indent=2))
        return
    console = Console()
    for one in report.findings:
        console.rule(one.scenario, align="left")
        for table in all_tables(one):
            console.print(rich_table(table))
    console.print(f"wrote {report.html}", highlight=False)
