"""Mean quality of experience over the request rate under each scheduler, in the shape of Andes' figures.

Unlike in the search for capacities, engines are sent up to a thousand requests: a scheduler can only let those go first
that it sees, and engines have no such limit on what may wait in them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.experiments.capacity import Settings
from rl_autoscale.experiments.runs import write_text
from rl_autoscale.experiments.systems import SYSTEMS, Capacity, System, known_results, replica_of
from rl_autoscale.experiments.tables import Cell, Table
from rl_autoscale.fleet.spec import ServiceClass
from rl_autoscale.sim.layout import RecordArray
from rl_autoscale.sim.measures import quality_of_experience
from rl_autoscale.workload.spec import TraceSource

LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)
"""Request rates, over the capacity of the first system."""
MAX_NUM_SEQS = 1024
MOST_REQUESTS = 3000
"""Overload grows while it lasts, and all QoE falls: so it is part of the question how long it does."""


@dataclass(frozen=True, slots=True)
class QoeCurve:
    """One system in one scenario.

    Attributes:
        rate_per_s: requests per second and replica.
        qoe: mean over the requests that arrived, by rate and seed.
        num_requests: simulated in all.
        cpu_s: time for that.
    """

    rate_per_s: tuple[float, ...]
    qoe: tuple[tuple[float, ...], ...]
    num_requests: int
    cpu_s: float

    @property
    def means(self) -> list[float]:
        """Over seeds, by rate."""
        return [float(np.mean(of_seeds)) for of_seeds in self.qoe]


def mean_qoe(classes: tuple[ServiceClass, ...], requests: RecordArray) -> float:
    """QoE that each class's users expect by its SLOs, mean over all requests."""
    total = 0.0
    for c, item in enumerate(classes):
        mine = requests[requests["class_index"] == c]
        total += float(quality_of_experience(mine, item.ttft_slo_s, item.tpot_slo_s).sum())
    return total / len(requests)


def qoe_curve(
    system: System, scenario: Scenario, store: TraceSource, settings: Settings, rates_per_s: tuple[float, ...]
) -> QoeCurve:
    """Serve the same requests at each of these rates."""
    settings = replace(settings, num_requests=min(settings.num_requests, MOST_REQUESTS))
    seeds = range(settings.seeds)
    replicas = [replica_of(system, scenario, store, settings, seed, max_num_seqs=MAX_NUM_SEQS) for seed in seeds]
    qoe = tuple(
        tuple(mean_qoe(scenario.fleet.classes, replica.serve(rate_per_s)) for replica in replicas)
        for rate_per_s in rates_per_s
    )
    return QoeCurve(rates_per_s, qoe, sum(r.num_requests for r in replicas), sum(r.cpu_s for r in replicas))


def qoe_curves(
    store: TraceSource,
    out: Path,
    scenario: str,
    capacities: dict[str, Capacity],
    *,
    settings: Settings,
    progress: Callable[[str, int, int], None],
) -> dict[str, QoeCurve]:
    """Measure all systems whose capacity was found; what ``out/systems.json`` holds already is not measured again.

    Args:
        store: of traces.
        out: folder of the run.
        scenario: its name.
        capacities: per GPU, by system; rates are multiples of the first one's.
        settings: of the run.
        progress: called before each system.
    """
    path = out / "systems.json"
    data = known_results(path, settings)
    found = load_scenario(scenario)
    first = next(iter(capacities))
    gpus = SYSTEMS[first].pool(found).hardware.gpus_per_replica
    rates_per_s = tuple(round(load * capacities[first].mean * gpus, 3) for load in LOADS)
    known = data["qoe"].setdefault(scenario, {})
    for k, system in enumerate(capacities):
        progress(f"QoE, {scenario}: {system}", k, len(capacities))
        if known.get(system, {}).get("rate_per_s") != list(rates_per_s):
            known[system] = asdict(qoe_curve(SYSTEMS[system], found, store, settings, rates_per_s))
            write_text(path, json.dumps(data, indent=2))
    progress("done", len(capacities), len(capacities))
    return {
        system: QoeCurve(rates_per_s, tuple(map(tuple, known[system]["qoe"])), known[system]["num_requests"],
                         known[system]["cpu_s"])
        for system in capacities
    }  # fmt: skip


def qoe_table(scenario: str, curves: dict[str, QoeCurve]) -> Table:
    """Mean QoE of every system at every rate, the best of each column in bold."""
    first = next(iter(curves))
    shown = {system: [f"{mean:.3f}" for mean in curve.means] for system, curve in curves.items()}
    best = [max(column) for column in zip(*shown.values(), strict=True)]
    spread = max(max(of_seeds) - min(of_seeds) for curve in curves.values() for of_seeds in curve.qoe)
    return Table(
        f"Mean QoE by request rate, {scenario}",
        f"Scenario `{scenario}`: mean QoE of the requests that arrived, by requests per second and replica, which are "
        f"{', '.join(f'{load:g}' for load in LOADS)} times the capacity of `{first}`. Mean over seeds, which differ by "
        f"{spread:.3f} at most. Up to {MOST_REQUESTS:,} requests, of which engines are sent {MAX_NUM_SEQS} at a "
        "time at most. Bold: the best of a rate.",
        ("system", *(f"{rate_per_s:.2f}" for rate_per_s in curves[first].rate_per_s), "requests per CPU second"),
        tuple(
            (
                Cell(system),
                *(Cell(text, strong=text == top) for text, top in zip(texts, best, strict=True)),
                Cell(f"{curves[system].num_requests / max(curves[system].cpu_s, 1e-9):,.0f}"),
            )
            for system, texts in shown.items()
        ),
        num_text=1,
    )
