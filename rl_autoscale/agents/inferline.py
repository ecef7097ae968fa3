"""InferLine's tuner in token form: provision for the largest recent rate of work.

Work is counted in replica-seconds (prompt tokens and generated tokens, each at its price in the latency profile), since
requests of an LLM differ too much to count alike. Per pool, with w(t) the work that arrived per second in each window
of the traffic:

    grow, at once:      ceil(max of w over windows of ``window_up_s`` in the last ``look_back_up_s`` / utilisation)
    shrink, if nothing changed for ``stabilisation_s``:
                        ceil(max of w over windows of ``window_down_s`` in the last ``look_back_down_s`` / utilisation)

``utilisation`` is InferLine's provisioned ratio: planned work over capacity. The planner of the paper finds it by
simulating a sample trace; here it is the knob. Of the paper's envelope only one window length is kept, because without
a planned envelope to compare with the shortest window always has the largest rate.

Output tokens of a request that has just arrived are taken as the mean of finished ones. A missing reading is left out
of the windows; a pool whose look-back holds none is held.

Source: Crankshaw et al., InferLine, SoCC 2020 (arXiv 1812.01776), tuner: at once up, 15 s between changes, 30 s in 5 s
windows down (constants from memory); token form with windows and look-backs of its own per direction: public course lab
"Autoscaling in Vidur". A control step (10 s by default) is the shortest window here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy, ceil_replicas
from rl_autoscale.agents.signals import Samples
from rl_autoscale.fleet.demand import DemandEstimator, overflow
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision


def largest_window_mean(readings: list[float], num_readings: int) -> float:
    """Largest mean of so many consecutive readings (of all, while there are fewer); NaN without readings."""
    if not readings:
        return math.nan
    span = min(max(num_readings, 1), len(readings))
    return max(sum(readings[k : k + span]) / span for k in range(len(readings) - span + 1))


@dataclass(kw_only=True, eq=False)
class InferlinePolicy(RulePolicy):
    """InferLine's tuner on token work per pool; see the module for the rule.

    Attributes:
        utilisation: provisioned ratio, planned work over capacity at full batches.
        window_up_s: window whose rate growth follows.
        look_back_up_s: how long a peak keeps replicas from growing less.
        window_down_s: window whose rate shrinking follows.
        look_back_down_s: how long a peak keeps replicas from shrinking.
        stabilisation_s: least time between a change and a removal.
    """

    NAME: ClassVar[str] = "inferline"
    READS: ClassVar[str] = "arrivals, arrived prompt tokens, mean output tokens per class"
    RULE: ClassVar[str] = "ceil(largest recent work rate / utilisation); up at once, down to the look-back's maximum"
    SOURCE: ClassVar[str] = (
        "InferLine, SoCC 2020 (arXiv 1812.01776), tuner; token form of the lab 'Autoscaling in Vidur'"
    )
    KNOB: ClassVar[Knob] = Knob(
        "utilisation",
        (0.25, 0.35, 0.45, 0.55, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0, 1.15, 1.3),
        "planned share of a replica's full-batch capacity",
    )

    utilisation: float = 0.7
    window_up_s: float = 20.0
    look_back_up_s: float = 80.0
    window_down_s: float = 20.0
    look_back_down_s: float = 80.0
    stabilisation_s: float = 15.0
    _demand: DemandEstimator | None = field(default=None, init=False, repr=False)
    _work: list[Samples] = field(default_factory=list, init=False, repr=False)
    _last_change_s: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("utilisation", "window_up_s", "look_back_up_s", "window_down_s", "look_back_down_s"):
            self._check(name, getattr(self, name), low=0.0, above=True)
        self._check("stabilisation_s", self.stabilisation_s, low=0.0)

    def reset(self, spec: FleetSpec) -> None:
        """Forget the envelope and the last changes."""
        super().reset(spec)
        self._demand = DemandEstimator(spec, (0.0,))
        keep_s = max(self.look_back_up_s, self.look_back_down_s)
        self._work = [Samples(keep_s) for _ in spec.pools]
        self._last_change_s = [-math.inf for _ in spec.pools]

    def decide(self, state: FleetState) -> ScalingDecision:
        """Tune every measured pool; hold the others."""
        target = self.standing_target(state)
        demand, now_s = self._demand, float(state.time_s)
        assert demand is not None  # standing_target has refused a policy that was never reset
        demand.update(state)
        arrivals, prompts = state.classes.arrivals_per_s, state.classes.arrived_prompt_tokens_per_s
        seen = ~np.isnan(arrivals) & ~np.isnan(prompts) & bool(state.window_s > 0)
        work = overflow(self.spec, demand.replicas(0), self.utilisation * self.spec.max_replicas)
        for pool, samples in enumerate(self._work):
            if np.all(seen[demand.classes_asking(pool)]) and state.window_s > 0:
                samples.add(now_s, float(work[pool]))
            wanted = self._tuned(samples, int(target[pool]), pool, now_s)
            if wanted != target[pool]:
                self._last_change_s[pool], target[pool] = now_s, wanted
        return self.decision(target)

    def _tuned(self, work: Samples, current: int, pool: int, now_s: float) -> int:
        step_s = self.spec.control_interval_s
        up = largest_window_mean(work.last(now_s, self.look_back_up_s), round(self.window_up_s / step_s))
        down = largest_window_mean(work.last(now_s, self.look_back_down_s), round(self.window_down_s / step_s))
        if not math.isnan(up) and ceil_replicas(up / self.utilisation) > current:
            return ceil_replicas(up / self.utilisation)
        if math.isnan(down) or now_s - self._last_change_s[pool] < self.stabilisation_s - 1e-9:
            return current
        return min(current, ceil_replicas(down / self.utilisation))
