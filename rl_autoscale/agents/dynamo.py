"""NVIDIA Dynamo's planner for aggregated engines: a slow loop that plans a floor, a fast loop that moves above it.

*Slow loop*, every ``throughput_interval_s``: request rate, mean prompt and mean output of each class over the interval
are forecast one interval ahead; the latency profile gives the best rate of one replica within the SLOs at those lengths
(`capacity`). Their quotient, summed over a pool's classes and rounded up, is the pool's lower bound.

*Fast loop*, every ``load_interval_s``: one replica more if time to first token or inter-token latency exceeds its SLO,
one fewer if both are below ``sensitivity`` times it; nothing while replicas are starting. Never below the bound.

``sla_share`` scales the SLOs both loops plan for: the margin for queueing and for requests longer than the mean, which
the planner does not know. 1 is the planner as published.

Forecast: Holt's linear method with Kalman-like weights, Dynamo's "kalman" predictor; ``trend_weight=0`` is nearly its
"constant" one. Ours: latencies are the window's means (Dynamo estimates them per engine by regression), and both SLOs
of a pool are the tightest among its classes.

Missing: an interval without any reading leaves the bound; latencies that are missing move nothing.

Source: ai-dynamo/dynamo ``docs/design-docs/planner-design.md``, ``planner/core/throughput_scaling.py`` and
``load_scaling.py`` (aggregated mode, +-1 per interval, scaling in progress, throughput lower bound; sensitivity 0.8;
intervals 180 s and 5 s, of which the fast one is a control step here).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy, ceil_replicas
from rl_autoscale.agents.capacity import replica_requests_per_s
from rl_autoscale.agents.holt_winters import HoltWinters
from rl_autoscale.agents.signals import Samples
from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.profile import TYPICAL_OUTPUT_TOKENS
from rl_autoscale.fleet.spec import FleetSpec, IntArray
from rl_autoscale.fleet.state import FleetState, ScalingDecision

_LEVEL_WEIGHT = 0.8
"""Weight of the newest interval: Dynamo's filter trusts measurements much more than its level."""


@dataclass(slots=True)
class _ClassTraffic:
    """Readings of the running interval, and the three forecasts of one class."""

    rate: Samples
    prompt_tokens: Samples
    output_tokens: Samples
    forecasts: tuple[HoltWinters, HoltWinters, HoltWinters]


@dataclass(kw_only=True, eq=False)
class DynamoPolicy(RulePolicy):
    """Dynamo's two planner loops per pool; see the module for the rule.

    Attributes:
        sla_share: share of the SLOs planned for.
        throughput_interval_s: period of the slow loop.
        load_interval_s: period of the fast loop.
        sensitivity: share of the SLO below which the fast loop removes.
        trend_weight: of the newest change in the forecast's trend.
    """

    NAME: ClassVar[str] = "dynamo"
    READS: ClassVar[str] = (
        "asked-for, starting, ITL per pool; arrivals, arrived prompt tokens, mean output tokens, TTFT per class"
    )
    RULE: ClassVar[str] = "floor: forecast rate / best rate of a replica within the SLOs; above it +-1 on TTFT and ITL"
    SOURCE: ClassVar[str] = "NVIDIA Dynamo planner, throughput_scaling.py and load_scaling.py (aggregated mode)"
    KNOB: ClassVar[Knob] = Knob(
        "sla_share", (0.1, 0.13, 0.16, 0.2, 0.25, 0.32, 0.4, 0.5, 0.63, 0.8, 1.0), "planned share of the SLOs"
    )

    sla_share: float = 1.0
    throughput_interval_s: float = 180.0
    load_interval_s: float = 10.0
    sensitivity: float = 0.8
    trend_weight: float = 0.3
    _traffic: list[_ClassTraffic] = field(default_factory=list, init=False, repr=False)
    _asked: list[tuple[int, int]] = field(default_factory=list, init=False, repr=False)
    _planned: bool = field(default=False, init=False, repr=False)
    _floor: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64), init=False, repr=False)
    _last_plan_s: float = field(default=math.nan, init=False, repr=False)
    _last_load_s: float = field(default=-math.inf, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("sla_share", self.sla_share, low=0.0, above=True)
        self._check("throughput_interval_s", self.throughput_interval_s, low=0.0, above=True)
        self._check("load_interval_s", self.load_interval_s, low=0.0)
        self._check("sensitivity", self.sensitivity, low=0.0, high=1.0)
        self._check("trend_weight", self.trend_weight, low=0.0, high=1.0)

    def reset(self, spec: FleetSpec) -> None:
        """Forget forecasts and floors."""
        super().reset(spec)
        keep_s = self.throughput_interval_s
        demand = DemandEstimator(spec)
        self._asked = list(zip(demand.work_class.tolist(), demand.work_pool.tolist(), strict=True))
        self._traffic = [
            _ClassTraffic(
                Samples(keep_s), Samples(keep_s), Samples(keep_s),
                (self._forecast(), self._forecast(), self._forecast()),
            )
            for _ in spec.classes
        ]  # fmt: skip
        self._floor = spec.min_replicas.copy()
        self._planned = False
        self._last_plan_s, self._last_load_s = math.nan, -math.inf

    def _forecast(self) -> HoltWinters:
        return HoltWinters(alpha=_LEVEL_WEIGHT, beta=self.trend_weight)

    def decide(self, state: FleetState) -> ScalingDecision:
        """Run whichever loops are due."""
        target = self.standing_target(state)
        now_s = float(state.time_s)
        self._observe(state, now_s)
        if math.isnan(self._last_plan_s):
            self._last_plan_s = now_s  # the first plan needs one whole interval
        if now_s - self._last_plan_s >= self.throughput_interval_s - 1e-9:
            self._last_plan_s = now_s
            self._plan(now_s)
        if now_s - self._last_load_s >= self.load_interval_s - 1e-9:
            self._last_load_s = now_s
            for pool in range(len(target)):
                target[pool] += self._load_step(pool, state)
        target = np.maximum(target, self._floor)
        return self.decision(self.stand_ins.release(target, state) if self._planned else target)

    def _observe(self, state: FleetState, now_s: float) -> None:
        classes = state.classes
        if not state.window_s > 0:
            return
        for c, traffic in enumerate(self._traffic):
            rate = float(classes.arrivals_per_s[c])
            traffic.rate.add(now_s, rate)
            if rate > 0:
                traffic.prompt_tokens.add(now_s, float(classes.arrived_prompt_tokens_per_s[c]) / rate)
            traffic.output_tokens.add(now_s, float(classes.mean_output_tokens[c]))

    def _plan(self, now_s: float) -> None:
        """The slow loop: new floors for pools all of whose classes have been measured."""
        self._planned = True
        wanted = np.zeros(len(self.spec.pools))
        for c, traffic in enumerate(self._traffic):
            series = (traffic.rate, traffic.prompt_tokens, traffic.output_tokens)
            for samples, forecast in zip(series, traffic.forecasts, strict=True):
                forecast.update(samples.mean(now_s, self.throughput_interval_s))
            rate, prompt, output = (float(forecast.forecast(1)[0]) for forecast in traffic.forecasts)
            for pool in [p for asking, p in self._asked if asking == c]:
                wanted[pool] += self._replicas(c, pool, rate, prompt, output)
        for pool in range(len(wanted)):
            if not math.isnan(wanted[pool]):
                planned = min(ceil_replicas(wanted[pool]), int(self.spec.max_replicas[pool]))
                self._floor[pool] = max(planned, int(self.spec.min_replicas[pool]))

    def _replicas(
        self, class_index: int, pool: int, rate_per_s: float, prompt_tokens: float, output_tokens: float
    ) -> float:
        """Replicas of a pool that a class needs within its SLOs; NaN before it was measured, 0 without traffic."""
        if math.isnan(rate_per_s) or rate_per_s <= 0 or math.isnan(prompt_tokens):
            return math.nan if math.isnan(rate_per_s) else 0.0
        service_class = self.spec.classes[class_index]
        best = replica_requests_per_s(
            self.spec.pools[pool],
            prompt_tokens=max(prompt_tokens, 1.0),
            output_tokens=TYPICAL_OUTPUT_TOKENS if math.isnan(output_tokens) else max(output_tokens, 1.0),
            ttft_slo_s=self.sla_share * service_class.ttft_slo_s,
            itl_slo_s=self.sla_share * service_class.tpot_slo_s,
        )
        return rate_per_s / best

    def _load_step(self, pool: int, state: FleetState) -> int:
        """The fast loop for one pool: +1, 0 or -1."""
        served = [c for c, home in self._asked if home == pool]
        starting = state.pools.starting[pool]
        if not served or np.isnan(starting) or starting > 0:
            return 0
        slos = np.array([(self.spec.classes[c].ttft_slo_s, self.spec.classes[c].tpot_slo_s) for c in served])
        ttft_share = float(np.fmax.reduce(state.classes.ttft_mean_s[served] / slos[:, 0])) / self.sla_share
        itl_share = float(state.pools.itl_s[pool]) / float(slos[:, 1].min()) / self.sla_share
        role = self.spec.pools[pool].role  # a prefill pool answers for TTFT, a decode pool for ITL
        ttft_share = 0.0 if role == "decode" else ttft_share
        itl_share = 0.0 if role == "prefill" else itl_share
        if ttft_share > 1.0 or itl_share > 1.0:
            return 1
        return -1 if ttft_share < self.sensitivity and itl_share < self.sensitivity else 0
