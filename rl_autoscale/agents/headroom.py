"""Demand times a headroom factor: the strongest simple rule, and the base the learned policy's action multiplies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from rl_autoscale.agents.base import Knob, RulePolicy, ceil_replicas
from rl_autoscale.fleet.demand import DemandEstimator, overflow
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision


@dataclass(kw_only=True, eq=False)
class HeadroomPolicy(RulePolicy):
    """Hold ``ceil(headroom * demand)`` replicas, demand being the work the arriving tokens ask for.

    Demand is estimated at two time scales and the larger counts: growth follows the fast average, shrinking waits for
    the slow one. A pool one of whose classes has never been measured is held; a missing window leaves the estimate as
    it was. A pool that stands in for others is given up when those are ready (fleet/demand.py: `StandIns`).

    Attributes:
        headroom: replicas held per replica of demand at full utilisation.
        up_time_constant_s: of the average that growth follows.
        down_time_constant_s: of the average that shrinking waits for.
    """

    NAME: ClassVar[str] = "headroom"
    READS: ClassVar[str] = "arrivals, arrived prompt tokens, mean output tokens per class"
    RULE: ClassVar[str] = "ceil(headroom * max(fast, slow average of token-rate demand)), per pool"
    SOURCE: ClassVar[str] = (
        "token-rate rule: InferLine's tuner in token form (arXiv 1812.01776; course lab 'Autoscaling in Vidur'); "
        "the two time scales are ours"
    )
    KNOB: ClassVar[Knob] = Knob(
        "headroom",
        (0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0),
        "replicas per replica of demand",
    )

    headroom: float = 1.5
    up_time_constant_s: float = 30.0
    down_time_constant_s: float = 120.0
    _demand: DemandEstimator | None = field(default=None, init=False, repr=False)
    _measured: npt.NDArray[np.bool_] = field(
        default_factory=lambda: np.zeros(0, dtype=np.bool_), init=False, repr=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("headroom", self.headroom, low=0.0, above=True)
        self._check("up_time_constant_s", self.up_time_constant_s, low=0.0)
        self._check("down_time_constant_s", self.down_time_constant_s, low=0.0)

    def reset(self, spec: FleetSpec) -> None:
        """Forget the averages."""
        super().reset(spec)
        self._demand = DemandEstimator(spec, (self.up_time_constant_s, self.down_time_constant_s))
        self._measured = np.zeros(len(spec.classes), dtype=np.bool_)

    def decide(self, state: FleetState) -> ScalingDecision:
        """Scale every measured pool to its demand; hold the others."""
        return self.scale(state, self.headroom)

    def scale(self, state: FleetState, headroom: float) -> ScalingDecision:
        """Take in one observation and hold this headroom over it."""
        target = self.standing_target(state)
        demand = self._demand
        assert demand is not None  # standing_target has refused a policy that was never reset
        demand.update(state)
        known = ~np.isnan(state.classes.arrivals_per_s) & ~np.isnan(state.classes.arrived_prompt_tokens_per_s)
        self._measured |= known & bool(state.window_s > 0)
        wanted = overflow(self.spec, headroom * np.maximum(demand.replicas(0), demand.replicas(1)))
        for pool in range(len(target)):
            asking = demand.classes_asking(pool)
            if np.all(self._measured[asking if asking.any() else ...]):
                target[pool] = ceil_replicas(float(wanted[pool]))
        return self.decision(self.stand_ins.keep(target, state))
