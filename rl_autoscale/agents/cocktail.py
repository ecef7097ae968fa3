"""Cocktail: a forecast of all traffic, shared out by importance, filled with the cheapest hardware per request.

Once per ``interval_s``, in requests per second:

    1. forecast  the busiest window of the last interval feeds a forecaster; the largest value expected until a replica
                 asked for now has served for one interval, times ``headroom`` (1.2)
    2. importance  each tier of pools gets the share of the forecast that its classes had of the last interval's
                 requests: popular models scale first
    3. plan      where a tier's replicas carry less: add, one at a time, the pool with the least
                 price (span + 180 s) / (requests it would take over in a span of 60 s); where they carry more: take
                 away the dearest per request while the rest carries the forecast
    4. removal   only what exceeds the largest of the last six plans, pool by pool

Source: Gunasekaran et al., Cocktail, NSDI 2022 (arXiv 2106.05345) and its released code (built on MArk): headroom 1.2,
two minutes of warm-up, launch cost of 180 s of price, span 60 s, six plans. Its forecaster is a DeepAR-like network
trained on the trace; here Holt's damped trend stands in (as in `headroom-forecast`), which needs no training and knows
no quantiles, so ours will miss bursts that a trained one has learned to expect. The code counts arrivals in windows of
5 s; a control step is the window here. Its importance is a model's served requests over those of the most popular
model, because every request visits several models; here the shares sum to one, which for an ensemble is the same.

Ensembles are experiments/ensembles.py: which models vote, and a workload in which every request visits each of them.
Left out: the fall-back on spot instances, which is the pool's ``spot``.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy
from rl_autoscale.agents.holt_winters import HoltWinters
from rl_autoscale.agents.tiers import RecentTraffic, Tier, price_per_replica_hour, replica_rates_per_s, tiers_of
from rl_autoscale.fleet.spec import FleetSpec, IntArray
from rl_autoscale.fleet.state import FleetState, FloatArray, ScalingDecision

SPAN_S, LAUNCH_COST_S, PLANS_KEPT, WARM_UP_S = 60.0, 180.0, 6, 120.0
LEVEL_WEIGHT, TREND_WEIGHT, TREND_DAMPING = 0.8, 0.3, 0.9
"""Of the forecaster, per interval; ours, the first two as in the Dynamo planner's."""


@dataclass(kw_only=True, eq=False)
class CocktailPolicy(RulePolicy):
    """Cocktail's provisioning over the pools of a fleet; see the module for the rule.

    Attributes:
        headroom: planned over forecast.
        interval_s: between two plans.
        trend_weight: of the newest change in the forecaster's trend; 0 forecasts the level.
    """

    NAME: ClassVar[str] = "cocktail"
    READS: ClassVar[str] = "asked-for per pool; arrivals, arrived prompt tokens, mean output tokens per class"
    RULE: ClassVar[str] = "forecast x 1.2, shared by importance, cheapest per request first; down to six plans' max"
    SOURCE: ClassVar[str] = "Cocktail, NSDI 2022 (arXiv 2106.05345) and its code; Holt's trend for its network"
    KNOB: ClassVar[Knob] = Knob(
        "headroom", (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.2, 2.8, 3.6), "planned over forecast requests"
    )

    headroom: float = 1.2
    interval_s: float = 60.0
    trend_weight: float = TREND_WEIGHT
    _tiers: list[Tier] = field(default_factory=list, init=False, repr=False)
    _traffic: RecentTraffic | None = field(default=None, init=False, repr=False)
    _series: HoltWinters | None = field(default=None, init=False, repr=False)
    _plans: deque[IntArray] = field(default_factory=deque, init=False, repr=False)
    _first_s: float = field(default=math.nan, init=False, repr=False)
    _last_s: float = field(default=math.nan, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("headroom", self.headroom, low=0.0, above=True)
        self._check("interval_s", self.interval_s, low=0.0, above=True)
        self._check("trend_weight", self.trend_weight, low=0.0, high=1.0)

    def reset(self, spec: FleetSpec) -> None:
        """Forget traffic, forecasts and plans."""
        super().reset(spec)
        self._tiers = tiers_of(spec)
        self._traffic = RecentTraffic(spec, self.interval_s)
        self._series = HoltWinters(alpha=LEVEL_WEIGHT, beta=self.trend_weight, phi=TREND_DAMPING)
        self._plans = deque(maxlen=PLANS_KEPT)
        self._first_s = self._last_s = math.nan

    def decide(self, state: FleetState) -> ScalingDecision:
        """Plan once per interval, after the warm-up; hold otherwise."""
        target, now_s = self.standing_target(state), float(state.time_s)
        assert self._traffic is not None  # standing_target has refused a policy that was never reset
        assert self._series is not None
        self._traffic.observe(state)
        if math.isnan(self._first_s):
            self._first_s = self._last_s = now_s
        if now_s - self._last_s < self.interval_s - 1e-9:
            return self.decision(self.stand_ins.release(target, state) if self._plans else target)
        self._last_s = now_s
        peak = self._traffic.peak_per_s(now_s)
        self._series.update(peak)
        if math.isnan(peak) or np.isnan(state.classes.arrivals_per_s).any() or now_s - self._first_s < WARM_UP_S - 1e-9:
            return self.decision(target)
        self._plans.append(self._plan(target, self._traffic, now_s))
        return self.decision(self.stand_ins.release(np.max(self._plans, axis=0), state))

    def forecast_per_s(self, startup_s: float) -> float:
        """Largest arrival rate expected until a replica asked for now has served for one interval."""
        assert self._series is not None
        steps = math.ceil(startup_s / self.interval_s) + 1
        return max(self._series.level, float(self._series.forecast(steps).max()))

    def _plan(self, target: IntArray, traffic: RecentTraffic, now_s: float) -> IntArray:
        plan = target.copy()
        served = np.array([traffic.rates_per_s(tier, now_s).sum() for tier in self._tiers])
        importance = served / served.sum() if served.sum() > 0 else np.zeros(len(served))
        for tier, share in zip(self._tiers, importance, strict=True):
            pools = list(tier.pools)
            rates = replica_rates_per_s(self.spec, tier, traffic, now_s)
            if np.isnan(rates).any():  # nothing arrives
                plan[pools] = self.spec.min_replicas[pools]
                continue
            startup_s = max(self.spec.pools[p].startup_mean_s for p in pools)
            needed = self.headroom * float(share) * self.forecast_per_s(startup_s)
            plan[pools] = self.filled(tier, plan[pools], rates, needed)
        return plan

    def filled(self, tier: Tier, replicas: IntArray, rates: FloatArray, needed: float) -> IntArray:
        """The greedy plan of one tier.

        Args:
            tier: its pools.
            replicas: asked for now, shape (len(tier.pools),).
            rates: requests per second of one replica, same shape, >= 0.
            needed: requests per second to carry.
        """
        plan, price = replicas.copy(), price_per_replica_hour(self.spec, tier)
        most, least = (bounds[list(tier.pools)] for bounds in (self.spec.max_replicas, self.spec.min_replicas))
        while (residual := needed - float(plan @ rates)) > 1e-9:
            taken = np.where(plan < most, np.minimum(rates, residual), 0.0)
            if not taken.any():
                break
            with np.errstate(divide="ignore"):
                cost = np.where(taken > 0, price * (SPAN_S + LAUNCH_COST_S) / (taken * SPAN_S), np.inf)
            plan[int(np.argmin(cost))] += 1
        while True:
            spare = (plan > least) & (float(plan @ rates) - rates >= needed - 1e-9)
            if not spare.any():
                return plan
            with np.errstate(divide="ignore"):
                plan[int(np.argmax(np.where(spare, price / rates, -np.inf)))] -= 1
