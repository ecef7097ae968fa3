"""How many requests per second one GPU serves under each scheduler: capacity at equal attainment, by bisection.

The requests of a scenario's test traffic in random order, no early refusal; one replica and Poisson arrivals, unless a
study says otherwise. The capacity is the highest rate at which at least 90 % of the requests that arrive meet all their
SLOs (goodput in DistServe, serving capacity in SLOs-Serve). All schedulers get the same requests and, but for the rate,
the same gaps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.experiments.capacity import Settings, at_rate, draw_requests, largest_rate, resumed
from rl_autoscale.experiments.runs import write_text
from rl_autoscale.experiments.tables import Cell, Table
from rl_autoscale.fleet.errors import UnknownNameError
from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.token_budget import token_budget_for
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.sim.layout import RecordArray
from rl_autoscale.sim.result import pool_result
from rl_autoscale.workload.spec import TraceSource
from rl_autoscale.workload.trace import Workload

SCENARIOS = ("chatbot", "coder", "summariser", "mixed-apps", "tool-calls", "reasoning")
TARGET = 0.9
CAREFUL, QUICK = Settings(), Settings(num_requests=300, seeds=1, tolerance=0.1)
LONG_BUDGET_TOKENS = 8192
"""Token budget of systems that compute whole prompts: TensorRT-LLM's default; vLLM before V1 needs its context."""


@dataclass(frozen=True, slots=True)
class System:
    """A serving engine's way to batch.

    Attributes:
        name: its row.
        scheduler: of the pool.
        budget: where the token budget comes from: the hardware profile, the scenario's tightest TPOT, or a constant.
        kv_allocation: of the pool.
        options: what else its pool is given.
    """

    name: str
    scheduler: str
    budget: str = "profile"
    kv_allocation: str = "paged"
    options: Mapping[str, Any] = field(default_factory=dict)

    def pool(self, scenario: Scenario, max_num_seqs: int | None = None) -> PoolSpec:
        """One replica of the scenario's first pool under this system.

        Args:
            scenario: whose hardware.
            max_num_seqs: sequences that it may be sent; by default the profile's number.
        """
        given = scenario.fleet.pools[0]
        data = {"name": given.name, "role": "mixed", "profile": given.profile, "min_replicas": 1, "max_replicas": 1}
        data |= {"scheduler": self.scheduler, "kv_allocation": self.kv_allocation}
        seqs = max_num_seqs or given.hardware.max_num_seqs
        data["max_num_seqs"] = seqs
        if self.budget == "tbt":
            tightest_s = min(item.tpot_slo_s for item in scenario.fleet.classes)
            budget = token_budget_for(given.hardware, tightest_s)
            data |= {"max_num_batched_tokens": budget, "max_num_seqs": min(seqs, budget)}
        elif self.budget == "long":
            data |= {"max_num_batched_tokens": LONG_BUDGET_TOKENS}
        return PoolSpec.from_dict({**data, **self.options})


SYSTEMS = {
    system.name: system
    for system in (
        System("vllm", "vllm"),
        System("vllm-contiguous", "vllm", kv_allocation="contiguous"),
        System("vllm-v0", "vllm-v0", "long"),
        System("sarathi", "sarathi", "tbt"),
        System("trtllm-no-evict", "trtllm-no-evict", "long"),
        System("trtllm-max-utilization", "trtllm-max-utilization", "long"),
        System("fastserve", "fastserve", "long"),
        System("slos-serve", "slos-serve", "long"),
        System("andes", "andes"),
    )
}


@dataclass(frozen=True, slots=True)
class Load:
    """Under what a system serves a scenario's requests.

    Attributes:
        num_replicas: behind one gateway, which sends to the least loaded.
        arrival_cv: coefficient of variation of the gaps between arrivals, gamma distributed; 1 is Poisson.
        tpot_scale: TPOT SLOs over the scenario's.
    """

    num_replicas: int = 1
    arrival_cv: float = 1.0
    tpot_scale: float = 1.0

    def label(self, scenario: str) -> str:
        """Heading of the scenario's column under this load."""
        parts = [scenario]
        if self.num_replicas != 1:
            parts.append(f"{self.num_replicas} replicas")
        if self.arrival_cv != 1.0:
            parts.append(f"CV {self.arrival_cv:g}")
        if self.tpot_scale != 1.0:
            parts.append(f"TPOT × {self.tpot_scale:g}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared with what: systems under loads, in scenarios."""

    name: str
    title: str
    systems: Mapping[str, System]
    loads: tuple[Load, ...] = (Load(),)


CAPACITY = Study("capacity", "Capacity, requests per second and GPU", SYSTEMS)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What was found for one system in one scenario.

    Attributes:
        per_gpu_s: requests per second and GPU, one per seed.
        kv_waste: share of the KV cache that finished requests held and did not use, at the last seed's capacity.
        num_requests: simulated in all.
        cpu_s: time for that.
    """

    per_gpu_s: tuple[float, ...]
    kv_waste: float
    num_requests: int
    cpu_s: float

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.per_gpu_s))


@dataclass(slots=True)
class Replica:
    """One replica that serves the same requests at any rate."""

    batch: FleetBatch
    sample: Workload
    seed: int
    num_requests: int = 0
    cpu_s: float = 0.0

    def attainment(self, rate_per_s: float) -> float:
        """Share of the requests that meet their SLOs at this rate."""
        return float(self.serve(rate_per_s)["slo_met"].mean())

    def serve(self, rate_per_s: float) -> RecordArray:
        """Serve all requests at this rate; returns their REQUEST records."""
        workload = at_rate(self.sample, rate_per_s)
        self.batch.load(0, workload, seed=self.seed)
        began_s = time.process_time()
        self.batch.run(0)
        self.cpu_s += time.process_time() - began_s
        self.num_requests += workload.num_requests
        return self.batch.requests()


def capacity_of(
    system: System, scenario: Scenario, store: TraceSource, settings: Settings, load: Load = CAPACITY.loads[0]
) -> Capacity:
    """Find a system's capacity in a scenario, once per seed."""
    found, waste, num_requests, cpu_s = [], float("nan"), 0, 0.0
    for seed in range(settings.seeds):
        replica = replica_of(system, scenario, store, settings, seed, load)
        (pool,) = replica.batch.spec.pools
        rate_per_s = largest_rate(replica.attainment, TARGET, settings.tolerance)
        if rate_per_s > 0:
            replica.attainment(rate_per_s)
            waste = pool_result(pool, replica.batch.pools()[0]).kv_waste
        found.append(rate_per_s / (load.num_replicas * pool.hardware.gpus_per_replica))
        num_requests += replica.num_requests
        cpu_s += replica.cpu_s
    return Capacity(tuple(found), waste, num_requests, cpu_s)


def replica_of(
    system: System,
    scenario: Scenario,
    store: TraceSource,
    settings: Settings,
    seed: int,
    load: Load = CAPACITY.loads[0],
    max_num_seqs: int | None = None,
) -> Replica:
    """The scenario's replicas under a system, and the requests of a seed."""
    sample = draw_requests(scenario, store, settings.num_requests, seed, load.arrival_cv)
    pool = system.pool(scenario, max_num_seqs)
    return Replica(FleetBatch(_fleet(scenario, pool, sample, load)), sample, seed)


def _fleet(scenario: Scenario, pool: PoolSpec, sample: Workload, load: Load) -> FleetSpec:
    """The scenario's classes on these replicas; each asks for the power of two above its longest answer as max_tokens.

    The SLOs are scaled as the load says.
    """
    pool = pool.model_copy(update={"min_replicas": load.num_replicas, "max_replicas": load.num_replicas})
    classes = []
    for c, item in enumerate(scenario.fleet.classes):
        longest = int(sample.output_tokens[sample.class_index == c].max(initial=1))
        promise = {"max_output_tokens": 1 << (longest - 1).bit_length()}
        classes.append(item.model_copy(update={**promise, "tpot_slo_s": load.tpot_scale * item.tpot_slo_s}))
    return FleetSpec.from_dict({"pools": (pool,), "classes": tuple(classes)})


def compare_systems(
    store: TraceSource,
    out: Path,
    *,
    study: Study = CAPACITY,
    systems: tuple[str, ...] = (),
    scenarios: tuple[str, ...] = SCENARIOS,
    settings: Settings,
    progress: Callable[[str, int, int], None],
) -> dict[str, dict[str, Capacity]]:
    """Find all capacities of a study; what is found in its file in ``out`` is not looked for again.

    Args:
        store: real traces.
        out: folder of the run.
        study: systems and loads.
        systems: which of them; default all.
        scenarios: which.
        settings: how carefully.
        progress: called with what is next, how many are done, and of how many.

    Returns:
        Capacities by scenario and load, then by system.

    Raises:
        SpecError: the folder holds results of other settings.
        UnknownNameError: there is no such system or scenario.
    """
    systems = systems or tuple(study.systems)
    for name in systems:
        if name not in study.systems:
            raise UnknownNameError("system", name, list(study.systems))
    path = out / ("systems.json" if study is CAPACITY else f"{study.name}.json")
    data = known_results(path, settings)
    columns = [(scenario, load) for scenario in scenarios for load in study.loads]
    cells = [(*column, system) for column in columns for system in systems]
    for k, (scenario, load, system) in enumerate(cells):
        label = load.label(scenario)
        progress(f"{label}: {system}", k, len(cells))
        known = data["capacities"].setdefault(label, {})
        if system not in known:
            known[system] = asdict(capacity_of(study.systems[system], load_scenario(scenario), store, settings, load))
            write_text(path, json.dumps(data, indent=2))
    progress("done", len(cells), len(cells))
    return {
        label: {
            system: Capacity(**{**known[system], "per_gpu_s": tuple(known[system]["per_gpu_s"])}) for system in systems
        }
        for label, known in ((load.label(scenario), data["capacities"][load.label(scenario)])
                             for scenario, load in columns)
    }  # fmt: skip


def known_results(path: Path, settings: Settings) -> dict[str, Any]:
    """What a run's file holds, see `resumed`."""
    return resumed(path, asdict(settings), "capacities", "qoe")


def capacity_table(found: dict[str, dict[str, Capacity]], title: str = CAPACITY.title) -> Table:
    """Capacity of every system in every scenario, the best of each column in bold."""
    systems = list(next(iter(found.values())))
    best = {scenario: max(cell.mean for cell in cells.values()) for scenario, cells in found.items()}
    rows = [
        (
            Cell(system),
            *(
                Cell(_with_range(cells[system]), strong=cells[system].mean == best[scenario])
                for scenario, cells in found.items()
            ),
        )
        for system in systems
    ]
    return Table(
        title,
        f"Highest rate with {TARGET:.0%} of the requests within all SLOs; mean over seeds, in brackets the lowest and "
        "the highest. Bold: the best of a scenario.",
        ("system", *found),
        tuple(rows),
        num_text=1,
    )


def speed_table(found: dict[str, dict[str, Capacity]]) -> Table:
    """How fast each system is simulated, and how much KV cache its requests waste."""
    rows = []
    for system in next(iter(found.values())):
        cells = [by_system[system] for by_system in found.values()]
        speed = sum(cell.num_requests for cell in cells) / max(sum(cell.cpu_s for cell in cells), 1e-9)
        waste = [cell.kv_waste for cell in cells if not np.isnan(cell.kv_waste)]
        shown = f"{min(waste):.1%} to {max(waste):.1%}" if waste else "-"
        rows.append((Cell(system), Cell(f"{speed:,.0f}"), Cell(shown)))
    return Table(
        "Simulated speed and KV waste",
        "Requests per CPU second over all searches of this run. Waste: share of the KV cache that requests hold at "
        "their last token and do not use, over the scenarios.",
        ("system", "requests per CPU second", "KV waste"),
        tuple(rows),
        num_text=1,
    )


def _with_range(cell: Capacity) -> str:
    low, high = min(cell.per_gpu_s), max(cell.per_gpu_s)
    return f"{cell.mean:.2f}" if low == high else f"{cell.mean:.2f} [{low:.2f}, {high:.2f}]"
