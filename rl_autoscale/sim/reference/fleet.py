"""The reference behind the `Fleet` protocol: any policy that runs on the compiled engine runs on it."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NEVER_REFUSE, FleetState, ScalingDecision
from rl_autoscale.sim.episode import (
    Timeline,
    check_workload,
    cut_off_s,
    draw_replica_times,
    draw_routing,
    scrape_window_s,
)
from rl_autoscale.sim.layout import POOL, REQUEST, IntArray, Outcome, RecordArray
from rl_autoscale.sim.prefix import prefix_blocks
from rl_autoscale.sim.reference.balancer import balance
from rl_autoscale.sim.reference.clock import ARRIVAL, Clock
from rl_autoscale.sim.reference.gateway import Gateway
from rl_autoscale.sim.reference.pool import Pool, slots_of
from rl_autoscale.sim.reference.request import Request
from rl_autoscale.sim.reference.telemetry import Telemetry
from rl_autoscale.sim.result import EpisodeResult, episode_result
from rl_autoscale.workload.trace import Workload

_FATE = (
    "arrival_s", "dispatched_s", "scheduled_s", "first_token_s", "last_token_s", "end_s", "prompt_tokens",
    "output_tokens", "class_index", "outcome", "slo_met", "num_preemptions", "num_evictions",
    "read_s", "late_s", "read_from_s", "read_tokens",
)  # fmt: skip
_COUNTS = (
    "replica_s", "ready_s", "sleep_s", "itl_sum_s", "itl_count", "prompt_tokens", "generation_tokens", "preemptions",
    "evictions", "crashes", "cancelled_starts", "reclaimed", "prefix_queried_tokens", "prefix_hit_tokens",
    "cached_blocks_evicted", "notices", "taken_away", "released_tokens", "released_blocks",
    "moved_blocks", "migrations", "forwarded",
)  # fmt: skip


class ReferenceFleet:
    """One simulated fleet, iteration by iteration; arguments and results are those of `SimFleet`.

    Args:
        spec: the fleet.
        workload: its traffic.
        seed: start-up times, crashes and routing.
        speed: true iteration time over the profile's.
        startup_scale: true start-up time over the spec's.
        drain_limit_s: how long after the last arrival the episode may go on until every request has ended; see
            `cut_off_s`.

    Raises:
        SpecError: class names differ, or a request can never fit.
    """

    def __init__(
        self,
        spec: FleetSpec,
        workload: Workload,
        *,
        seed: int = 0,
        speed: float = 1.0,
        startup_scale: float = 1.0,
        drain_limit_s: float | None = None,
    ) -> None:
        check_workload(spec, workload)
        self._spec = spec
        self.clock = Clock()
        self.gateway = Gateway(self.clock, spec, draw_routing(seed, workload.num_requests))
        self.pools = _make_pools(self.clock, spec, self.gateway, seed, speed, startup_scale)
        self.gateway.pools = self.pools
        for p, pool in enumerate(self.pools):
            if pool.spec.rebalance is not None:
                self.clock.process(balance(self.clock, pool, pool.spec.rebalance, p))
        self.requests = _make_requests(spec, workload)
        for request in self.requests:
            self.clock.call_after(request.arrival_s, ARRIVAL, partial(self.gateway.arrive, request))
        self._telemetry = Telemetry(self.gateway)
        self._time_s, self._steps = 0.0, 0
        self._end_s = workload.span_s
        self._limit_s = cut_off_s(spec, workload, drain_limit_s)
        self._decision = ScalingDecision(
            spec.initial_replicas, spec.batch_limits, np.full(len(spec.classes), NEVER_REFUSE)
        )
        self._timeline = Timeline()

    @property
    def spec(self) -> FleetSpec:
        """What the fleet is made of."""
        return self._spec

    @property
    def arrived(self) -> list[Request]:
        """The requests that have arrived, in order."""
        return self.requests[: sum(books.arrived for books in self.gateway.books)]

    def observe(self) -> FleetState:
        """The newest telemetry."""
        return FleetState(
            np.asarray(self._time_s),
            scrape_window_s(self._spec, np.asarray(self._steps)),
            self._telemetry.pools,
            self._telemetry.classes,
            self._telemetry.stages,
        )

    def apply(self, decision: ScalingDecision) -> None:
        """Set absolute targets."""
        self._decision = decision

    def advance(self) -> bool:
        """Let one control interval pass; False once every request has ended."""
        self._timeline.record(self.observe(), self._decision, self._missed())
        self._enact(self._decision)
        self._steps += 1
        self._time_s = self._steps * self._spec.control_interval_s
        self.clock.run_through(self._time_s - self._spec.telemetry_age_s)
        self._telemetry.look(age_s=self._spec.telemetry_age_s)
        self.clock.run_through(self._time_s)
        self.gateway.drop_all_impatient()
        left = self.gateway.num_unresolved + len(self.requests) - len(self.arrived)
        return self._time_s < self._end_s or (left > 0 and self._time_s < self._limit_s)

    def result(self) -> EpisodeResult:
        """Close the books; call once, after the control loop."""
        for request in self.arrived:
            if request.outcome is Outcome.PENDING:
                self.gateway.books[request.class_index].missed += not request.first_token_late
                request.outcome = Outcome.UNFINISHED
                request.end_s = self._time_s
        return episode_result(
            self._spec,
            self.request_records(),
            self.pool_records(),
            self._time_s,
            timeline=self._timeline.arrays(self._missed()),
        )

    def request_records(self) -> RecordArray:
        """The arrived requests as REQUEST records; only the fields that tell a request's fate are filled in."""
        arrived = self.arrived
        records = np.zeros(len(arrived), dtype=REQUEST)
        for name in _FATE:
            records[name] = [getattr(request, name) for request in arrived]
        records["replica"] = [request.slot for request in arrived]
        return records

    def pool_records(self) -> RecordArray:
        """The pools as POOL records, the cumulative counts filled in."""
        records = np.zeros(len(self.pools), dtype=POOL)
        for record, pool in zip(records, self.pools, strict=True):
            pool.book_time()
            books = pool.books
            record["base"] = pool.base
            record["gpus"] = pool.spec.hardware.gpus_per_replica
            record["sleep_price"] = pool.spec.sleep_price_fraction
            record["num_starts"], record["num_wakes"] = books.starts, books.wakes
            for name in _COUNTS:
                record[name] = getattr(books, name)
        return records

    def _enact(self, decision: ScalingDecision) -> None:
        self.gateway.admission = [float(level) for level in decision.admission]
        self.gateway.selectivity = [float(exponent) for exponent in decision.selectivities]
        self.gateway.max_in_flight = [int(limit) for limit in decision.in_flight_limits]
        for p, pool in enumerate(self.pools):
            pool.target = int(decision.target_replicas[p])
            pool.cap = int(decision.max_batch_size[p])
            pool.reconcile()
        self.gateway.dispatch_queued()

    def _missed(self) -> IntArray:
        return np.array([books.missed for books in self.gateway.books], dtype=np.int64)


def _make_pools(
    clock: Clock, spec: FleetSpec, gateway: Gateway, seed: int, speed: float, startup_scale: float
) -> list[Pool]:
    bases = itertools.accumulate((slots_of(pool) for pool in spec.pools), initial=0)
    return [
        Pool(clock, pool, base, gateway, draw_replica_times(pool, seed, startup_scale), speed)
        for pool, base in zip(spec.pools, bases, strict=False)
    ]


def _make_requests(spec: FleetSpec, workload: Workload) -> list[Request]:
    hashed = spec.router == "prefix_affinity" or any(pool.prefix_caching for pool in spec.pools)
    blocks = prefix_blocks(workload) if hashed else None
    return [
        Request(
            index=q,
            class_index=int(workload.class_index[q]),
            service_class=spec.classes[int(workload.class_index[q])],
            arrival_s=float(workload.arrival_s[q]),
            prompt_tokens=int(workload.prompt_tokens[q]),
            output_tokens=int(workload.output_tokens[q]),
            hash_ids=() if blocks is None else tuple(blocks.hashes(q).tolist()),
            shared_keys=() if blocks is None else tuple(blocks.keys(q).tolist()),
        )
        for q in range(workload.num_requests)
    ]
