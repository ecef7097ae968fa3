"""``rl-autoscale report``: a benchmark's results as HTML, markdown, CSV and JSON, with figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rl_autoscale.fleet.errors import SpecError


def command(
    folder: Annotated[Path, typer.Argument(help="Folder of a benchmark.")],
    timeline: Annotated[
        str | None, typer.Option(help="Two policies for the time line, LEFT,RIGHT; default the learned one and Chiron.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Benchmark",
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Write report.html with its figures, report.md, tables.csv and tables.json beside a benchmark's results.

    Works on an unfinished benchmark too: knob values that still lack a seed are left out.

    Example: rl-autoscale report runs/benchmark --timeline headroom,chiron-robust
    """
    from rl_autoscale.experiments.report import rich_table, write_report
    from rl_autoscale.experiments.report_data import as_data
    from rl_autoscale.experiments.tables import all_tables

    pair = None if timeline is None else tuple(timeline.split(","))
    if pair is not None and len(pair) != 2:
        raise SpecError(f"--timeline '{timeline}' must name two policies, for example headroom,chiron-robust")
    report = write_report(folder, trace_folders=traces or [], timeline=pair, title=title)
    if as_json:
        typer.echo(json.dumps(as_data(report.findings), indent=2))
        return
    console = Console()
    for table in report.suite_tables:
        console.print(rich_table(table))
    for one in report.findings if report.suite is None else ():
        console.rule(one.scenario, align="left")
        for table in all_tables(one):
            console.print(rich_table(table))
    for path in (report.html, *report.figures):
        console.print(f"wrote {path}", highlight=False)
