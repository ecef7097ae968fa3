"""Clipper: the batch cap by additive increase and multiplicative decrease on the latency objective.

Per pool and control step, with B the requests in flight allowed per replica, ITL the pool's mean inter-token latency
and SLO the tightest one promised to the work in it:

    ITL <= SLO and B binds     B + increase
    ITL >  SLO                 0.9 min(B, requests in flight per replica)
    else                       B

Clipper leaves the number of replicas to the operator; here the token-rate rule `headroom` sets it.

Source: Crankshaw et al., Clipper, NSDI 2017 (arXiv 1612.03079), section on adaptive batching: additive increase, and a
back-off of 10 % since the best batch size hardly moves. Ours: latency of a batch is the inter-token latency, for which
a decode batch is what a batch was there; a tick is a control step and not a batch, so the increase is larger than one
and the first B is not 1; B grows only while it binds and is cut from what really runs, since with less traffic than B
the latency says nothing about B. Clipper's released code explores by +1 or about 10 % and fits a regression instead.
Delayed batching has no counterpart: a continuous batch is never waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy
from rl_autoscale.agents.chiron_local import binding_pools, pool_itl_slo_s
from rl_autoscale.agents.headroom import HeadroomPolicy
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, FloatArray, ScalingDecision


@dataclass(kw_only=True, eq=False)
class ClipperPolicy(RulePolicy):
    """AIMD on every pool's batch cap under `headroom`; see the module for the rule.

    Attributes:
        headroom: replicas held per replica of demand.
        increase: requests added to B per control step.
        backoff: share of B that is left after a miss.
        initial_batch: B before the first step.
    """

    NAME: ClassVar[str] = "clipper"
    READS: ClassVar[str] = "as headroom; ITL, in flight, ready per pool; queue, in flight per class"
    RULE: ClassVar[str] = "batch cap + increase while ITL keeps its SLO, times 0.9 when it does not; replicas: headroom"
    SOURCE: ClassVar[str] = "Clipper, NSDI 2017 (arXiv 1612.03079), adaptive batching; step and replicas ours"
    KNOB: ClassVar[Knob] = Knob(
        "headroom", (0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0), "replicas per replica of demand"
    )

    headroom: float = 1.5
    increase: float = 4.0
    backoff: float = 0.9
    initial_batch: float = 64.0
    _scaler: HeadroomPolicy | None = field(default=None, init=False, repr=False)
    _cap: FloatArray = field(default_factory=lambda: np.zeros(0), init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("headroom", self.headroom, low=0.0, above=True)
        self._check("increase", self.increase, low=0.0, above=True)
        self._check("backoff", self.backoff, low=0.0, high=1.0, above=True)
        self._check("initial_batch", self.initial_batch, low=1.0)

    def reset(self, spec: FleetSpec) -> None:
        """Forget caps and demand."""
        super().reset(spec)
        self._scaler = HeadroomPolicy(headroom=self.headroom)
        self._scaler.reset(spec)
        self._cap = np.clip(np.full(len(spec.pools), float(self.initial_batch)), 1.0, self.batch_ceiling())

    def decide(self, state: FleetState) -> ScalingDecision:
        """Move the cap of every pool whose latency is known; replicas as `headroom` has them."""
        self.standing_target(state)
        assert self._scaler is not None  # standing_target has refused a policy that was never reset
        slo_s, itl_s = pool_itl_slo_s(self.spec, state), state.pools.itl_s
        grown = np.where(binding_pools(self.spec, state, self._cap), self._cap + self.increase, self._cap)
        with np.errstate(divide="ignore", invalid="ignore"):
            running = np.where(state.pools.ready > 0, state.pools.in_flight / state.pools.ready, np.nan)
        cut = self.backoff * np.fmin(self._cap, running)
        moved = np.where(itl_s > slo_s, cut, np.where(itl_s <= slo_s, grown, self._cap))
        self._cap = np.clip(moved, 1.0, self.batch_ceiling())
        replicas = self._scaler.decide(state).target_replicas
        return self.decision(replicas, np.floor(self._cap).astype(np.int64))
