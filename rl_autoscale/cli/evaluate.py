"""``rl-autoscale evaluate``: one policy, one scenario, a few seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from rl_autoscale.fleet.errors import SpecError, UnknownNameError

ENGINES = ("compiled", "reference")
SHOWN = ("slo_attainment", "gpu_hours", "cost_usd", "refused_share", "dropped_share", "reversals")
SHOWN_OF_CLASSES = ("slo_attainment", "ttft_p99_s", "tpot_p99_s")
DETAILS = (
    "gpu_utilisation", "gpu_efficiency", "over_provisioned", "under_provisioned", "ready_share", "token_rate_cv",
    "scale_ups", "scale_downs", "num_preemptions", "num_evictions",
)  # fmt: skip
DETAILS_OF_CLASSES = ("qoe", "hol_blocking_s", "latency_cv", "tpot_cv")


def command(
    policy: Annotated[str, typer.Option(help="A registered name, pretrained/NAME, or an exported policy's folder.")],
    scenario: Annotated[str, typer.Option(help="A shipped scenario or a path ending in .yaml.")] = "azure-conversation",
    knob: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE, or NAME.CLASS=VALUE; may be repeated: target=40, attainment.batch=0.9."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    span: Annotated[float | None, typer.Option(help="Cut the test traffic to so many seconds.")] = None,
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    engine: Annotated[
        str, typer.Option(help="compiled, or reference: the SimPy specification; same numbers, far slower.")
    ] = "compiled",
    detail: Annotated[
        bool,
        typer.Option(
            "--detail", help="Also how GPUs were used, QoE, blocking, variation; docs/metrics.md defines all."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every metric of every seed as JSON.")] = False,
) -> None:
    """Run one policy on a scenario's test traffic: what it cost and broke.

    Examples:
        rl-autoscale evaluate --policy headroom --knob headroom=1.4 --knob admission=1

        rl-autoscale evaluate --policy runs/train/policy --knob miss_price=60 --scenario azure-conversation --json

        rl-autoscale evaluate --policy hpa --scenario bursty --detail

        rl-autoscale evaluate --policy hpa --seeds 1 --span 120 --engine reference
    """
    from rl_autoscale.envs.scenario import load_scenario
    from rl_autoscale.experiments.episodes import Engine, EpisodeJob, EpisodeRunner, check_policy
    from rl_autoscale.experiments.grid import parse_policies
    from rl_autoscale.workload.store import TraceStore

    if engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES)
    chosen = parse_policies([policy])[0]
    knobs: dict[str, Any] = {**chosen.knobs, **parse_knobs(knob or [])}
    check_policy(chosen.registered, knobs)
    resolved = load_scenario(scenario)
    store = TraceStore(traces or ())
    notes = resolved.build_test(0, store, span_s=span).notes
    runner = EpisodeRunner({resolved.name: resolved}, store)
    simulator = cast("Engine", engine)
    metrics = [
        runner.outcome(
            EpisodeJob(str(seed), resolved.name, "test", seed, chosen.registered, knobs, span, simulator)
        ).metrics
        for seed in range(seeds)
    ]
    if as_json:
        episodes = [{name: _finite(value) for name, value in item.items()} for item in metrics]
        found = {"scenario": resolved.name, "policy": policy, "knobs": {k: str(v) for k, v in knobs.items()}}
        typer.echo(json.dumps({**found, "notes": list(notes), "episodes": episodes}, indent=2))
        return
    console = Console()
    console.print(_table(metrics, SHOWN, SHOWN_OF_CLASSES))
    if detail:
        console.print(_table(metrics, DETAILS, DETAILS_OF_CLASSES))
    for note in notes:
        console.print(f"note: {note}", highlight=False)


def parse_knobs(words: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; numbers where they are numbers, ``true`` and ``false`` as such.

    ``attainment.batch=0.9`` is the part ``batch`` of a knob that has a value by class or pool; parts nest, so a name
    with a dot in it cannot be written here.

    Raises:
        SpecError: not a pair, or a knob both whole and in parts.
    """
    knobs: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        *outer, last = name.split(".")
        if not sign or not text or not all((*outer, last)):
            raise SpecError(f"--knob '{word}' must be NAME=VALUE, for example target=40, or NAME.CLASS=VALUE")
        level = knobs
        for part in outer:
            level = level.setdefault(part, {})
            if not isinstance(level, dict):
                raise SpecError(f"--knob '{word}' comes after a value for all of {part}; give one or the other")
        if isinstance(level.get(last), dict):
            raise SpecError(f"--knob '{word}' comes after values for parts of it; give one or the other")
        level[last] = _value(word, text)
    return knobs


def _value(word: str, text: str) -> float | bool | str:
    try:
        number = float(text)
    except ValueError:
        return {"true": True, "false": False}.get(text.lower(), text)
    if math.isnan(number):
        raise SpecError(f"--knob '{word}' must be a number, not NaN")
    return number


def _table(metrics: list[dict[str, float]], names: tuple[str, ...], of_classes: tuple[str, ...]) -> Table:
    per_class = [name for name in metrics[0] if name.startswith(tuple(f"{kind}/" for kind in of_classes))]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("metric")
    for heading in ("mean", *(f"seed {seed}" for seed in range(len(metrics)))):
        table.add_column(heading, justify="right")
    for name in (*names, *per_class):
        values = [item[name] for item in metrics]
        table.add_row(name, *(f"{value:.4g}" for value in (sum(values) / len(values), *values)))
    return table


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
