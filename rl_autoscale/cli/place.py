"""``rl-autoscale place``: where to put prefill and decode."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console

if TYPE_CHECKING:
    from rl_autoscale.fleet.pool import SchedulerName


def command(
    profile: Annotated[
        list[str], typer.Option(help="Profile of the model, one per degree of tensor parallelism; may be repeated.")
    ],
    scenario: Annotated[
        str, typer.Option(help="Whose requests and SLOs: a shipped scenario or a path ending in .yaml.")
    ],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that a placement may use.")] = 8,
    ttft: Annotated[float | None, typer.Option(help="Time to first token in s; default the scenario's.")] = None,
    tpot: Annotated[float | None, typer.Option(help="Time per output token in s; default the scenario's.")] = None,
    target: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of requests within their SLOs.")] = 0.9,
    scheduler: Annotated[
        list[str] | None, typer.Option(help="Of colocated placements; may be repeated; default vllm.")
    ] = None,
    link_bytes_per_s: Annotated[float, typer.Option(help="From a prefill instance; 50e9 is 400 Gb/s.")] = 50e9,
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, few requests: a look, not a result.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the run; what is found there is not looked for again.")] = Path(
        "runs/place"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Search colocated and disaggregated placements for the most goodput per GPU, as DistServe does.

    Examples:
        rl-autoscale place --profile llama-3.1-8b_h100_tp1 --scenario chatbot --gpus 4 --quick

        rl-autoscale place --profile 70b_tp2.yaml --profile llama-3.1-70b_h100_tp4 --scenario coder --tpot 0.05
    """
    from rl_autoscale.cli.benchmark import BenchmarkBar
    from rl_autoscale.experiments import placement
    from rl_autoscale.experiments.report import rich_table
    from rl_autoscale.workload.store import TraceStore

    settings = replace(placement.QUICK if quick else placement.Settings(), target=target)
    schedulers = scheduler or ["vllm"]
    question = {
        "profiles": profile, "scenario": scenario, "gpus": gpus, "ttft_s": ttft, "tpot_s": tpot,
        "schedulers": schedulers, "link_bytes_per_s": link_bytes_per_s, "settings": asdict(settings),
    }  # fmt: skip
    with BenchmarkBar() as bar:
        traffic = placement.traffic_of(scenario, TraceStore(traces or ()), settings, ttft_slo_s=ttft, tpot_slo_s=tpot)
        known, found = placement.resumable(out / "place.json", question, bar)
        tried = placement.Search(
            tuple(profile), gpus, traffic, schedulers=cast("tuple[SchedulerName, ...]", tuple(schedulers)),
            link_bytes_per_s=link_bytes_per_s, settings=settings, known=known, found=found,
        ).run()  # fmt: skip
    if as_json:
        typer.echo(json.dumps(placement.as_data(tried), indent=2))
        return
    Console().print(rich_table(placement.placement_table(tried, target)))
