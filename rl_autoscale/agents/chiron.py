"""Chiron, rebuilt: hierarchical autoscaling from backpressure, in three variants.

**Our rebuild of Chiron** (Patke et al., "Hierarchical Autoscaling for Large Language Model Serving with Chiron", arXiv
2501.08090v1). Its code is not public, and parts of the rule are known only through others' rebuilds; each file says
line by line what is the paper's and what is ours. Never compare these numbers with the paper's own.

One tick, in order (the order is ours):

1. local loop: the batch cap B of every pool (`chiron_local`, paper section 4.1, Algorithm 1);
2. interactive loop: IBP against Theta sizes the interactive and mixed pools together (`chiron_interactive`, sections
   5.1-5.2);
3. batch loop: the fewest batch instances that keep the queue's deadlines, none when idle (`chiron_groups`, section 5).

Without a batch pool, batch instances are extra replicas of the first mixed pool, counted apart, so that the interactive
loop does not take them away. Missing or stale telemetry is not idleness: while any pool of a loop is unreadable, that
loop may add but not remove (one rebuild's rule). GPU budget and its priority (interactive first) are the shield's.
Preferential routing, eviction and the reclaim of draining replicas are the fleet's, the same for every policy.

| variant | step | TBP | dead band h | wait between downs |
|---|---|---|---|---|
| `chiron-literal` | +-1 | ungated, single ticks | none | none |
| `chiron-robust`, `chiron-tuned` | to N* | gated, smoothed | 0.25 | one load time |

`chiron-tuned` is the robust form with theta, dead_band, z and load_time_s taken from a tuning result on training
traces (its defaults are the robust ones until a result is passed in). A tick is a control step: 10 s by default,
where the rebuilds use one to five seconds for the local loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy
from rl_autoscale.agents.chiron_batch import BatchLoop
from rl_autoscale.agents.chiron_interactive import THETA, busy_instances, split_total, target_step, unit_step
from rl_autoscale.agents.chiron_local import LITERAL_FORM, ROBUST_FORM, BoolArray, LocalForm, LocalLoop
from rl_autoscale.fleet.spec import FleetSpec, IntArray
from rl_autoscale.fleet.state import FleetState, FloatArray, ScalingDecision

StepRule = Callable[[float, int, float, float], int]
"""(busy, total, theta, dead_band) -> new total."""


@dataclass(kw_only=True, eq=False)
class _Chiron(RulePolicy):
    """What the three variants share; see the module for the rule.

    Attributes:
        theta: over-provisioning level, 1 / spike factor over a load time.
        dead_band: h; interactive capacity is removed only from above ceil(busy / (theta (1 - h))).
        z: normal quantile of the batch wait bound; 1.645 is 95 % (unknown in the paper).
        load_time_s: instance load time; None takes the pool's mean start-up time.
        down_wait_s: least time between two removals, and before the first; None takes the load time.
        initial_batch: B before the first tick (unknown in the paper; rebuilds use 20 and 256).
        output_cv: standard deviation over mean of output lengths in the wait bound; ours.
        stale_after_s: telemetry older than this is missing; ours.
    """

    READS: ClassVar[str] = (
        "ITL, generated tokens, in flight (interactive part), busy_interactive, ready, starting per pool; arrivals, "
        "queue, oldest wait, in flight, mean output tokens per class"
    )
    SOURCE: ClassVar[str] = "our rebuild of Chiron, arXiv 2501.08090v1, sections 4.1, 5.1-5.2, 5; QLM, arXiv 2407.00047"
    KNOB: ClassVar[Knob] = Knob(
        "theta",
        (0.1, 0.15, 0.2, 0.25, 0.3, THETA, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "interactive busy share at which instances are added",
    )
    FORM: ClassVar[LocalForm]
    STEP: ClassVar[StepRule]

    theta: float = THETA
    dead_band: float = 0.25
    z: float = 1.645
    load_time_s: float | None = None
    down_wait_s: float | None = None
    initial_batch: float = 64.0
    output_cv: float = 1.0
    stale_after_s: float = 30.0
    _local: LocalLoop | None = field(default=None, init=False, repr=False)
    _batch: BatchLoop | None = field(default=None, init=False, repr=False)
    _extra_for_batch: int = field(default=0, init=False, repr=False)
    _last_down_s: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("theta", self.theta, low=0.0, high=1.0, above=True)
        self._check("dead_band", self.dead_band, low=0.0, high=0.95)
        self._check("z", self.z, low=0.0)
        self._check("initial_batch", self.initial_batch, low=1.0)
        self._check("output_cv", self.output_cv, low=0.0)
        self._check("stale_after_s", self.stale_after_s, low=0.0, above=True)
        for name in ("load_time_s", "down_wait_s"):
            if getattr(self, name) is not None:
                self._check(name, getattr(self, name), low=0.0)

    def reset(self, spec: FleetSpec) -> None:
        """Forget every loop's memory."""
        super().reset(spec)
        self._local = LocalLoop(self.FORM, self.batch_ceiling().astype(np.float64), self.initial_batch)
        self._batch = BatchLoop(spec, z=self.z, output_cv=self.output_cv)
        self._extra_for_batch = 0
        self._last_down_s = None

    def decide(self, state: FleetState) -> ScalingDecision:
        """One tick of the local loop, the interactive loop and the batch loop."""
        spec, target = self.spec, self.standing_target(state)
        assert self._local is not None  # standing_target and spec have refused a policy that was never reset
        assert self._batch is not None
        if self._last_down_s is None:
            self._last_down_s = float(state.time_s)  # a fleet that has only just been seen is not over-provisioned
        readable = ~(np.isnan(state.pools.ready) | np.isnan(state.pools.in_flight_interactive))
        readable &= ~(state.pools.age_s > self.stale_after_s)
        if spec.router == "packing":
            readable &= ~np.isnan(state.pools.busy_interactive)
        batch_cap = self._local.step(spec, state, readable)
        self._batch.observe(state, batch_cap, readable)
        target = self._interactive(state, target, batch_cap, readable)
        target = self._batch_instances(state, target, batch_cap, self._batch)
        return self.decision(target, np.floor(batch_cap).astype(np.int64))

    def _interactive(
        self, state: FleetState, asked_for: IntArray, batch_cap: FloatArray, readable: BoolArray
    ) -> IntArray:
        """Resize interactive and mixed pools; removal waits ``down_wait_s`` and needs every pool readable."""
        spec = self.spec
        pools = [p for p, pool in enumerate(spec.pools) if pool.role in ("interactive", "mixed")]
        kinds = [service_class.kind for service_class in spec.classes]
        if not pools or "interactive" not in kinds:
            return asked_for
        self._extra_for_batch = min(self._extra_for_batch, max(0, int(asked_for[pools].sum()) - 1))
        total = int(asked_for[pools].sum()) - self._extra_for_batch
        busy = busy_instances(spec, state, pools, batch_cap)
        wanted = type(self).STEP(busy, total, self.theta, self.dead_band)
        if wanted < total:
            now_s = float(state.time_s)
            wait_s = self._load_s(pools[0]) if self.down_wait_s is None else self.down_wait_s
            blind = not readable[pools].all() or self._queue_unknown(state, "interactive")
            blind |= not state.window_s > 0
            if blind or now_s - (self._last_down_s or 0.0) < wait_s - 1e-9:
                return asked_for
            self._last_down_s = now_s
        return split_total(wanted + self._extra_for_batch, busy, asked_for, spec, pools)

    def _batch_instances(
        self, state: FleetState, target: IntArray, batch_cap: FloatArray, batch: BatchLoop
    ) -> IntArray:
        """Add what the deadlines need; drop every batch instance when no batch request is left."""
        if not batch.classes:
            return target
        pools = [p for p, pool in enumerate(self.spec.pools) if pool.role == "batch"]
        home = self.spec.pools_serving(batch.classes[0])[0]
        target = target.copy()
        if batch.idle(state):
            target[pools] = self.spec.min_replicas[pools]
            if not pools:
                target[home] -= self._extra_for_batch
                self._extra_for_batch = 0
            return target
        planned = max(0, int(target[home] - self.standing_target(state)[home]))
        loading = planned + int(np.nan_to_num(state.pools.starting[home]))
        added = batch.plan(state, batch_cap, home, load_time_s=self._load_s(home), loading=loading).instances
        added = min(added, max(0, int(self.spec.max_replicas[home] - target[home])))
        target[home] += added
        if not pools:
            self._extra_for_batch += added
        return target

    def _load_s(self, pool: int) -> float:
        return self.spec.pools[pool].startup_mean_s if self.load_time_s is None else self.load_time_s

    def _queue_unknown(self, state: FleetState, kind: str) -> bool:
        of_kind = [c for c, service_class in enumerate(self.spec.classes) if service_class.kind == kind]
        return bool(np.isnan(state.classes.queue_length[of_kind]).any())


@dataclass(kw_only=True, eq=False)
class ChironLiteralPolicy(_Chiron):
    """The published rule taken at its word: one instance per tick, ungated throughput backpressure, no dead band."""

    NAME: ClassVar[str] = "chiron-literal"
    RULE: ClassVar[str] = "+-1 on IBP against Theta; Algorithm 1 ungated; request groups with QLM's bound"
    FORM: ClassVar[LocalForm] = LITERAL_FORM
    STEP: ClassVar[StepRule] = staticmethod(unit_step)

    dead_band: float = 0.0
    down_wait_s: float | None = 0.0


@dataclass(kw_only=True, eq=False)
class ChironRobustPolicy(_Chiron):
    """The rule without its known defects: straight to N*, a dead band, a gate on throughput backpressure."""

    NAME: ClassVar[str] = "chiron-robust"
    RULE: ClassVar[str] = "to N* = ceil(busy / Theta), dead band; Algorithm 1 gated; request groups with QLM's bound"
    FORM: ClassVar[LocalForm] = ROBUST_FORM
    STEP: ClassVar[StepRule] = staticmethod(target_step)


@dataclass(kw_only=True, eq=False)
class ChironTunedPolicy(_Chiron):
    """The robust form with its constants from a tuning result on training traces, passed as knobs."""

    NAME: ClassVar[str] = "chiron-tuned"
    RULE: ClassVar[str] = "as chiron-robust, with theta, dead_band, z and load_time_s tuned on training traces"
    FORM: ClassVar[LocalForm] = ROBUST_FORM
    STEP: ClassVar[StepRule] = staticmethod(target_step)
