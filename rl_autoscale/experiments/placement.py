"""Where to put prefill and decode: the placement with the most goodput per GPU, colocated or disaggregated.

Goodput is the highest Poisson rate at which the target share of requests meets its time to first token and its time per
output token. As DistServe does, the search first finds the goodput of single instances: a prefill instance against the
first promise alone, a decode instance against the second, for every profile (model, GPU, tensor parallelism); the two
say how many of each kind a number of GPUs should hold. Where DistServe replicates that pair to the asked rate and stops
there, every placement is then simulated as a whole, bridge and transfers included, and so are those with one prefill
instance more or less until none is better: what single instances meet says little about several that share a queue, and
nothing about both promises together.

Reference: Zhong et al., OSDI 2024 (arXiv 2401.09670), sections 4.1 and 4.2, algorithms 1 and 2. The two differ in the
link between the phases, here ``link_bytes_per_s``. Pipeline parallelism is left out: profiles have none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.experiments import capacity
from rl_autoscale.experiments.capacity import at_rate, draw_requests, largest_rate, resumed
from rl_autoscale.experiments.runs import write_text
from rl_autoscale.experiments.systems import LONG_BUDGET_TOKENS
from rl_autoscale.experiments.tables import Cell, Table
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.pool import SchedulerName
from rl_autoscale.fleet.profile import load_profile
from rl_autoscale.fleet.spec import FleetSpec, ServiceClass
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.workload.spec import TraceSource
from rl_autoscale.workload.trace import Workload

BRIDGE_LIMIT = 256
MANY_PREFILLS = 32
"""Prefill instances in front of one decode instance whose goodput is looked for: enough that none of them waits."""
UNBOUNDED_S = 1e6
SPANS_OF_PATIENCE = 20
"""A rate is tried for so many times the longest wait that the promises forgive: overload must have time to show."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is asked, and what was promised.

    Attributes:
        samples: requests at one per second on average, one workload per seed.
        classes: their service classes.
    """

    samples: tuple[Workload, ...]
    classes: tuple[ServiceClass, ...]


@dataclass(frozen=True, slots=True)
class Settings(capacity.Settings):
    """How carefully goodputs are looked for; ``num_requests`` that are too few for ``span_s`` come again.

    Attributes:
        span_s: of arrivals at every rate, at least.
        target: share of requests within their SLOs.
    """

    num_requests: int = 4000
    seeds: int = 2
    span_s: float = 120.0
    target: float = 0.9


QUICK = Settings(num_requests=400, span_s=20.0, seeds=1, tolerance=0.1)


@dataclass(frozen=True, slots=True)
class Placement:
    """Instances of one kind, or of two.

    Attributes:
        prefill: profile of the prefill instances; None: colocated.
        num_prefill: of them.
        decode: profile of the decode instances, or of those that do both.
        num_decode: of them.
        scheduler: of those that do both; prefill and decode instances have vLLM's.
    """

    decode: str
    num_decode: int = 1
    prefill: str | None = None
    num_prefill: int = 0
    scheduler: SchedulerName = "vllm"

    @property
    def num_gpus(self) -> int:
        """GPUs of all instances."""
        used = self.num_decode * _gpus(self.decode)
        return used if self.prefill is None else used + self.num_prefill * _gpus(self.prefill)

    @property
    def name(self) -> str:
        """For tables."""
        if self.prefill is None:
            return f"{self.num_decode} × TP{_gpus(self.decode)} {self.scheduler}"
        return (
            f"{self.num_prefill} × TP{_gpus(self.prefill)} prefill, {self.num_decode} × TP{_gpus(self.decode)} decode"
        )

    def fleet(self, classes: tuple[ServiceClass, ...], link_bytes_per_s: float) -> FleetSpec:
        """As a fleet that serves these classes."""
        if self.prefill is None:
            budget = {"max_num_batched_tokens": LONG_BUDGET_TOKENS} if self.scheduler == "vllm-v0" else {}
            pool = _pool("all", "mixed", self.decode, self.num_decode) | {"scheduler": self.scheduler, **budget}
            return FleetSpec.from_dict({"pools": [pool], "classes": classes})
        pools = [
            _pool("prefill", "prefill", self.prefill, self.num_prefill),
            _pool("decode", "decode", self.decode, self.num_decode),
        ]
        transfer = {"link_bytes_per_s": link_bytes_per_s, "bridge_limit": BRIDGE_LIMIT}
        return FleetSpec.from_dict({"pools": pools, "classes": classes, "kv_transfer": transfer})


@dataclass(frozen=True, slots=True)
class Tried:
    """One placement that was simulated.

    Attributes:
        placement: it.
        expected_per_s: goodput that its instances add up to, each kind against its own promise.
        goodput_per_s: of the whole, mean over seeds.
    """

    placement: Placement
    expected_per_s: float
    goodput_per_s: float

    @property
    def per_gpu_s(self) -> float:
        """Goodput per GPU."""
        return self.goodput_per_s / self.placement.num_gpus


def traffic_of(
    scenario: str, store: TraceSource, settings: Settings, *, ttft_slo_s: float | None, tpot_slo_s: float | None
) -> Traffic:
    """The test requests of a scenario in random order, and its classes, with other promises where they are given."""
    chosen = load_scenario(scenario)
    given = {"ttft_slo_s": ttft_slo_s, "tpot_slo_s": tpot_slo_s}
    promises = {name: value for name, value in given.items() if value is not None}
    return Traffic(
        tuple(draw_requests(chosen, store, settings.num_requests, seed) for seed in range(settings.seeds)),
        tuple(ServiceClass.from_dict(item.model_dump() | promises) for item in chosen.fleet.classes),
    )


def goodput(fleet: FleetSpec, samples: tuple[Workload, ...], settings: Settings) -> float:
    """Highest rate at which the target share of requests meets its SLOs, mean over samples; 0 if no rate does."""
    batch = FleetBatch(fleet)
    rates = []
    for seed, sample in enumerate(samples):
        patience_s = max(_patience_s(item, float(sample.output_tokens.mean())) for item in fleet.classes)
        span_s = max(settings.span_s, SPANS_OF_PATIENCE * patience_s)

        def attainment(rate_per_s: float, sample: Workload = sample, seed: int = seed, span_s: float = span_s) -> float:
            number = max(sample.num_requests, math.ceil(rate_per_s * span_s))
            batch.load(0, at_rate(_repeated(sample, number), rate_per_s), seed=seed)
            batch.run(0)
            return float(batch.requests()["slo_met"].mean())

        rates.append(largest_rate(attainment, settings.target, settings.tolerance))
    return float(np.mean(rates))


class Search:
    """The search for one number of GPUs.

    Args:
        profiles: names or paths, of one model, usually at several degrees of tensor parallelism.
        num_gpus: at most so many in a placement.
        traffic: what to serve.
        schedulers: of colocated placements.
        link_bytes_per_s: of each prefill instance.
        settings: how carefully.
        known: goodputs found before, by name; new ones are added.
        found: called after each goodput with its name, how many are known and how many there will be, as far as
            is known.

    Raises:
        SpecError: an instance needs more GPUs than there are, or two profiles have the same number.
    """

    def __init__(
        self,
        profiles: tuple[str, ...],
        num_gpus: int,
        traffic: Traffic,
        *,
        schedulers: tuple[SchedulerName, ...] = ("vllm",),
        link_bytes_per_s: float = 50e9,
        settings: Settings,
        known: dict[str, float] | None = None,
        found: Callable[[str, int, int], None] = lambda name, done, total: None,
    ) -> None:
        sizes = [_gpus(profile) for profile in profiles]
        if len(set(sizes)) < len(sizes):
            raise SpecError(f"profiles of {sizes} GPUs: give one per degree of tensor parallelism")
        if not sizes or min(sizes) > num_gpus:
            raise SpecError(f"no instance fits {num_gpus} GPUs; profiles need {sizes}; raise --gpus or add a profile")
        self._profiles = tuple(p for p, size in zip(profiles, sizes, strict=True) if size <= num_gpus)
        self._num_gpus, self._traffic, self._schedulers = num_gpus, traffic, schedulers
        self._link_bytes_per_s, self._settings = link_bytes_per_s, settings
        self._known: dict[str, float] = {} if known is None else known
        self._found = found
        kinds = len(self._profiles)
        self._total = kinds * (2 + 2 * len(schedulers)) + 3 * kinds * kinds

    def run(self) -> list[Tried]:
        """All placements, the best per GPU first."""
        tried = [self._try(placement, expected) for placement, expected in self._colocated()]
        for prefill in self._profiles:
            for decode in self._profiles:
                tried += self._disaggregated(prefill, decode)
        return sorted(tried, key=lambda item: -item.per_gpu_s)

    def prefill_goodput(self, profile: str) -> float:
        """Requests per second of one prefill instance, against the time to first token alone."""
        classes = tuple(item.model_copy(update=_without("tpot")) for item in self._traffic.classes)
        fleet = Placement(profile).fleet(classes, self._link_bytes_per_s)
        samples = tuple(_first_tokens(sample) for sample in self._traffic.samples)
        return self._goodput(f"TP{_gpus(profile)} prefill instance", fleet, samples)

    def decode_goodput(self, profile: str) -> float:
        """Requests per second of one decode instance, against the time per output token alone."""
        classes = tuple(item.model_copy(update=_without("ttft")) for item in self._traffic.classes)
        placement = Placement(profile, 1, max(self._profiles, key=_gpus), MANY_PREFILLS)
        fleet = placement.fleet(classes, self._link_bytes_per_s)
        return self._goodput(f"TP{_gpus(profile)} decode instance", fleet, self._traffic.samples)

    def _colocated(self) -> Iterator[tuple[Placement, float]]:
        for profile in self._profiles:
            for scheduler in self._schedulers:
                one = Placement(profile, 1, scheduler=scheduler)
                number = self._num_gpus // _gpus(profile)
                alone = self._try(one, float("nan")).goodput_per_s
                yield Placement(profile, number, scheduler=scheduler), number * alone

    def _disaggregated(self, prefill: str, decode: str) -> list[Tried]:
        """From the split of the GPUs that its instances promise most of to the next better one until none is."""
        each = self.prefill_goodput(prefill), self.decode_goodput(decode)
        splits = {
            number: (self._num_gpus - number * _gpus(prefill)) // _gpus(decode)
            for number in range(1, self._num_gpus // _gpus(prefill) + 1)
        }
        splits = {number: others for number, others in splits.items() if others > 0}
        if not splits:
            return []

        def expected(number: int) -> float:
            return min(number * each[0], splits[number] * each[1])

        number = max(splits, key=expected)
        tried: dict[int, Tried] = {}
        while True:
            for near in (number, number - 1, number + 1):
                if near in splits and near not in tried:
                    tried[near] = self._try(Placement(decode, splits[near], prefill, near), expected(near))
            best = max(tried, key=lambda near: tried[near].per_gpu_s)
            if best == number:
                return list(tried.values())
            number = best

    def _try(self, placement: Placement, expected_per_s: float) -> Tried:
        fleet = placement.fleet(self._traffic.classes, self._link_bytes_per_s)
        return Tried(placement, expected_per_s, self._goodput(placement.name, fleet, self._traffic.samples))

    def _goodput(self, name: str, fleet: FleetSpec, samples: tuple[Workload, ...]) -> float:
        if name not in self._known:
            self._known[name] = goodput(fleet, samples, self._settings)
            self._found(name, len(self._known), max(self._total, len(self._known)))
        return self._known[name]


def resumable(
    path: Path, question: dict[str, Any], found: Callable[[str, int, int], None]
) -> tuple[dict[str, float], Callable[[str, int, int], None]]:
    """Goodputs that a file holds already, and what writes the new ones there, for `Search`.

    Args:
        path: the file.
        question: what was asked; answers to another one are not mixed with these.
        found: called after each goodput as well.

    Raises:
        SpecError: the file answers another question.
    """
    data = resumed(path, question, "goodput_per_s")

    def write(name: str, done: int, total: int) -> None:
        write_text(path, json.dumps(data, indent=2))
        found(name, done, total)

    return data["goodput_per_s"], write


def placement_table(tried: list[Tried], target: float) -> Table:
    """All placements in the order given."""
    rows = [
        (
            Cell(item.placement.name, strong=item is tried[0]),
            Cell(str(item.placement.num_gpus)),
            Cell(f"{item.expected_per_s:.2f}"),
            Cell(f"{item.goodput_per_s:.2f}"),
            Cell(f"{item.per_gpu_s:.3f}", strong=item is tried[0]),
        )
        for item in tried
    ]
    return Table(
        "Placements",
        f"Goodput: the highest rate with {target:.0%} of the requests within their SLOs. Expected: what the instances "
        "add up to, prefill against the first promise alone and decode against the second.",
        ("placement", "GPUs", "expected, req/s", "goodput, req/s", "per GPU"),
        tuple(rows),
        num_text=1,
    )


def as_data(tried: list[Tried]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(item) | {"name": item.placement.name, "per_gpu_s": item.per_gpu_s} for item in tried]


def _patience_s(promise: ServiceClass, mean_output_tokens: float) -> float:
    """Longest wait of a typical request that its promises forgive."""
    waits_s = promise.ttft_slo_s, promise.tpot_slo_s * mean_output_tokens
    return max((wait_s for wait_s in waits_s if wait_s < UNBOUNDED_S), default=0.0)


def _repeated(sample: Workload, number: int) -> Workload:
    """So many requests: the sample's, again and again."""
    arrival_s = np.cumsum(np.resize(np.diff(sample.arrival_s, prepend=0.0), number))
    return Workload(
        arrival_s, np.resize(sample.prompt_tokens, number), np.resize(sample.output_tokens, number),
        np.resize(sample.class_index, number), sample.class_names, float(arrival_s[-1]),
    )  # fmt: skip


def _gpus(profile: str) -> int:
    return load_profile(profile).gpus_per_replica


def _pool(name: str, role: str, profile: str, number: int) -> dict[str, object]:
    return {"name": name, "role": role, "profile": profile, "min_replicas": number, "max_replicas": number}


def _without(promise: str) -> dict[str, object]:
    return {f"{promise}_slo_s": UNBOUNDED_S, "deadline_s": None, "timeout_s": None}


def _first_tokens(sample: Workload) -> Workload:
    """The same requests, each of which ends with its first token."""
    return Workload(
        sample.arrival_s, sample.prompt_tokens, np.ones_like(sample.output_tokens), sample.class_index,
        sample.class_names, sample.span_s,
    )  # fmt: skip
