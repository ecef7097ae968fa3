"""``rl-autoscale validate``: the simulator against measured iterations, recorded runs and queueing theory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rl_autoscale.fleet.errors import SpecError

DATA_VARIABLE = "RL_AUTOSCALE_PROFILE_DATA"


def command(
    data: Annotated[
        Path | None, typer.Option(envvar=DATA_VARIABLE, help="Folder of measured times, see docs/fidelity.md.")
    ] = None,
    parts: Annotated[
        str | None, typer.Option(help="Comma-separated: iterations, vidur, vllm, queues; default all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for fidelity.json and the figures.")] = Path("runs/validate"),
    update: Annotated[
        Path | None, typer.Option(help="Page whose tables to replace, for example docs/fidelity.md.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Compare the simulator with what was measured: iteration times, other simulators, a real server, queueing theory.

    Examples:
        rl-autoscale validate --data profiles

        rl-autoscale validate --parts queues
    """
    from rl_autoscale.cli.benchmark import BenchmarkBar
    from rl_autoscale.experiments.report import rich_table
    from rl_autoscale.experiments.runs import write_text
    from rl_autoscale.experiments.validation.report import all_tables, draw_all, update_page
    from rl_autoscale.experiments.validation.run import PARTS, validate

    chosen = PARTS if parts is None else tuple(name.strip() for name in parts.split(","))
    if data is None and chosen != ("queues",):
        raise SpecError(
            f"no data: give --data FOLDER or set {DATA_VARIABLE} (see docs/fidelity.md for what it holds); "
            "--parts queues needs none"
        )
    with BenchmarkBar() as bar:
        findings = validate(data or Path(), parts=chosen, progress=bar)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "fidelity.json", json.dumps(findings.as_data(), indent=2))
    tables = all_tables(findings)
    if update is not None:
        update_page(update, tables)
    figures = draw_all(findings, out)
    if as_json:
        typer.echo(json.dumps(findings.as_data(), indent=2))
        return
    console = Console()
    for table in tables.values():
        console.print(rich_table(table))
    for path in (out / "fidelity.json", *figures):
        console.print(f"wrote {path}", highlight=False)
