"""The simulated fleet: `FleetBatch` advances many in one compiled call, `SimFleet` is one of them as a `Fleet`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import (
    NEVER_REFUSE,
    ClassTelemetry,
    FleetState,
    PoolTelemetry,
    ScalingDecision,
    StageTelemetry,
)
from rl_autoscale.sim import engine
from rl_autoscale.sim.episode import (
    Timeline,
    check_workload,
    cut_off_s,
    draw_replica_times,
    draw_routing,
    scrape_window_s,
)
from rl_autoscale.sim.layout import NO_ROOM, SCHEDULER_CODES, VLLM_PRIORITY, FloatArray, IntArray, RecordArray
from rl_autoscale.sim.memory import Rooms, allocate, give_prefixes, template
from rl_autoscale.sim.overdue import count_overdue
from rl_autoscale.sim.result import EpisodeResult, billed_gpu_s, episode_result
from rl_autoscale.workload.trace import Workload


class FleetBatch:
    """Fleets of one spec that advance together.

    Args:
        spec: what each fleet is made of.
        num_fleets: how many.
        num_threads: fleets are dealt out to so many threads; the kernels hold no GIL.
        gap_edges_s: count every gap between two tokens of a request in a histogram with these bucket bounds
            (increasing); None: count none, which is faster.
    """

    def __init__(
        self, spec: FleetSpec, num_fleets: int = 1, *, num_threads: int = 1, gap_edges_s: FloatArray | None = None
    ) -> None:
        self.spec = spec
        self.num_fleets = num_fleets
        num_threads = max(1, min(num_threads, num_fleets))
        self._executor = ThreadPoolExecutor(num_threads) if num_threads > 1 else None
        self._shares = [np.arange(k, num_fleets, num_threads) for k in range(num_threads)]
        self._idle_decision = ScalingDecision(
            np.tile(spec.initial_replicas, (num_fleets, 1)),
            np.tile(spec.batch_limits, (num_fleets, 1)),
            np.full((num_fleets, len(spec.classes)), NEVER_REFUSE),
        )
        plain = all(SCHEDULER_CODES[p.scheduler] <= VLLM_PRIORITY and p.rebalance is None for p in spec.pools)
        self._others = None if plain else 1
        self._reads_hashes = spec.router == "prefix_affinity" or any(pool.prefix_caching for pool in spec.pools)
        self._counts_gaps = gap_edges_s is not None
        self._world = allocate(spec, num_fleets, gap_edges_s)
        self._rooms = Rooms(self._world, num_fleets)
        self._template = template(spec, self._counts_gaps)
        self._now_s: FloatArray = np.zeros(num_fleets)
        self._steps = np.zeros(num_fleets, dtype=np.int64)
        self._oldest_open = np.zeros(num_fleets, dtype=np.int64)  # all requests before it have ended

    # -- episodes ----------------------------------------------------------------------------------------------------

    def load(
        self,
        e: int,
        workload: Workload,
        *,
        seed: int,
        speed: float = 1.0,
        startup_scale: float = 1.0,
        admission: float = NEVER_REFUSE,
        initial_replicas: IntArray | None = None,
    ) -> None:
        """Start a new episode in fleet ``e``: initial replicas are ready, the clock is 0.

        Args:
            e: which fleet.
            workload: requests; class names must be the fleet's.
            seed: start-up times, crashes and routing; independent of the policy.
            speed: true iteration time over the profile's (a capacity error the policy does not know of).
            startup_scale: true start-up time over the spec's.
            admission: strictness until the first decision.
            initial_replicas: ready at time 0, shape (num_pools,); default the spec's.

        Raises:
            SpecError: class names differ, a request can never fit, or there is no memory for so much traffic.
        """
        spec = self.spec
        check_workload(spec, workload)
        world, number = self._world, workload.num_requests
        routed = number if spec.router == "power_of_two" else 0
        timed = number if self._counts_gaps else 0
        room = self._rooms.give(e, trace=number, req=number, route_u=routed, token_s=timed)
        room["route_u"][:] = draw_routing(seed, routed)
        rows = room["trace"]
        rows["arrival_s"] = workload.arrival_s
        rows["prompt_tokens"] = workload.prompt_tokens
        rows["output_tokens"] = workload.output_tokens
        rows["class_index"] = workload.class_index
        world.pool[e] = self._template.pool
        if initial_replicas is not None:
            world.pool["target"][e] = initial_replicas
        world.cls[e] = self._template.cls
        world.cls["admission"][e] = admission
        world.fleet[e] = self._template.fleet
        world.fleet["num_requests"][e] = number
        for name in ("candidates", "plan_prompt", "plan_count", "plan_time", "plan_context", "plan_chosen"):
            getattr(world, name)[e] = 0
        world.fleet["speed"][e] = speed
        if self._reads_hashes:
            give_prefixes(self._rooms, world, e, workload)
        world.rep["generation"][e] = 0
        world.event_tree[e] = np.inf
        world.route_tree[e] = NO_ROOM
        world.ttft_hist[e] = 0
        world.tpot_hist[e] = 0
        world.gap_hist[e] = 0
        for p, pool in enumerate(spec.pools):
            world.draws[e, p] = draw_replica_times(pool, seed, startup_scale)
        world.last_pool[e] = world.pool[e]
        world.last_cls[e] = world.cls[e]
        self._call(engine.INITIALISE, np.array([e]), self._idle_decision, self._now_s)
        self._now_s[e], self._steps[e], self._oldest_open[e] = 0.0, 0, 0

    def observe(self) -> FleetState:
        """Telemetry of all fleets, shape (num_fleets, ...); a copy."""
        world = self._world
        window_s = scrape_window_s(self.spec, self._steps)
        return FleetState(
            self._now_s.copy(),
            window_s,
            PoolTelemetry.from_matrix(world.pool_state.copy()),
            ClassTelemetry.from_matrix(world.class_state.copy()),
            StageTelemetry.from_matrix(world.stage_state.copy()) if self.spec.has_stages else None,
        )

    def step(self, decision: ScalingDecision) -> None:
        """Apply one decision per fleet and let one control interval pass, in one compiled call per thread."""
        self._steps += 1
        self._now_s = np.asarray(self._steps * self.spec.control_interval_s)
        if self._executor is None:
            self._call(engine.STEP, self._shares[0], decision, self._now_s)
            return
        jobs = [self._executor.submit(self._call, engine.STEP, share, decision, self._now_s) for share in self._shares]
        for job in jobs:
            job.result()

    def run(self, e: int, until_s: float = np.inf) -> None:
        """Let one fleet run without further decisions until a time, or until nothing is left to happen."""
        self._call(engine.RUN, np.array([e]), self._idle_decision, np.full(self.num_fleets, until_s))
        self._now_s[e] = self._world.fleet["now_s"][e, 0]
        self._steps[e] = int(self._now_s[e] / self.spec.control_interval_s)

    def _call(self, operation: int, which: IntArray, decision: ScalingDecision, until_s: FloatArray) -> None:
        engine.advance(
            self._world,
            which,
            operation,
            np.ascontiguousarray(decision.target_replicas, dtype=np.int64),
            np.ascontiguousarray(decision.max_batch_size, dtype=np.int64),
            np.ascontiguousarray(decision.admission, dtype=np.float64),
            np.ascontiguousarray(decision.in_flight_limits, dtype=np.int64),
            np.ascontiguousarray(decision.selectivities, dtype=np.float64),
            until_s,
            self.spec.telemetry_age_s,
            self._others,
        )

    # -- books -------------------------------------------------------------------------------------------------------

    @property
    def now_s(self) -> FloatArray:
        """Shape (num_fleets,)."""
        return self._now_s

    @property
    def unresolved(self) -> IntArray:
        """Requests that have arrived and not ended, shape (num_fleets,)."""
        return np.asarray(self._world.fleet["unresolved"][:, 0])

    @property
    def arrivals_left(self) -> IntArray:
        """Requests that have not arrived yet, shape (num_fleets,)."""
        return np.asarray(self._world.fleet["num_requests"][:, 0] - self._world.fleet["next_arrival"][:, 0])

    def gpu_s(self) -> FloatArray:
        """GPU-seconds to pay so far, shape (num_fleets, num_pools); see `result.billed_gpu_s`."""
        return billed_gpu_s(self._world.pool)

    def ledger(self, field: str) -> IntArray:
        """A cumulative count per class (``arrived``, ``met``, ``missed``, ...), shape (num_fleets, num_classes)."""
        return np.asarray(self._world.cls[field]).copy()

    def missed(self) -> IntArray:
        """Requests that are certain to miss, in the books or overdue, shape (num_fleets, num_classes)."""
        missed, cls = self.ledger("missed"), self._world.cls
        for e in range(self.num_fleets):
            promises = np.ascontiguousarray(cls["ttft_slo_s"][e]), np.ascontiguousarray(cls["deadline_s"][e])
            self._oldest_open[e] = count_overdue(
                self.requests(e), *promises, float(self._now_s[e]), int(self._oldest_open[e]), missed[e]
            )
        return missed

    def num_events(self) -> int:
        """Events handled so far, over all fleets."""
        return int(self._world.fleet["num_events"].sum())

    def requests(self, e: int = 0) -> RecordArray:
        """The REQUEST records of one fleet that have arrived (a view)."""
        return self._rooms.array(e, "req", int(self._world.fleet["next_arrival"][e, 0]))

    def pools(self, e: int = 0) -> RecordArray:
        """The POOL records of one fleet (a view)."""
        return np.asarray(self._world.pool[e])

    def token_gaps(self, e: int = 0) -> IntArray:
        """Gaps between tokens so far by the pool of the later token, shape (num_pools, len(gap_edges_s) + 1); a copy.

        Column k counts gaps of at most ``gap_edges_s[k]`` and more than the edge before; the last, those beyond all.
        """
        return np.asarray(self._world.gap_hist[e]).copy()

    def replicas(self, e: int = 0) -> RecordArray:
        """The REPLICA records of one fleet (a view)."""
        return np.asarray(self._world.rep[e])

    def cut_off(self, e: int) -> None:
        """Declare everything that has not ended unfinished (a miss)."""
        self._call(engine.CUT_OFF, np.array([e]), self._idle_decision, self._now_s)

    def result(self, e: int, timeline: dict[str, FloatArray] | None = None) -> EpisodeResult:
        """Close the books of one fleet."""
        self.cut_off(e)
        return episode_result(
            self.spec, self.requests(e), self.pools(e), float(self._now_s[e]), timeline=timeline or {}
        )


class SimFleet:
    """One simulated fleet behind the `Fleet` protocol.

    Args:
        spec: the fleet.
        workload: its traffic.
        seed: start-up times, crashes and routing.
        speed: true iteration time over the profile's.
        startup_scale: true start-up time over the spec's.
        drain_limit_s: how long after the last arrival the episode may go on until every request has ended; default the
            longest promise of any class plus ten minutes.
        gap_edges_s: see `FleetBatch`.

    The episode ends when all requests have ended; control goes on until then, and all GPU time is counted.
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
        gap_edges_s: FloatArray | None = None,
    ) -> None:
        self._batch = FleetBatch(spec, gap_edges_s=gap_edges_s)
        self._batch.load(0, workload, seed=seed, speed=speed, startup_scale=startup_scale)
        self._end_s = workload.span_s
        self._limit_s = cut_off_s(spec, workload, drain_limit_s)
        self._decision = ScalingDecision(
            spec.initial_replicas, spec.batch_limits, np.full(len(spec.classes), NEVER_REFUSE)
        )
        self._timeline = Timeline()
        self._observed: FleetState | None = None

    @property
    def spec(self) -> FleetSpec:
        """What the fleet is made of."""
        return self._batch.spec

    @property
    def batch(self) -> FleetBatch:
        """The batch of one that does the work."""
        return self._batch

    def observe(self) -> FleetState:
        """The newest telemetry."""
        if self._observed is None:
            self._observed = self._batch.observe()[0]
        return self._observed

    def apply(self, decision: ScalingDecision) -> None:
        """Set absolute targets."""
        self._decision = decision

    def advance(self) -> bool:
        """Let one control interval pass; False once every request has ended."""
        decision = self._decision
        self._timeline.record(self.observe(), decision, self._batch.ledger("missed")[0])
        self._batch.step(
            ScalingDecision(
                decision.target_replicas[None],
                decision.max_batch_size[None],
                decision.admission[None],
                decision.in_flight_limits[None],
                decision.selectivities[None],
            )
        )
        self._observed = None
        now_s = float(self._batch.now_s[0])
        left = int(self._batch.unresolved[0]) + int(self._batch.arrivals_left[0])
        return now_s < self._end_s or (left > 0 and now_s < self._limit_s)

    def result(self) -> EpisodeResult:
        """Close the books; call once, after the control loop."""
        self._batch.cut_off(0)  # before the last count of misses
        return self._batch.result(0, self._timeline.arrays(self._batch.ledger("missed")[0]))
