"""What an episode came to: cost, attainment, how every request ended, and the distributions behind them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.fleet.spec import FleetSpec, ServiceClass
from rl_autoscale.sim import measures
from rl_autoscale.sim.layout import FloatArray, Outcome, RecordArray
from rl_autoscale.sim.misses import count_misses

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One service class.

    Attainment counts arrived requests: a request that was refused, dropped or cut off is a miss.
    """

    name: str
    num_arrived: int
    num_met: int
    outcomes: dict[str, int]
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p95_s: float
    tpot_p99_s: float
    tpot_cv: float
    latency_cv: float
    qoe: float
    """Mean over arrived requests; NaN for batch work, which nobody reads along."""
    hol_blocking_s: float
    """Mean over requests that ran."""

    @property
    def slo_attainment(self) -> float:
        """Share of arrived requests that met all their SLOs; NaN without any."""
        return self.num_met / self.num_arrived if self.num_arrived else float("nan")


@dataclass(frozen=True, slots=True)
class PoolResult:
    """One pool.

    ``prefix_queried_tokens`` were looked up in prefix caches and ``prefix_hit_tokens`` of them found; both are 0
    without prefix caching. ``cached_blocks_evicted`` counts KV blocks that were overwritten although another request
    could have found them. ``num_notices`` spot replicas were told to go; ``num_taken_away`` of them had not drained.
    """

    name: str
    gpu_hours: float
    cost_usd: float
    num_starts: int
    num_wakes: int
    num_crashes: int
    num_notices: int
    num_taken_away: int
    num_preemptions: int
    num_evictions: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    cached_blocks_evicted: int
    released_tokens: int
    released_blocks: int

    @property
    def kv_waste(self) -> float:
        """Share of the KV cache that requests held when they finished and that held no token; NaN if none did."""
        held_tokens = self.released_blocks * BLOCK_SIZE_TOKENS
        return 1.0 - self.released_tokens / held_tokens if held_tokens else float("nan")

    @property
    def prefix_hit_rate(self) -> float:
        """Share of looked-up tokens that were found, as vLLM counts it; NaN when nothing was looked up."""
        return self.prefix_hit_tokens / self.prefix_queried_tokens if self.prefix_queried_tokens else float("nan")


@dataclass(frozen=True, slots=True)
class Usage:
    """How a fleet's GPUs were used; docs/metrics.md defines each."""

    gpu_utilisation: float
    gpu_efficiency: float
    over_provisioned: float
    under_provisioned: float
    token_rate_cv: float


@dataclass(frozen=True, slots=True)
class EpisodeResult:
    """A whole episode, from time 0 until the last request ended (or the episode was cut off)."""

    duration_s: float
    gpu_hours: float
    cost_usd: float
    slo_attainment: float
    num_arrived: int
    num_met: int
    classes: tuple[ClassResult, ...]
    pools: tuple[PoolResult, ...]
    outcomes: dict[str, int]
    num_preemptions: int
    num_evictions: int
    num_starts: int
    num_crashes: int
    ready_share: float
    usage: Usage
    scale_ups: int = 0
    scale_downs: int = 0
    reversals: int = 0
    miss_causes: dict[str, int] = field(default_factory=dict)
    timeline: dict[str, FloatArray] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """The scalars, for tables and trackers."""
        return {
            "gpu_hours": self.gpu_hours,
            "cost_usd": self.cost_usd,
            "slo_attainment": self.slo_attainment,
            "num_arrived": float(self.num_arrived),
            "refused_share": self.outcomes["refused"] / max(self.num_arrived, 1),
            "dropped_share": sum(self.outcomes[key] for key in ("queue_full", "timed_out", "failed", "unfinished"))
            / max(self.num_arrived, 1),
            "scale_ups": float(self.scale_ups),
            "scale_downs": float(self.scale_downs),
            "reversals": float(self.reversals),
            "num_preemptions": float(self.num_preemptions),
            "num_evictions": float(self.num_evictions),
            "ready_share": self.ready_share,
            **asdict(self.usage),
            **{f"missed/{cause}": number / max(self.num_arrived, 1) for cause, number in self.miss_causes.items()},
            **{f"slo_attainment/{item.name}": item.slo_attainment for item in self.classes},
            **{f"ttft_p99_s/{item.name}": item.ttft_p99_s for item in self.classes},
            **{
                f"{name}/{item.name}": getattr(item, name)
                for name in ("tpot_p99_s", "tpot_cv", "latency_cv", "qoe", "hol_blocking_s")
                for item in self.classes
            },
            **self._pool_scalars(),
        }

    def _pool_scalars(self) -> dict[str, float]:
        """What is only worth telling when a fleet has several pools, or prefix caches."""
        scalars: dict[str, float] = {}
        if len(self.pools) > 1:
            scalars |= {f"gpu_hours/{item.name}": item.gpu_hours for item in self.pools}
            scalars |= {f"cost_usd/{item.name}": item.cost_usd for item in self.pools}
        if queried := sum(item.prefix_queried_tokens for item in self.pools):
            scalars["prefix_hit_rate"] = sum(item.prefix_hit_tokens for item in self.pools) / queried
        return scalars


def _quantiles(values: FloatArray) -> list[float]:
    return [float(q) for q in np.quantile(values, [0.5, 0.95, 0.99])] if len(values) else [float("nan")] * 3


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _outcome_counts(outcome: RecordArray) -> dict[str, int]:
    counts = np.bincount(outcome.astype(np.int64), minlength=len(Outcome))
    return {item.name.lower(): int(counts[item]) for item in Outcome if item is not Outcome.PENDING}


def class_result(service_class: ServiceClass, requests: RecordArray, blocked_s: FloatArray) -> ClassResult:
    """Summarise the requests of one class.

    Args:
        service_class: what was promised.
        requests: its REQUEST records.
        blocked_s: `measures.head_of_line_blocking_s` of these, shape (num_requests,).
    """
    first = requests["first_token_s"]
    seen = ~np.isnan(first)
    ttft_s = first[seen] - requests["arrival_s"][seen]
    finished = requests["outcome"] == Outcome.FINISHED
    done = finished & (requests["output_tokens"] > 1)
    tpot_s = (requests["last_token_s"][done] - first[done]) / (requests["output_tokens"][done] - 1)
    latency_s = requests["end_s"][finished] - requests["arrival_s"][finished]
    qoe = measures.quality_of_experience(requests, service_class.ttft_slo_s, service_class.tpot_slo_s)
    read_along = qoe if service_class.kind == "interactive" else qoe[:0]
    return ClassResult(
        service_class.name, len(requests), int(requests["slo_met"].sum()), _outcome_counts(requests["outcome"]),
        *_quantiles(ttft_s), *_quantiles(tpot_s),
        *(measures.coefficient_of_variation(values) for values in (tpot_s, latency_s)),
        *(_mean(values) for values in (read_along, blocked_s[~np.isnan(blocked_s)])),
    )  # fmt: skip


def usage(spec: FleetSpec, requests: RecordArray, pools: RecordArray, timeline: dict[str, FloatArray]) -> Usage:
    """How the GPUs were used; arguments as of `episode_result`."""
    rented_gpu_s = float((pools["replica_s"] * pools["gpus"]).sum()) or float("nan")
    work_gpu_s = measures.work_gpu_s(spec, requests, measures.pools_used(spec, requests, pools))
    gap = (float("nan"), float("nan"))
    if "ready" in timeline:
        held = timeline["ready"] @ spec.gpus_per_replica
        step = (requests["arrival_s"] / spec.control_interval_s).astype(np.int64)
        needed = np.bincount(step, weights=work_gpu_s, minlength=len(held))[: len(held)] / spec.control_interval_s
        gap = measures.provisioning_gap(needed, held)
    busy_gpu_s = float("nan") if spec.decode_pools else measures.busy_replica_s(requests, pools) @ pools["gpus"]
    return Usage(
        float(busy_gpu_s) / rented_gpu_s,
        float(work_gpu_s[requests["outcome"] == Outcome.FINISHED].sum()) / rented_gpu_s,
        *gap,
        measures.coefficient_of_variation(measures.token_rates(requests, spec.control_interval_s)),
    )


def billed_gpu_s(pools: RecordArray | np.void) -> FloatArray:
    """GPU-seconds to pay: starting, ready and draining replicas in full, sleeping ones at their fraction.

    Args:
        pools: POOL records of any shape, integrated up to now.
    """
    return np.asarray((pools["replica_s"] + pools["sleep_price"] * pools["sleep_s"]) * pools["gpus"])


def pool_result(pool: PoolSpec, record: np.void) -> PoolResult:
    """Summarise one pool from its POOL record."""
    gpu_hours = float(billed_gpu_s(record)) / SECONDS_PER_HOUR
    return PoolResult(
        pool.name,
        gpu_hours,
        gpu_hours * pool.price_usd_per_gpu_hour,
        *(
            int(record[name])
            for name in ("num_starts", "num_wakes", "crashes", "notices", "taken_away", "preemptions", "evictions",
                         "prefix_queried_tokens", "prefix_hit_tokens", "cached_blocks_evicted", "released_tokens",
                         "released_blocks")
        ),
    )  # fmt: skip


def episode_result(
    spec: FleetSpec, requests: RecordArray, pools: RecordArray, duration_s: float, *, timeline: dict[str, FloatArray]
) -> EpisodeResult:
    """Close the books of one fleet.

    Args:
        spec: the fleet.
        requests: arrived REQUEST records, all ended.
        pools: POOL records, integrated up to duration_s.
        duration_s: length of the episode.
        timeline: per control step arrays; "target" has shape (num_steps, num_pools).
    """
    by_pool = tuple(pool_result(pool, record) for pool, record in zip(spec.pools, pools, strict=True))
    blocked_s, class_index = measures.head_of_line_blocking_s(requests), requests["class_index"]
    by_class = tuple(
        class_result(item, requests[class_index == c], blocked_s[class_index == c])
        for c, item in enumerate(spec.classes)
    )
    num_met = sum(item.num_met for item in by_class)
    scaling = scaling_actions(timeline["target"]) if "target" in timeline else (0, 0, 0)
    return EpisodeResult(
        duration_s=duration_s,
        gpu_hours=sum(item.gpu_hours for item in by_pool),
        cost_usd=sum(item.cost_usd for item in by_pool),
        slo_attainment=num_met / len(requests) if len(requests) else float("nan"),
        num_arrived=len(requests),
        num_met=num_met,
        classes=by_class,
        pools=by_pool,
        outcomes=_outcome_counts(requests["outcome"]),
        num_preemptions=sum(item.num_preemptions for item in by_pool),
        num_evictions=sum(item.num_evictions for item in by_pool),
        num_starts=sum(item.num_starts for item in by_pool),
        num_crashes=sum(item.num_crashes for item in by_pool),
        ready_share=float(pools["ready_s"].sum() / max(pools["replica_s"].sum(), 1e-12)),
        usage=usage(spec, requests, pools, timeline),
        scale_ups=scaling[0],
        scale_downs=scaling[1],
        reversals=scaling[2],
        miss_causes=count_misses(spec, requests, timeline) if "target" in timeline else {},
        timeline=timeline,
    )


def scaling_actions(targets: FloatArray) -> tuple[int, int, int]:
    """Count changes of target.

    Args:
        targets: shape (num_steps, num_pools).

    Returns:
        (scale-ups, scale-downs, reversals): a reversal is a change whose direction is opposite to the pool's previous
        change.
    """
    change = np.diff(targets, axis=0)
    reversals = 0
    for column in change.T:
        direction = np.sign(column[column != 0])
        reversals += int((direction[1:] != direction[:-1]).sum())
    return int((change > 0).sum()), int((change < 0).sum()), reversals
