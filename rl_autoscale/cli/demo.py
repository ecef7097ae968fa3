"""``rl-autoscale demo``: everything, on a laptop."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rl_autoscale.cli.train import TrainingBar, num_cores, require_training

stderr = Console(stderr=True)


def command(
    name: Annotated[str, typer.Option(help="The run is kept in runs/NAME.")] = "demo",
    timesteps: Annotated[int | None, typer.Option(min=1, help="PPO's control steps; default 500,000.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Benchmark episodes per policy and knob value.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of training.")] = 0,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default all cores.")] = None,
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON.")] = False,
) -> None:
    """Train PPO, put it beside Chiron and every rule on a real trace, write runs/NAME/report.html.

    Takes at most ten minutes on two cores and needs no GPU. Interrupt it whenever you like: the same command goes on
    where it stopped. The traffic is the Azure LLM inference trace 2023 (conversation), from --traces or
    $RL_AUTOSCALE_TRACES, else downloaded once, else replaced by a generator fitted to it.

    Examples:
        rl-autoscale demo

        rl-autoscale demo --name quick --timesteps 50000 --seeds 1
    """
    require_training()
    from rl_autoscale.cli.benchmark import BenchmarkBar
    from rl_autoscale.experiments import demo
    from rl_autoscale.experiments.report import rich_table
    from rl_autoscale.experiments.report_data import as_data
    from rl_autoscale.experiments.tables import all_tables

    started = time.monotonic()
    folders = traces or []
    processes = jobs or num_cores()
    config = demo.demo_training(timesteps or demo.TIMESTEPS, seed, processes)
    for note in demo.traffic_notes(folders):
        stderr.print(f"[yellow]note:[/] {note}")
    out = Path("runs") / name
    with TrainingBar(config.ppo.total_timesteps) as training:
        policy = demo.train_demo(out, config, trace_folders=folders, report=training)
    with BenchmarkBar() as bar:
        demo.benchmark_demo(out, policy, num_seeds=seeds, num_processes=processes, trace_folders=folders, progress=bar)
    stderr.print("writing the report ...")
    report = demo.report_demo(out, config, trace_folders=folders)
    if as_json:
        print(json.dumps(as_data(report.findings), indent=2))
        return
    console = Console()
    for findings in report.findings:
        for table in all_tables(findings):
            console.print(rich_table(table))
    console.print(f"report: {report.html}")
    for figure in report.figures:
        console.print(f"figure: {figure}")
    stderr.print(f"{time.monotonic() - started:.0f} s")
