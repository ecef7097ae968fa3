"""The simulated fleet: `FleetBatch` advances many in one compiled call, `SimFleet` is one of them as a `Fleet`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
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
    NUM_DRAWS,
    Timeline,
    check_workload,
    cut_off_s,
    draw_replica_times,
    draw_routing,
)
from rl_autoscale.sim.layout import (
    CANDIDATE,
    CLASS,
    FLEET,
    KV_BLOCK,
    NONE,
    POOL,
    PROMPT,
    REPLICA,
    REQUEST,
    SCHEDULER_CODES,
    TPOT_EDGES_S,
    TRACE,
    TTFT_EDGES_S,
    VLLM_PRIORITY,
    FloatArray,
    IntArray,
    RecordArray,
    World,
    next_power_of_two,
)
from rl_autoscale.sim.prefix import prefix_blocks
from rl_autoscale.sim.records import (
    class_records,
    fleet_record,
    most_candidates,
    pool_records,
    token_times,
    units_per_block,
)
from rl_autoscale.sim.result import EpisodeResult, billed_gpu_s, episode_result
from rl_autoscale.sim.schedulers.slos_plan import PLAN_PROMPT, plan_labels
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
        self._most_cached_blocks = max(pool.num_kv_blocks if pool.prefix_caching else 1 for pool in spec.pools)
        self._others = None if all(SCHEDULER_CODES[p.scheduler] <= VLLM_PRIORITY for p in spec.pools) else 1
        self._reads_hashes = spec.router == "prefix_affinity" or any(pool.prefix_caching for pool in spec.pools)
        self._gap_edges_s = gap_edges_s
        self._world = self._allocate()
        self._now_s = np.zeros(num_fleets)

    # -- memory ------------------------------------------------------------------------------------------------------

    def _allocate(self) -> World:
        spec, fleets = self.spec, self.num_fleets
        slots = [2 * pool.max_replicas for pool in spec.pools]
        num_slots, num_pools, num_classes = sum(slots), len(spec.pools), len(spec.classes)
        tree_size = next_power_of_two(max(slots))
        num_workers = 0 if spec.postprocess is None else spec.postprocess.num_workers
        # Leaves: replicas, then their links, then post-processing workers.
        event_tree_size = next_power_of_two(2 * num_slots + num_workers if spec.has_stages else num_slots)
        class_pools = np.full((num_classes + 1, num_pools), NONE, dtype=np.int64)
        for c, serving in enumerate([*(spec.pools_serving(c) for c in range(num_classes)), spec.decode_pools]):
            class_pools[c, : len(serving)] = serving
        counts_gaps = self._gap_edges_s is not None
        edges_s = np.array(self._gap_edges_s if counts_gaps else [np.inf], dtype=np.float64)
        world = World(
            trace=np.zeros((fleets, 1), dtype=TRACE),
            req=np.zeros((fleets, 1), dtype=REQUEST),
            rep=np.zeros((fleets, num_slots), dtype=REPLICA),
            pool=np.zeros((fleets, num_pools), dtype=POOL),
            cls=np.zeros((fleets, num_classes), dtype=CLASS),
            fleet=np.zeros((fleets, 1), dtype=FLEET),
            heap=np.zeros((fleets, num_slots, int(spec.batch_limits.max())), dtype=np.int64),
            residue=np.zeros((fleets, num_slots, max(units_per_block(pool) for pool in spec.pools)), dtype=np.int32),
            event_tree=np.full((fleets, 2 * event_tree_size), np.inf),
            route_tree=np.full((fleets, num_pools, 2 * tree_size), 1 << 40, dtype=np.int64),
            token_time=np.stack([token_times(spec)] * fleets),
            coefficients=np.stack([np.stack([p.hardware.attention_coefficients_s for p in spec.pools])] * fleets),
            class_pools=class_pools,
            class_order=np.argsort([item.priority for item in spec.classes], kind="stable").astype(np.int64),
            draws=np.zeros((fleets, num_pools, 4, NUM_DRAWS)),
            route_u=np.zeros((fleets, 1)),
            ttft_hist=np.zeros((fleets, num_classes, len(TTFT_EDGES_S) + 1), dtype=np.int64),
            tpot_hist=np.zeros((fleets, num_classes, len(TPOT_EDGES_S) + 1), dtype=np.int64),
            last_pool=np.zeros((fleets, num_pools), dtype=POOL),
            last_cls=np.zeros((fleets, num_classes), dtype=CLASS),
            pool_state=np.zeros((fleets, num_pools, 20)),
            class_state=np.zeros((fleets, num_classes, 18)),
            stage_state=np.zeros((fleets, 8)),
            worker=np.zeros((fleets, max(num_workers, 1)), dtype=np.int32),
            gap_edges=edges_s,
            gap_hist=np.zeros((fleets, num_pools, len(edges_s) + 1), dtype=np.int64),
            token_s=np.zeros((fleets, 1)),
            joined=np.zeros((fleets, num_slots, int(spec.batch_limits.max()) if counts_gaps else 1), dtype=np.int32),
            candidates=np.zeros((fleets, most_candidates(spec)), dtype=CANDIDATE),
            kv=np.zeros((fleets, num_slots, self._most_cached_blocks), dtype=KV_BLOCK),
            prompt=np.zeros((fleets, 1), dtype=PROMPT),
            hash_ids=np.zeros((fleets, 1), dtype=np.int64),
            table=np.zeros((fleets, 1), dtype=np.int32),
            sent_to=np.full((fleets, 1), NONE, dtype=np.int64),
            **self._plan_arrays(),
        )
        bases = np.cumsum([0, *slots[:-1]])
        for p in range(num_pools):
            world.rep["pool"][:, bases[p] : bases[p] + slots[p]] = p
        self._fixed_fleet = fleet_record(spec, event_tree_size)
        self._fixed_fleet["counts_gaps"] = counts_gaps
        self._fixed_pool = pool_records(spec, bases, slots, tree_size)
        self._fixed_class = class_records(spec)
        return world

    def _plan_arrays(self) -> dict[str, Any]:
        """Room for the dynamic programme of `slos-serve`, if a pool has it."""
        spec, fleets = self.spec, self.num_fleets
        planned = [pool.batch_limit for pool in spec.pools if pool.scheduler == "slos-serve"]
        labels = plan_labels(len(spec.tpot_tiers_s) if planned else 0)
        return {
            "periods_s": np.array(spec.tpot_tiers_s),
            "plan_prompt": np.zeros((fleets, max(planned, default=0) + 1), dtype=PLAN_PROMPT),
            "plan_count": np.stack([labels.used] * fleets),
            "plan_time": np.stack([labels.time_s] * fleets),
            "plan_context": np.stack([labels.context] * fleets),
            "plan_chosen": np.stack([labels.chosen] * fleets),
        }

    def _grow(self, num_requests: int) -> None:
        """Make room for so many requests per fleet; what is there stays."""
        old = self._world
        capacity = old.req.shape[1]
        if num_requests <= capacity:
            return
        size = max(num_requests, capacity + capacity // 2)
        req = np.empty((self.num_fleets, size), dtype=REQUEST)
        trace = np.empty((self.num_fleets, size), dtype=TRACE)
        route_u = np.zeros((self.num_fleets, size if self.spec.router == "power_of_two" else 1))
        req[:, :capacity], trace[:, :capacity] = old.req, old.trace
        route_u[:, : old.route_u.shape[1]] = old.route_u
        token_s = np.zeros((self.num_fleets, 1 if self._gap_edges_s is None else size))
        token_s[:, : old.token_s.shape[1]] = old.token_s
        self._world = old._replace(req=req, trace=trace, route_u=route_u, token_s=token_s)

    def _load_prefixes(self, e: int, workload: Workload) -> None:
        """Give the kernels the prompts' hashes and every request room for its block table."""
        blocks = prefix_blocks(workload)
        number = workload.num_requests
        tokens = workload.prompt_tokens.astype(np.int64) + workload.output_tokens
        table_offsets = np.concatenate([[0], np.cumsum(-(-tokens // BLOCK_SIZE_TOKENS))])
        old = self._world
        self._world = old._replace(
            prompt=_wider(old.prompt, number),
            hash_ids=_wider(old.hash_ids, len(blocks.hash_ids)),
            table=_wider(old.table, int(table_offsets[-1])),
            sent_to=_wider(old.sent_to, len(blocks.hash_ids)),
        )
        world = self._world
        world.hash_ids[e, : len(blocks.hash_ids)] = blocks.hash_ids
        world.prompt["hash_start"][e, :number] = blocks.hash_offsets[:-1]
        world.prompt["table_start"][e, :number] = table_offsets[:-1]
        world.prompt["num_hashes"][e, :number] = np.diff(blocks.hash_offsets)
        world.sent_to[e] = NONE
        world.prompt["num_shared"][e, :number] = blocks.num_shared
        world.fleet["blocks_per_hash"][e] = blocks.blocks_per_hash

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
            SpecError: class names differ, or a request can never fit.
        """
        spec, world = self.spec, self._world
        check_workload(spec, workload)
        self._grow(workload.num_requests)
        world = self._world
        rows = world.trace[e, : workload.num_requests]
        rows["arrival_s"] = workload.arrival_s
        rows["prompt_tokens"] = workload.prompt_tokens
        rows["output_tokens"] = workload.output_tokens
        rows["class_index"] = workload.class_index
        world.pool[e] = self._fixed_pool
        if initial_replicas is not None:
            world.pool["target"][e] = initial_replicas
        world.cls[e] = self._fixed_class
        world.cls["admission"][e] = admission
        world.fleet[e] = self._fixed_fleet
        world.fleet["num_requests"][e] = workload.num_requests
        for name in ("candidates", "plan_prompt", "plan_count", "plan_time", "plan_context", "plan_chosen"):
            getattr(world, name)[e] = 0
        world.fleet["speed"][e] = speed
        if self._reads_hashes:
            self._load_prefixes(e, workload)
            world = self._world
        world.rep["generation"][e] = 0
        world.event_tree[e] = np.inf
        world.route_tree[e] = 1 << 40
        world.ttft_hist[e] = 0
        world.tpot_hist[e] = 0
        world.gap_hist[e] = 0
        for p, pool in enumerate(spec.pools):
            world.draws[e, p] = draw_replica_times(pool, seed, startup_scale)
        if spec.router == "power_of_two":
            world.route_u[e, : workload.num_requests] = draw_routing(seed, workload.num_requests)
        world.last_pool[e] = world.pool[e]
        world.last_cls[e] = world.cls[e]
        self._call(engine.INITIALISE, np.array([e]), self._idle_decision, self._now_s)
        self._now_s[e] = 0.0

    def observe(self) -> FleetState:
        """Telemetry of all fleets, shape (num_fleets, ...); a copy."""
        world = self._world
        window_s = np.where(self._now_s > 0, self.spec.control_interval_s, 0.0)
        return FleetState(
            self._now_s.copy(),
            window_s,
            PoolTelemetry.from_matrix(world.pool_state.copy()),
            ClassTelemetry.from_matrix(world.class_state.copy()),
            StageTelemetry.from_matrix(world.stage_state.copy()) if self.spec.has_stages else None,
        )

    def step(self, decision: ScalingDecision) -> None:
        """Apply one decision per fleet and let one control interval pass, in one compiled call per thread."""
        self._now_s += self.spec.control_interval_s
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

    def _call(self, operation: int, which: IntArray, decision: ScalingDecision, until_s: FloatArray) -> None:
        engine.advance(
            self._world,
            which,
            operation,
            np.ascontiguousarray(decision.target_replicas, dtype=np.int64),
            np.ascontiguousarray(decision.max_batch_size, dtype=np.int64),
            np.ascontiguousarray(decision.admission, dtype=np.float64),
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

    def num_events(self) -> int:
        """Events handled so far, over all fleets."""
        return int(self._world.fleet["num_events"].sum())

    def requests(self, e: int = 0) -> RecordArray:
        """The REQUEST records of one fleet that have arrived (a view)."""
        return np.asarray(self._world.req[e, : int(self._world.fleet["next_arrival"][e, 0])])

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


def _wider(array: Any, size: int) -> Any:
    """The array with at least so many columns; what is there stays."""
    if array.shape[1] >= size:
        return array
    wider = np.zeros((array.shape[0], size), dtype=array.dtype)
    wider[:, : array.shape[1]] = array
    return wider


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
            ScalingDecision(decision.target_replicas[None], decision.max_batch_size[None], decision.admission[None])
        )
        self._observed = None
        now_s = float(self._batch.now_s[0])
        left = int(self._batch.unresolved[0]) + int(self._batch.arrivals_left[0])
        return now_s < self._end_s or (left > 0 and now_s < self._limit_s)

    def result(self) -> EpisodeResult:
        """Close the books; call once, after the control loop."""
        self._batch.cut_off(0)  # before the last count of misses
        return self._batch.result(0, self._timeline.arrays(self._batch.ledger("missed")[0]))
