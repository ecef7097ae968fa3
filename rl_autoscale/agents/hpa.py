"""Kubernetes' Horizontal Pod Autoscaler v2 on concurrency, as documented and with its default behaviour.

The rule, per pool (each pool has an HPA of its own):

    ratio   = in-flight requests per ready replica / target
    desired = ceil(ready * ratio), or no change while |ratio - 1| <= tolerance

"In flight" is running + waiting in the engines, plus the gateway's queue, shared among the pools that may serve a
class in proportion to their ready replicas. Not-yet-ready replicas count as idle when growing: the ratio is taken
again over ready + starting, and if it then falls inside the tolerance or on the other side of 1, nothing changes.

Missing metrics: a pool whose engine metrics are missing counts as empty when growing (the queue alone may still ask
for more) and as exactly at the target when shrinking, which means that it never shrinks. Nothing known, nothing done.

Behaviour (defaults of ``autoscaling/v2``): growth at most max(100 %, 4 replicas) per 15 s, no stabilisation;
shrinking to the *largest* desired count of the last 300 s, then at most 100 % per 15 s. An HPA keeps at least one
replica.

Our one deviation: a controller sync happens on a control step, the first that is at least ``sync_period_s`` after the
last sync (with steps of 10 s every second step, hence every 20 s); between syncs the decision repeats the standing
target.

Source: Kubernetes documentation, "Horizontal Pod Autoscaling" (algorithm details, configurable scaling behaviour);
the order of stabilisation and rate limits follows ``pkg/controller/podautoscaler/horizontal.go``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy, ceil_replicas
from rl_autoscale.agents.kubernetes import SCALE_DOWN, HpaHistory
from rl_autoscale.agents.signals import queue_per_pool
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision


def desired_replicas(
    load: float, *, target: float, ready: int, unready: int, current: int, tolerance: float, partial: bool = False
) -> int:
    """The HPA's raw recommendation for one pool, before stabilisation and rate limits.

    Args:
        load: requests in flight over all ready replicas; only the known part where ``partial``.
        target: requests in flight per replica.
        ready: replicas whose load is counted, >= 1.
        unready: replicas that are still starting.
        current: replicas asked for now, returned when nothing is to change.
        tolerance: relative deviation of the ratio from 1 that is ignored.
        partial: some of the load could not be read.
    """
    ratio = load / (target * ready)
    if partial and ratio < 1.0:
        return current  # what is missing counts as at its target, and then the average is not below it
    counted = ready + (unready if ratio > 1.0 else 0)
    adjusted = load / (target * counted)
    if abs(adjusted - 1.0) <= tolerance + 1e-9 or (ratio > 1.0) != (adjusted > 1.0):
        return current
    desired = ceil_replicas(adjusted * counted)
    reversed_direction = desired < current if adjusted > 1.0 else desired > current
    return current if reversed_direction else desired


@dataclass(kw_only=True, eq=False)
class HpaPolicy(RulePolicy):
    """Kubernetes HPA v2 on requests in flight per ready replica; see the module for the rule.

    Attributes:
        target: requests in flight per replica.
        tolerance: relative deviation that is ignored (Kubernetes default 0.1).
        sync_period_s: least time between two evaluations (Kubernetes default 15 s).
        down_stabilisation_s: window of the scale-down maximum (Kubernetes default 300 s).
    """

    NAME: ClassVar[str] = "hpa"
    READS: ClassVar[str] = "ready, starting, asked-for, running, waiting per pool; gateway queue per class"
    RULE: ClassVar[str] = "ceil(ready * in-flight per replica / target), tolerance 0.1, 300 s maximum before shrinking"
    SOURCE: ClassVar[str] = "Kubernetes autoscaling/v2 documentation and defaults"
    KNOB: ClassVar[Knob] = Knob(
        "target", (6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192), "requests in flight per replica"
    )

    target: float = 40.0
    tolerance: float = 0.1
    sync_period_s: float = 15.0
    down_stabilisation_s: float = 300.0
    _history: list[HpaHistory] = field(default_factory=list, init=False, repr=False)
    _last_sync_s: float = field(default=-math.inf, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("target", self.target, low=0.0, above=True)
        self._check("tolerance", self.tolerance, low=0.0)
        self._check("sync_period_s", self.sync_period_s, low=0.0)
        self._check("down_stabilisation_s", self.down_stabilisation_s, low=0.0)

    def reset(self, spec: FleetSpec) -> None:
        """Forget recommendations, scale events and the last sync."""
        super().reset(spec)
        down = replace(SCALE_DOWN, stabilisation_s=self.down_stabilisation_s)
        self._history = [HpaHistory(down=down) for _ in spec.pools]
        self._last_sync_s = -math.inf

    def decide(self, state: FleetState) -> ScalingDecision:
        """Evaluate every pool's HPA if a sync is due, else repeat the standing targets."""
        target = self.standing_target(state)
        now_s = float(state.time_s)
        if now_s - self._last_sync_s < self.sync_period_s - 1e-9:
            return self.decision(target)
        self._last_sync_s = now_s
        queued = queue_per_pool(self.spec, state)
        for pool in range(len(target)):
            target[pool] = self._sync(pool, int(target[pool]), float(queued[pool]), state, now_s)
        return self.decision(target)

    def _sync(self, pool: int, current: int, queued: float, state: FleetState, now_s: float) -> int:
        """One evaluation of one pool's HPA."""
        least = max(1, int(self.spec.min_replicas[pool]))
        most = int(self.spec.max_replicas[pool])
        if current < least:
            return least
        ready = state.pools.ready[pool]
        engines = state.pools.running[pool] + state.pools.waiting[pool]
        known = np.array([engines, queued])
        if np.isnan(ready) or ready < 1 or np.all(np.isnan(known)):
            return current  # "did not receive metrics for targeted pods": no recommendation is recorded either
        desired = desired_replicas(
            float(np.nansum(known)),
            target=self.target,
            ready=int(ready),
            unready=int(np.nan_to_num(state.pools.starting[pool])),
            current=current,
            tolerance=self.tolerance,
            partial=bool(np.any(np.isnan(known))),
        )
        return self._history[pool].next_replicas(desired, current, now_s, least=least, most=most)
