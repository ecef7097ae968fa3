"""``rl-autoscale report``: a benchmark's results as HTML, markdown, CSV and JSON, with figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rl_autoscale.fleet.errors import SpecError

if TYPE_CHECKING:
    from rl_autoscale.experiments.report import Report

FILE_WIDTH = 160
"""Columns of tables that go into a file or a pipe."""


def command(
    folder: Annotated[Path, typer.Argument(help="Folder of a benchmark, or of a training.")],
    timeline: Annotated[
        str | None, typer.Option(help="Two policies for the time line, LEFT,RIGHT; default the learned one and Chiron.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Benchmark",
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    track: Annotated[str, typer.Option(help="wandb or tensorboard: show it there too (docs/tracking.md).")] = "none",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Write report.html with its figures, report.md, tables.csv and tables.json beside a benchmark's results.

    Works on an unfinished benchmark too: knob values that still lack a seed are left out.

    Of a training, or of the seeds of one, it draws learning.png: learning curves with intervals over seeds.

    Examples:
        rl-autoscale report runs/benchmark --timeline headroom,chiron-robust

        rl-autoscale report runs/five

        WANDB_MODE=offline rl-autoscale report runs/benchmark --track wandb
    """
    from rl_autoscale.experiments.learning_curves import curve_folders
    from rl_autoscale.experiments.report import write_report
    from rl_autoscale.experiments.tracking import check_tracker

    check_tracker(track)
    if curve_folders(folder):
        _report_training(folder, track, as_json=as_json)
        return
    pair = None if timeline is None else tuple(timeline.split(","))
    if pair is not None and len(pair) != 2:
        raise SpecError(f"--timeline '{timeline}' must name two policies, for example headroom,chiron-robust")
    report = write_report(folder, trace_folders=traces or [], timeline=pair, title=title)
    print_report(report, (report.html, *report.figures), as_json=as_json)
    show_benchmark(track, folder, report)


def print_report(report: Report, paths: Sequence[Path], *, as_json: bool) -> None:
    """Of a suite what is said of all its scenarios, else every table, and the files; or the findings as JSON."""
    from rl_autoscale.experiments.report import rich_table
    from rl_autoscale.experiments.report_data import as_data
    from rl_autoscale.experiments.tables import all_tables

    if as_json:
        typer.echo(json.dumps(as_data(report.findings), indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    for table in report.suite_tables:
        console.print(rich_table(table))
    for one in report.findings if report.suite is None else ():
        console.rule(one.scenario, align="left")
        for table in all_tables(one):
            console.print(rich_table(table))
    for path in paths:
        console.print(f"wrote {path}", highlight=False)


def show_benchmark(track: str, folder: Path, report: Report) -> None:
    """Show a benchmark in a tracker, under the folder's name."""
    from rl_autoscale.experiments.showings import benchmark_job, benchmark_showing
    from rl_autoscale.experiments.tracking import make_tracker

    if track == "none":
        return
    with make_tracker(track, folder, benchmark_job(folder, report)) as tracker:
        tracker.show(benchmark_showing(folder, report))


def _report_training(folder: Path, track: str, *, as_json: bool) -> None:
    from rl_autoscale.experiments.learning_curves import curve_table, write_curves
    from rl_autoscale.experiments.report import rich_table
    from rl_autoscale.experiments.report_data import plain
    from rl_autoscale.experiments.showings import curves_job, curves_showing
    from rl_autoscale.experiments.tracking import make_tracker

    curves, paths = write_curves(folder)
    table = curve_table(curves)
    if as_json:
        typer.echo(json.dumps(plain(table), indent=2))
    else:
        console = Console()
        console.print(rich_table(table))
        for path in paths:
            console.print(f"wrote {path}", highlight=False)
    if track != "none":
        with make_tracker(track, folder, curves_job(folder)) as tracker:
            tracker.show(curves_showing(folder, curves, paths))
