"""llm-d's SLO-aware autoscaling on KEDA: a control law on how near the latency tail is to its SLO.

Per pool, with n the replicas asked for, r those ready, and

    s = mean over ``smoothing_s`` of min(max(tail TTFT / SLO, tail TPOT / SLO), 2)

the law is

    s > up:    n + ceil(n (s c / up - 1)),   c = r / n while replicas are starting, else 1  ("in-flight credit")
    s < down:  n - floor(n (1 - s / down))   without the credit, so that a start-up never causes a removal
    else       n                             (hysteresis)

and an HPA applies it: growth by at most max(100 %, 4) per 60 s to the least wish of 30 s; shrinking by one per 120 s to
the largest wish of 180 s. ``down`` is ``down_share`` times ``up``.

The upstream signal is a P90; this telemetry holds p95, so the same bounds act a little earlier. Upstream maps "no data"
to 0; here only a pool known to be idle counts as 0, and a pool without latencies and with work is held.

Source: llm-d ``guides/workload-autoscaling/README.slo-aware.md``: up 0.55, down 0.40, clamp 2, smoothing 45 s, and the
HPA behaviour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from rl_autoscale.agents.base import Knob, RulePolicy, ceil_replicas
from rl_autoscale.agents.kubernetes import HpaHistory, ScalingRules
from rl_autoscale.agents.signals import Samples, slo_saturation
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision

SATURATION_CLAMP = 2.0


@dataclass(kw_only=True, eq=False)
class LlmdPolicy(RulePolicy):
    """llm-d's SLO law per pool; see the module for the rule.

    Attributes:
        up: saturation above which replicas are added.
        down_share: saturation below which they are removed, over ``up`` (0.40 / 0.55 upstream).
        smoothing_s: window of the mean.
        up_stabilisation_s: growth takes the least wish of so long.
        down_stabilisation_s: shrinking takes the largest wish of so long.
        down_replicas: replicas that may be removed per ``down_period_s``.
        down_period_s: see there.
        sync_period_s: least time between two evaluations (the HPA's 15 s).
    """

    NAME: ClassVar[str] = "llm-d"
    READS: ClassVar[str] = "ready, asked-for per pool; p95 TTFT and TPOT, in flight, queue per class"
    RULE: ClassVar[str] = "n * tail latency over SLO / up with credit for starting replicas, hysteresis, HPA behaviour"
    SOURCE: ClassVar[str] = "llm-d guides/workload-autoscaling/README.slo-aware.md"
    KNOB: ClassVar[Knob] = Knob(
        "up", (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.65, 0.8, 1.0, 1.3, 1.7), "tail latency over its SLO"
    )

    up: float = 0.55
    down_share: float = 0.40 / 0.55
    smoothing_s: float = 45.0
    up_stabilisation_s: float = 30.0
    down_stabilisation_s: float = 180.0
    down_replicas: int = 1
    down_period_s: float = 120.0
    sync_period_s: float = 15.0
    _history: list[HpaHistory] = field(default_factory=list, init=False, repr=False)
    _saturation: list[Samples] = field(default_factory=list, init=False, repr=False)
    _last_sync_s: float = field(default=-math.inf, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("up", self.up, low=0.0, high=SATURATION_CLAMP, above=True)
        self._check("down_share", self.down_share, low=0.0, high=1.0, above=True)
        self._check("down_replicas", self.down_replicas, low=1)
        for name in ("smoothing_s", "down_period_s"):
            self._check(name, getattr(self, name), low=0.0, above=True)
        for name in ("up_stabilisation_s", "down_stabilisation_s", "sync_period_s"):
            self._check(name, getattr(self, name), low=0.0)

    def reset(self, spec: FleetSpec) -> None:
        """Forget the signal, recommendations, scale events and the last sync."""
        super().reset(spec)
        up = ScalingRules(self.up_stabilisation_s, fraction=1.0, replicas=4, period_s=60.0)
        down = ScalingRules(
            self.down_stabilisation_s, fraction=0.0, replicas=int(self.down_replicas), period_s=self.down_period_s
        )
        self._history = [HpaHistory(up, down) for _ in spec.pools]
        self._saturation = [Samples(self.smoothing_s) for _ in spec.pools]
        self._last_sync_s = -math.inf

    def decide(self, state: FleetState) -> ScalingDecision:
        """Record every pool's saturation; evaluate the law if a sync is due."""
        target = self.standing_target(state)
        now_s = float(state.time_s)
        for samples, value in zip(self._saturation, slo_saturation(self.spec, state), strict=True):
            samples.add(now_s, min(float(value), SATURATION_CLAMP) if not math.isnan(value) else math.nan)
        if now_s - self._last_sync_s < self.sync_period_s - 1e-9:
            return self.decision(target)
        self._last_sync_s = now_s
        for pool, samples in enumerate(self._saturation):
            current, ready = int(target[pool]), float(state.pools.ready[pool])
            saturation = samples.mean(now_s, self.smoothing_s)
            least = max(1, int(self.spec.min_replicas[pool]))
            if current < least:
                target[pool] = least if saturation > 0 or self.spec.min_replicas[pool] > 0 else current
            elif not math.isnan(saturation) and not math.isnan(ready):
                desired = self.desired(saturation, current, int(ready))
                most = int(self.spec.max_replicas[pool])
                target[pool] = self._history[pool].next_replicas(desired, current, now_s, least=least, most=most)
        return self.decision(target)

    def desired(self, saturation: float, replicas: int, ready: int) -> int:
        """The law for one pool.

        Args:
            saturation: s.
            replicas: n, asked for, >= 1.
            ready: r.
        """
        credit = ready / replicas if 0 < ready < replicas else 1.0
        if saturation > self.up:
            return replicas + max(ceil_replicas(replicas * (saturation * credit / self.up - 1.0)), 0)
        down = self.down_share * self.up
        if saturation < down:
            return replicas - math.floor(replicas * (1.0 - saturation / down) + 1e-9)
        return replicas
