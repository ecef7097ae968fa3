"""KEDA on queue length: two triggers, an HPA behind them, and a cool-down before the last replica goes.

Per pool (each pool has a ScaledObject of its own), the HPA that KEDA makes has two external metrics of type
``AverageValue`` and takes the larger recommendation:

    ceil(queued / queue)       queued  = the gateway's queue (shared by ready replicas) + waiting in the engines
    ceil(running / running)    running = in engine batches

An HPA cannot go below one replica; KEDA itself turns a pool off and on: from zero to one as soon as a trigger is active
(above its activation threshold of 0), to zero after ``cooldown_s`` without activity. That happens only where the pool
may have no replicas.

A queue alone is a poor signal for LLM engines, which take whatever fits their batch and hardly queue before latency is
lost; therefore the deployments below put running requests beside it, and so does this.

Missing metrics: growth follows what is known; a pool with a metric missing does not shrink; with nothing known nothing
is done (Kubernetes, several metrics).

Source: KEDA documentation (activation, cool-down 300 s, the HPA behind); llm-d,
``guides/workload-autoscaling/keda-epp-queue``: both triggers, running 16, cool-down, HPA behaviour. Our default of 5
for the queue is what vLLM deployments commonly use; llm-d's own is 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy
from rl_autoscale.agents.kubernetes import SCALE_DOWN, HpaHistory, average_value_replicas
from rl_autoscale.agents.signals import queue_per_pool
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision


@dataclass(kw_only=True, eq=False)
class KedaPolicy(RulePolicy):
    """KEDA with a queue trigger and a running-requests trigger; see the module for the rule.

    Attributes:
        running: requests in the engine batch per replica.
        queue: requests waiting per replica.
        tolerance: relative deviation that the HPA ignores.
        sync_period_s: least time between two evaluations (the HPA's 15 s).
        down_stabilisation_s: window of the scale-down maximum.
        cooldown_s: without activity for so long, a pool that may have no replicas goes to zero.
    """

    NAME: ClassVar[str] = "keda"
    READS: ClassVar[str] = "ready, asked-for, running, waiting per pool; gateway queue per class"
    RULE: ClassVar[str] = (
        "max of ceil(queued / queue) and ceil(running / running), HPA behaviour, zero after a cool-down"
    )
    SOURCE: ClassVar[str] = "KEDA documentation; llm-d guides/workload-autoscaling/keda-epp-queue"
    KNOB: ClassVar[Knob] = Knob(
        "running", (4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192), "requests running per replica"
    )

    running: float = 16.0
    queue: float = 5.0
    tolerance: float = 0.1
    sync_period_s: float = 15.0
    down_stabilisation_s: float = 300.0
    cooldown_s: float = 300.0
    _history: list[HpaHistory] = field(default_factory=list, init=False, repr=False)
    _last_active_s: list[float] = field(default_factory=list, init=False, repr=False)
    _last_sync_s: float = field(default=-math.inf, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("running", self.running, low=0.0, above=True)
        self._check("queue", self.queue, low=0.0, above=True)
        for name in ("tolerance", "sync_period_s", "down_stabilisation_s", "cooldown_s"):
            self._check(name, getattr(self, name), low=0.0)

    def reset(self, spec: FleetSpec) -> None:
        """Forget recommendations, scale events, activity and the last sync."""
        super().reset(spec)
        down = replace(SCALE_DOWN, stabilisation_s=self.down_stabilisation_s)
        self._history = [HpaHistory(down=down) for _ in spec.pools]
        self._last_active_s = [math.nan for _ in spec.pools]
        self._last_sync_s = -math.inf

    def decide(self, state: FleetState) -> ScalingDecision:
        """Evaluate every pool if a sync is due, else repeat the standing targets."""
        target = self.standing_target(state)
        now_s = float(state.time_s)
        if now_s - self._last_sync_s < self.sync_period_s - 1e-9:
            return self.decision(target)
        self._last_sync_s = now_s
        queued = queue_per_pool(self.spec, state) + state.pools.waiting
        for pool in range(len(target)):
            totals = np.array([float(queued[pool]), float(state.pools.running[pool])])
            target[pool] = self._sync(pool, int(target[pool]), totals, now_s)
        return self.decision(target)

    def _sync(self, pool: int, current: int, totals: np.ndarray, now_s: float) -> int:
        """One evaluation of one pool; ``totals`` are the queued and the running requests."""
        known = ~np.isnan(totals)
        if (totals[known] > 0).any() or not known.all() or math.isnan(self._last_active_s[pool]):
            self._last_active_s[pool] = now_s
        may_be_off = self.spec.min_replicas[pool] == 0
        if may_be_off and now_s - self._last_active_s[pool] >= self.cooldown_s:
            return 0
        least = max(1, int(self.spec.min_replicas[pool]))
        if current < least:
            active = bool((totals[known] > 0).any())
            return least if active or not may_be_off else current
        if not known.any():
            return current
        targets = (self.queue, self.running)
        desired = max(
            average_value_replicas(float(total), target=target, current=current, tolerance=self.tolerance)
            for total, target, seen in zip(totals, targets, known, strict=True)
            if seen
        )
        if desired < current and not known.all():
            return current
        most = int(self.spec.max_replicas[pool])
        return self._history[pool].next_replicas(desired, current, now_s, least=least, most=most)
