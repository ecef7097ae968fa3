"""Demand times a headroom factor, forecast over the start-up time: `headroom` with a view ahead."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy, ceil_replicas
from rl_autoscale.agents.holt_winters import HoltWinters
from rl_autoscale.fleet.demand import DemandEstimator, overflow
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision

SEASON_SLOT_S = 600.0
"""Resolution of a season: ten minutes, the window in which ServeGen states rates."""


@dataclass(kw_only=True, eq=False)
class HeadroomForecastPolicy(RulePolicy):
    """Hold ``ceil(headroom * demand)``, demand being the largest expected until a replica asked for now would serve.

    The work that arrives per second (`fleet.demand`) is smoothed per class by Holt-Winters with a damped trend, and
    with a season where ``season_s`` is given; the forecast over one start-up time and one control step counts, at least
    the level of now. A pool none of whose classes has been measured is held; a missing window leaves the series as it
    was.

    Attributes:
        headroom: replicas held per replica of expected demand at full utilisation.
        level_time_constant_s: of the level; alpha = 1 - exp(-step / constant).
        trend_time_constant_s: of the trend; beta likewise.
        trend_damping: share of the trend that is left after one start-up time (phi per step is its root).
        season_s: length of a season, for example 86400; 0: none.
        season_weight: gamma, weight of the newest season.
    """

    NAME: ClassVar[str] = "headroom-forecast"
    READS: ClassVar[str] = "arrivals, arrived prompt tokens, mean output tokens per class"
    RULE: ClassVar[str] = "ceil(headroom * largest demand that Holt-Winters expects over one start-up), per pool"
    SOURCE: ClassVar[str] = "ours: the token-rate rule with Holt-Winters (Hyndman and Athanasopoulos, sections 8.2-8.3)"
    KNOB: ClassVar[Knob] = Knob(
        "headroom",
        (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0),
        "replicas per replica of expected demand",
    )

    headroom: float = 1.5
    level_time_constant_s: float = 30.0
    trend_time_constant_s: float = 120.0
    trend_damping: float = 0.5
    season_s: float = 0.0
    season_weight: float = 0.1
    _demand: DemandEstimator | None = field(default=None, init=False, repr=False)
    _series: list[HoltWinters] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("headroom", "level_time_constant_s", "trend_time_constant_s"):
            self._check(name, getattr(self, name), low=0.0, above=True)
        self._check("trend_damping", self.trend_damping, low=0.0, high=1.0)
        self._check("season_s", self.season_s, low=0.0)
        self._check("season_weight", self.season_weight, low=0.0, high=1.0)

    def reset(self, spec: FleetSpec) -> None:
        """Forget the series."""
        super().reset(spec)
        self._demand = DemandEstimator(spec, (0.0,))
        step_s = spec.control_interval_s
        self._series = [
            HoltWinters(
                alpha=1.0 - math.exp(-step_s / self.level_time_constant_s),
                beta=1.0 - math.exp(-step_s / self.trend_time_constant_s),
                phi=self.trend_damping ** (1.0 / self._horizon_steps(int(pool))),
                gamma=self.season_weight,
                num_slots=math.ceil(self.season_s / SEASON_SLOT_S),
                steps_per_slot=max(1, round(SEASON_SLOT_S / step_s)),
            )
            for pool in self._demand.work_pool
        ]

    def _horizon_steps(self, pool: int) -> int:
        """Steps until a replica asked for now has served for one step."""
        return math.ceil(self.spec.pools[pool].startup_mean_s / self.spec.control_interval_s) + 1

    def decide(self, state: FleetState) -> ScalingDecision:
        """Scale every measured pool to its expected demand; hold the others."""
        target = self.standing_target(state)
        demand = self._demand
        assert demand is not None  # standing_target has refused a policy that was never reset
        demand.update(state)
        arrivals, prompts = state.classes.arrivals_per_s, state.classes.arrived_prompt_tokens_per_s
        seen = (~np.isnan(arrivals) & ~np.isnan(prompts) & bool(state.window_s > 0))[demand.work_class]
        for series, value in zip(self._series, np.where(seen, demand.work_replicas(0), np.nan), strict=True):
            series.update(float(value))
        wanted, known = np.zeros(len(target)), np.ones(len(target), dtype=np.bool_)
        for pool in range(len(target)):
            served = [series for series, p in zip(self._series, demand.work_pool, strict=True) if p == pool]
            if any(math.isnan(series.level) for series in served or self._series):
                known[pool] = False
                continue
            expected = np.zeros(self._horizon_steps(pool) + 1)
            for series in served:
                expected += np.concatenate(([series.level], series.forecast(len(expected) - 1))).clip(min=0.0)
            wanted[pool] = self.headroom * float(expected.max())
        for pool, replicas in enumerate(overflow(self.spec, wanted)):
            if known[pool]:
                target[pool] = ceil_replicas(float(replicas))
        return self.decision(self.stand_ins.keep(target, state))
