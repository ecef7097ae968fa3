"""AIBrix's application-specific pod autoscaler (APA): a ratio with tolerances of its own in each direction.

Per pool, with u the use per ready replica and n the replicas asked for:

    u / target > 1 + up_tolerance      -> min(ceil(n u / target), ceil(2 n))
    u / target < 1 - down_tolerance    -> max(ceil(n u / target), floor(n / 2))
    otherwise n

and, because u is measured on ready replicas only, AIBrix's guard while replicas are pending: growing, they count as
replicas without use (never below n, never above the answer without the guard); shrinking, as replicas at the target.
Shrinking waits for the largest answer of ``down_cooldown_s``.

Use is outstanding requests per replica, or KV-cache use (0..1), AIBrix's own example. A reading that is missing changes
nothing.

Source: vllm-project/aibrix ``pkg/controller/podautoscaler/algorithm/apa.go``, ``context/context.go`` (tolerances 0.1,
rates 2, cool-down 300 s down and none up), ``autoscaler.go`` (pending guard). That the cool-down is a window maximum is
our reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy, ceil_replicas
from rl_autoscale.agents.signals import Samples, outstanding_per_pool
from rl_autoscale.fleet.errors import SpecError, did_you_mean
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision

MAX_SCALE_RATE = 2.0
METRICS = ("concurrency", "kv_usage")


@dataclass(kw_only=True, eq=False)
class ApaPolicy(RulePolicy):
    """AIBrix's APA per pool; see the module for the rule.

    Attributes:
        target: use per replica: outstanding requests, or a fraction with ``metric="kv_usage"``.
        up_tolerance: relative excess that is ignored.
        down_tolerance: relative shortfall that is ignored.
        down_cooldown_s: window of the scale-down maximum.
        metric: ``concurrency`` or ``kv_usage``.
    """

    NAME: ClassVar[str] = "apa"
    READS: ClassVar[str] = "ready, asked-for, running, waiting (or KV use) per pool; gateway queue per class"
    RULE: ClassVar[str] = (
        "ceil(n * use / target) outside the tolerances, at most doubled or halved; pending replicas count"
    )
    SOURCE: ClassVar[str] = "AIBrix apa.go, context.go, autoscaler.go"
    KNOB: ClassVar[Knob] = Knob("target", (6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192), "use per replica")

    target: float = 40.0
    up_tolerance: float = 0.1
    down_tolerance: float = 0.1
    down_cooldown_s: float = 300.0
    metric: str = "concurrency"
    _answers: list[Samples] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("target", self.target, low=0.0, above=True)
        self._check("up_tolerance", self.up_tolerance, low=0.0)
        self._check("down_tolerance", self.down_tolerance, low=0.0, high=1.0)
        self._check("down_cooldown_s", self.down_cooldown_s, low=0.0)
        if self.metric not in METRICS:
            raise SpecError(
                f"policy 'apa': metric={self.metric!r} is not allowed{did_you_mean(str(self.metric), METRICS)}; "
                f"it must be one of {', '.join(METRICS)}"
            )

    def reset(self, spec: FleetSpec) -> None:
        """Forget past answers."""
        super().reset(spec)
        self._answers = [Samples(self.down_cooldown_s) for _ in spec.pools]

    def decide(self, state: FleetState) -> ScalingDecision:
        """One reconciliation of every pool's APA."""
        target = self.standing_target(state)
        ready = state.pools.ready
        if self.metric == "kv_usage":
            use = state.pools.kv_usage
        else:
            use = outstanding_per_pool(self.spec, state) / np.maximum(ready, 1.0)
        for pool, answers in enumerate(self._answers):
            current, now_s = int(target[pool]), float(state.time_s)
            if np.isnan(use[pool]) or np.isnan(ready[pool]):
                continue
            if not answers.samples:
                answers.add(now_s, current)
            least = max(1, int(self.spec.min_replicas[pool]))
            wanted = least if current < least else self.desired(float(use[pool]), current, int(ready[pool]))
            answers.add(now_s, wanted)
            largest = int(max([wanted, *answers.last(now_s, self.down_cooldown_s)]))
            target[pool] = max(wanted if wanted >= current else min(current, largest), least)
        return self.decision(target)

    def desired(self, use: float, current: int, ready: int) -> int:
        """The answer for one pool before the cool-down.

        Args:
            use: per ready replica.
            current: replicas asked for, >= 1.
            ready: replicas the use was measured on.
        """
        ratio = use / self.target
        if ratio > 1.0 + self.up_tolerance:
            answer = min(ceil_replicas(current * ratio), math.ceil(MAX_SCALE_RATE * current))
        elif ratio < 1.0 - self.down_tolerance:
            answer = max(ceil_replicas(current * ratio), math.floor(current / MAX_SCALE_RATE))
        else:
            return current
        pending = current - min(ready, current)
        if pending == 0:
            return answer
        if answer > current:
            return min(max(ceil_replicas(ready * ratio), current), answer)
        return max(min(ceil_replicas(ready * ratio + pending), current), answer)
