"""``rl-autoscale choose``: which policy to run here, and at which setting."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console

from rl_autoscale.cli.benchmark import BenchmarkBar
from rl_autoscale.cli.report import FILE_WIDTH
from rl_autoscale.fleet.errors import SpecError

if TYPE_CHECKING:
    from rl_autoscale.experiments.choice import Candidate, Choice
    from rl_autoscale.experiments.tables import Table

RULES = "headroom,headroom-budget,hpa,infaas,llm-d,qlm,llumnix,chiron-robust"

stderr = Console(stderr=True)


def command(
    scenario: Annotated[str | None, typer.Option(help="A shipped scenario, or yours: a path ending in .yaml.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Instead of a scenario: requests recorded on the fleet.")] = None,
    fleet: Annotated[Path | None, typer.Option(help="With --trace: YAML with the fleet, of one class.")] = None,
    attainment: Annotated[float, typer.Option(help="Share of requests that must meet their SLOs.")] = 0.98,
    policies: Annotated[
        str | None,
        typer.Option(help=f"Comma-separated; a trained one is kept unless a rule saves 3 %. Default: PPO,{RULES}."),
    ] = None,
    refuse: Annotated[bool, typer.Option(help="The gateway refuses what would miss its TTFT.")] = True,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes that each setting is judged on.")] = 8,
    knob_values: Annotated[int, typer.Option(min=2, help="Thin every knob sweep to so many values.")] = 8,
    refinements: Annotated[int, typer.Option(min=0, help="Rounds of knob values added around what is asked.")] = 2,
    span: Annotated[float | None, typer.Option(help="Seconds of an episode; default the scenario's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run; what is found there is used.")] = Path("runs/choose"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default one per core.")] = None,
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Choose what to run on a fleet: the policy and the setting that deliver an attainment for the least GPU time.

    A trained policy is not the best everywhere. This plays it and the rules, every knob swept, on windows of a
    recorded trace, or on a scenario's history (other draws of its test's generators, earlier seconds of its trace),
    and keeps the trained one unless a rule is cheaper by more than 3 %. A scenario's test traffic is not touched.
    Writes OUT/policy.yaml, the part of a controller's file that says who decides.

    Record yours with: rl-autoscale replay --prometheus URL --fleet fleet.yaml --write-trace week.parquet

    Examples:
        rl-autoscale choose --trace week.parquet --fleet fleet.yaml --attainment 0.98

        rl-autoscale choose --scenario bursty --attainment 0.98

        rl-autoscale choose --scenario mine.yaml --policies runs/mine/policy,headroom,hpa --episodes 16
    """
    from rl_autoscale.envs.scenario import load_scenario
    from rl_autoscale.experiments.benchmark import run_choice
    from rl_autoscale.experiments.choice import choice_split
    from rl_autoscale.experiments.grid import BenchmarkConfig, parse_policies
    from rl_autoscale.experiments.report import rich_table
    from rl_autoscale.experiments.runs import write_text
    from rl_autoscale.experiments.suites import learned_sweeps, shipped_policies_for

    if (scenario is None) == (trace is None) or (trace is None) != (fleet is None):
        raise SpecError("give either --scenario NAME, or --trace FILE and --fleet FILE")
    if scenario is None:
        assert trace is not None
        assert fleet is not None
        scenario = str(write_recorded(trace, fleet, out))
    if policies is None:
        sweeps = [*learned_sweeps(shipped_policies_for([scenario])), *parse_policies(RULES.split(","))]
    else:
        sweeps = list(parse_policies([word for word in policies.split(",") if word]))
    config = BenchmarkConfig.from_dict(
        {
            "scenarios": [scenario],
            "policies": [sweep.model_dump() for sweep in sweeps],
            "refusal": ["on" if refuse else "off"],
            "asked": [attainment],
            "chosen_on": "history",
            "choice_seeds": episodes,
            "max_knob_values": knob_values,
            "refinements": refinements,
            "span_s": span,
        },
        where="choose",
    )
    if not any(sweep.trained for sweep in sweeps):
        stderr.print("note: no trained policy among them; rl-autoscale train makes one for these pools and classes")
    if trace is None and (played := choice_split(load_scenario(scenario), "history")) != "history":
        stderr.print(f"note: the scenario has no history; chosen on its {played} traffic")
    with BenchmarkBar() as bar:
        [choice] = run_choice(
            config, out, num_processes=jobs or os.cpu_count() or 1, trace_folders=traces or [], progress=bar
        )
    written = None
    if choice.best is None:
        stderr.print("note: a fixed fleet and the clairvoyant plan are never chosen; add a policy that scales")
    else:
        written = out / "policy.yaml"
        write_text(written, yaml.safe_dump({"policy": as_policy(choice.settings[choice.best])}, sort_keys=False))
    if as_json:
        typer.echo(json.dumps(choice.to_json(), indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(rich_table(choice_table(choice)))
    if written is not None:
        console.print(f"wrote {written}", highlight=False)


def write_recorded(trace: Path, fleet: Path, out: Path) -> Path:
    """A scenario of windows of a recorded trace on a fleet, in the run's folder.

    Raises:
        SpecError: the fleet has several classes, or there is no such file.
    """
    from rl_autoscale.envs.scenario import Scenario
    from rl_autoscale.experiments.replay import read_fleet
    from rl_autoscale.experiments.runs import write_text

    found = read_fleet(fleet)
    if len(names := found.fleet.class_names) > 1:
        raise SpecError(
            f"{fleet}: has the classes {', '.join(names)}; which request is of which, a scenario says: "
            "write one with a stream for each and give --scenario FILE.yaml"
        )
    if not trace.is_file():
        raise SpecError(f"--trace {trace}: no such file; rl-autoscale replay --write-trace FILE makes one")
    stream = {"trace": str(trace.resolve()), "class": names[0]}
    data = {
        "name": "recorded",
        "description": f"Windows of {trace.name}.",
        "fleet": found.fleet.model_dump(mode="json", by_alias=True, exclude_unset=True),
        "shield": found.shield.model_dump(mode="json", by_alias=True, exclude_unset=True),
        "train": [{"name": "recorded", "workload": {"streams": [{**stream, "random_window": True}]}}],
        "test": {"streams": [stream]},
    }
    Scenario.from_dict(data, where=str(fleet))
    path = out / "scenario.yaml"
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(data, sort_keys=False))
    return path


def as_policy(chosen: Candidate) -> dict[str, Any]:
    """A setting as a controller's file has it (serving/config.py: PolicyChoice)."""
    knobs = dict(chosen.knobs)
    return {"name": str(knobs.pop("path", chosen.sweep.registered)), "knobs": knobs}


def choice_table(choice: Choice) -> Table:
    """Every policy at its best setting, the one to run first."""
    from rl_autoscale.experiments.tables import Cell, Table

    least = choice.settings[choice.best].gpu_hours if choice.best is not None else float("nan")
    rows = []
    for label, item in sorted(choice.settings.items(), key=lambda pair: (pair[0] != choice.best, pair[1].gpu_hours)):
        knobs = as_policy(item)["knobs"]
        setting = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in knobs.items())
        short = item.slo_attainment < choice.asked
        rows.append(
            (
                Cell(label, strong=label == choice.best),
                Cell(setting),
                Cell(f"{item.slo_attainment:.2%}", strong=short, tone="loss" if short else ""),
                Cell(f"{item.gpu_hours:.3g}"),
                Cell(f"{item.gpu_hours / least:.2f} ×"),
            )
        )
    return Table(
        f"{choice.scenario}, asked for {choice.asked:.1%}",
        "Each policy at the cheapest setting that misses at most a tenth more than is allowed on this traffic, or, "
        "where all do, than the best of them. Red: less than asked. The first is the one to run: the trained "
        "policy, unless a rule's loss is better by 3 %.",
        ("policy", "setting", "delivered", "GPU-hours", "over the first"),
        tuple(rows),
        num_text=2,
    )
