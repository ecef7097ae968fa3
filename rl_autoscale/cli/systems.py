"""``rl-autoscale compare-systems``: how many requests per second a GPU serves under each scheduler."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rl_autoscale.fleet.errors import SpecError

if TYPE_CHECKING:
    from rl_autoscale.experiments.tables import Table


def command(
    study: Annotated[
        str,
        typer.Option(help="capacity: all systems; parts, drafts, bursts, replicas: slos-serve's. See docs/systems.md."),
    ] = "capacity",
    systems: Annotated[str | None, typer.Option(help="Comma-separated; default all. See docs/systems.md.")] = None,
    scenarios: Annotated[str | None, typer.Option(help="Comma-separated; default SLOs-Serve's six.")] = None,
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    qoe: Annotated[
        str, typer.Option(help="Scenario in which to measure QoE over request rates too, if it is one of those.")
    ] = "reasoning",
    token_gaps: Annotated[
        bool, typer.Option("--token-gaps", help="Sarathi-Serve's experiment instead: 99 % of all gaps between tokens.")
    ] = False,
    placements: Annotated[
        bool, typer.Option("--placements", help="DistServe's comparison instead: prefill and decode apart or together.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, few requests: a look, not a result.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the run; what is found there is not looked for again.")] = Path(
        "runs/systems"
    ),
    update: Annotated[Path | None, typer.Option(help="Page whose tables to replace, as docs/systems.md.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Compare serving systems: the highest rate at which 90 % of the requests meet their SLOs, on one replica.

    And, in one of the scenarios, the mean quality of experience over request rates.

    Examples:
        rl-autoscale compare-systems --quick

        rl-autoscale compare-systems --systems vllm,slos-serve --scenarios chatbot,coder

        rl-autoscale compare-systems --token-gaps

        rl-autoscale compare-systems --study parts --scenarios chatbot
    """
    folder = out / "quick" if quick else out
    if token_gaps or placements:
        if systems is not None or scenarios is not None or (token_gaps and placements):
            raise SpecError(
                "--token-gaps and --placements are experiments with their own systems and requests; "
                "give one of them, without --systems and --scenarios"
            )
        (_compare_gaps if token_gaps else _compare_placements)(folder, quick, update, as_json)
        return
    from rl_autoscale.cli.benchmark import BenchmarkBar
    from rl_autoscale.experiments.system_studies import STUDIES, with_bound
    from rl_autoscale.experiments.systems import (
        CAREFUL,
        QUICK,
        SCENARIOS,
        capacity_table,
        compare_systems,
        speed_table,
    )
    from rl_autoscale.experiments.systems_qoe import qoe_curves, qoe_table
    from rl_autoscale.fleet.errors import UnknownNameError
    from rl_autoscale.workload.store import TraceStore

    if study not in STUDIES:
        raise UnknownNameError("study", study, list(STUDIES))
    chosen = SCENARIOS if scenarios is None else _names(scenarios)
    settings = QUICK if quick else CAREFUL
    store = TraceStore(traces or ())
    with BenchmarkBar() as bar:
        found = compare_systems(
            store,
            folder,
            study=STUDIES[study],
            systems=() if systems is None else _names(systems),
            scenarios=chosen,
            settings=settings,
            progress=bar,
        )
        tables = {study: capacity_table(found, STUDIES[study].title)}
        if study == "capacity":
            tables["speed"] = speed_table(found)
            if qoe in found:
                curves = qoe_curves(store, folder, qoe, found[qoe], settings=settings, progress=bar)
                tables["qoe"] = qoe_table(qoe, curves)
    if study == "parts":
        tables["parts"] = with_bound(tables["parts"], chosen, store, settings)
    as_data = {k: {n: asdict(c) for n, c in cells.items()} for k, cells in found.items()}
    _show(tables, as_data, update, as_json)


def _compare_gaps(folder: Path, quick: bool, update: Path | None, as_json: bool) -> None:
    from rl_autoscale.cli.benchmark import BenchmarkBar
    from rl_autoscale.experiments import token_gaps

    settings = token_gaps.QUICK if quick else token_gaps.CAREFUL
    with BenchmarkBar() as bar:
        found = token_gaps.find_all(folder, settings=settings, progress=bar)
    as_data = {k: {n: asdict(c) for n, c in cells.items()} for k, cells in found.items()}
    _show({"token-gaps": token_gaps.gap_table(found)}, as_data, update, as_json)


def _compare_placements(folder: Path, quick: bool, update: Path | None, as_json: bool) -> None:
    from rl_autoscale.cli.benchmark import BenchmarkBar
    from rl_autoscale.experiments import distserve, placement

    settings = placement.QUICK if quick else placement.Settings()
    with BenchmarkBar() as bar:
        found = distserve.compare(folder / "placements", settings=settings, progress=bar)
    as_data = {name: placement.as_data(tried) for name, tried in found.items()}
    _show({"placements": distserve.placements_table(found)}, as_data, update, as_json)


def _show(tables: dict[str, Table], as_data: Any, update: Path | None, as_json: bool) -> None:
    from rl_autoscale.experiments.report import rich_table
    from rl_autoscale.experiments.validation.report import update_page

    if update is not None:
        update_page(update, tables)
    if as_json:
        typer.echo(json.dumps(as_data, indent=2))
        return
    console = Console()
    for table in tables.values():
        console.print(rich_table(table))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))
