"""What every Kubernetes HPA does after its metric: stabilisation windows and rate limits, per direction.

Used by `hpa`, and by the rules that act through an HPA (`keda`, `llm-d`).

Source: Kubernetes ``autoscaling/v2`` behaviour; the order of stabilisation and rate limits, and how changes of the
running period are counted, follow ``pkg/controller/podautoscaler/horizontal.go``.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from rl_autoscale.agents.base import ceil_replicas


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """``behavior.scaleUp`` or ``behavior.scaleDown``; of its two policies the one that allows more counts.

    Attributes:
        stabilisation_s: growth takes the least, shrinking the largest recommendation of this window.
        fraction: share of the replicas that may be added or removed per period.
        replicas: replicas that may be added or removed per period.
        period_s: of both policies.
    """

    stabilisation_s: float
    fraction: float
    replicas: int
    period_s: float = 15.0


SCALE_UP = ScalingRules(stabilisation_s=0.0, fraction=1.0, replicas=4)
"""The default: 100 % or 4 pods per 15 s, at once."""
SCALE_DOWN = ScalingRules(stabilisation_s=300.0, fraction=1.0, replicas=0)
"""The default: to the largest count of the last 300 s, then 100 % per 15 s."""


@dataclass(slots=True)
class HpaHistory:
    """What one HPA remembers: (time, desired) recommendations and (time, change) scale events."""

    up: ScalingRules = SCALE_UP
    down: ScalingRules = SCALE_DOWN
    recommendations: deque[tuple[float, int]] = field(default_factory=deque)
    events: deque[tuple[float, int]] = field(default_factory=deque)

    def stabilised(self, desired: int, current: int, now_s: float) -> int:
        """Record a recommendation; move no further than both windows agree on. The windows begin with ``current``."""
        if not self.recommendations:
            self.recommendations.append((now_s, current))
        self.recommendations.append((now_s, desired))
        longest_s = max(self.up.stabilisation_s, self.down.stabilisation_s)
        while self.recommendations[0][0] <= now_s - longest_s and len(self.recommendations) > 1:
            self.recommendations.popleft()
        least = min((n for t, n in self.recommendations if t > now_s - self.up.stabilisation_s), default=desired)
        most = max((n for t, n in self.recommendations if t > now_s - self.down.stabilisation_s), default=desired)
        return min(max(current, least), max(most, desired))

    def limited(self, desired: int, current: int, now_s: float) -> int:
        """Apply the scaling policies, counting what was already added or removed in the running periods."""
        while self.events and self.events[0][0] <= now_s - max(self.up.period_s, self.down.period_s):
            self.events.popleft()
        if desired > current:
            start = self._period_start(current, now_s, self.up.period_s)
            ceiling = max(math.ceil(start * (1.0 + self.up.fraction)), start + self.up.replicas)
            limited = min(desired, max(ceiling, current))
        else:
            start = self._period_start(current, now_s, self.down.period_s)
            floor = min(int(start * (1.0 - self.down.fraction)), start - self.down.replicas)
            limited = max(desired, min(floor, current))
        if limited != current:
            self.events.append((now_s, limited - current))
        return limited

    def _period_start(self, current: int, now_s: float, period_s: float) -> int:
        return current - sum(change for time_s, change in self.events if time_s > now_s - period_s)

    def next_replicas(self, desired: int, current: int, now_s: float, *, least: int, most: int) -> int:
        """Stabilise, bound and limit one recommendation."""
        return self.limited(min(max(self.stabilised(desired, current, now_s), least), most), current, now_s)


def average_value_replicas(total: float, *, target: float, current: int, tolerance: float) -> int:
    """The recommendation for an ``AverageValue`` metric: no change within the tolerance, else ceil(total / target).

    Args:
        total: the metric over all replicas.
        target: of the metric per replica.
        current: replicas asked for now, > 0.
        tolerance: relative deviation from the target that is ignored.
    """
    if abs(total / (target * current) - 1.0) <= tolerance + 1e-9:
        return current
    return ceil_replicas(total / target)
