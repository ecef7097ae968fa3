"""INFaaS: which variant grows is chosen by cost, each variant shrinks when the rest carries the load.

A *variant* is a pool: one model on one kind of GPU (or in another precision, or of another size, as its profile says).
Per tier of pools that can stand in for each other, with w the arrivals per second, x_p what one replica of pool p
serves within the SLOs, n_p its replicas asked for, and c the sum of n_p x_p:

    c < (1 + slack) w       a pool p would take ceil(((1 + slack) w - c) / x_p) replicas; the pool with the most
                            capacity is *replicated*, unless that costs more than 1.5 times the cheapest choice, or
                            does not fit: then the cheapest is loaded instead (*upgrade*)
    c - x_p >= (1 + slack) w for longer than ``down_wait_s``
                            one replica of p less; dearer pools first, so load moves down to cheaper ones

A pool that cannot keep the SLOs at any rate is never grown. Where no single pool can take the deficit, the cheapest
per request are filled one after the other.

Source: Romero et al., INFaaS, USENIX ATC 2021; released code, src/worker/autoscaler.cc: replicate against upgrade with
the factor 1.5, a removal only after an unbroken run of 20 wishes (one per second on a GPU). Ours: cost is dollars per
hour of what is added (the code takes load latency, which hardly differs between GPUs of one model); x_p comes from the
latency profile in the balance of `agents/capacity.py` instead of a line fitted to measured batches; ``slack`` stands
for the code's 0.0002 of capacity per millisecond of load latency, 0.2 for a load of one second: a start-up of a minute
would have it hold twelve times too much. Left out: choosing a variant per query (the router's business here), CPU
variants, and accuracy, since all pools of a tier serve the same model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy, ceil_replicas
from rl_autoscale.agents.tiers import RecentTraffic, Tier, price_per_replica_hour, replica_rates_per_s, tiers_of
from rl_autoscale.fleet.spec import FleetSpec, IntArray
from rl_autoscale.fleet.state import FleetState, FloatArray, ScalingDecision

UPGRADE_FACTOR = 1.5
"""Replication may cost so much more than the cheapest variant before another one is loaded."""


def carried_per_s(replicas: IntArray, rates: FloatArray) -> float:
    """Requests per second of so many replicas at these rates, either shape (num_pools,); a rate may be infinite."""
    return float(replicas[replicas > 0] @ rates[replicas > 0])


@dataclass(kw_only=True, eq=False)
class InfaasPolicy(RulePolicy):
    """INFaaS's choice among the pools of a tier; see the module for the rule.

    Attributes:
        slack: capacity held beyond the arrivals, over them.
        down_wait_s: how long a removal must be wished for without a break, per pool.
        window_s: over which arrivals and lengths are averaged.
    """

    NAME: ClassVar[str] = "infaas"
    READS: ClassVar[str] = "asked-for per pool; arrivals, arrived prompt tokens, mean output tokens per class"
    RULE: ClassVar[str] = "replicate the largest variant or load the cheapest (factor 1.5); remove the dearest to spare"
    SOURCE: ClassVar[str] = "INFaaS, USENIX ATC 2021; src/worker/autoscaler.cc"
    KNOB: ClassVar[Knob] = Knob(
        "slack", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.3, 1.7, 2.2, 3.0), "spare capacity over the arrivals"
    )

    slack: float = 0.2
    down_wait_s: float = 20.0
    window_s: float = 30.0
    _tiers: list[Tier] = field(default_factory=list, init=False, repr=False)
    _traffic: RecentTraffic | None = field(default=None, init=False, repr=False)
    _wished_since_s: FloatArray = field(default_factory=lambda: np.zeros(0), init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("slack", self.slack, low=0.0)
        self._check("down_wait_s", self.down_wait_s, low=0.0)
        self._check("window_s", self.window_s, low=0.0, above=True)

    def reset(self, spec: FleetSpec) -> None:
        """Forget traffic and wishes."""
        super().reset(spec)
        self._tiers = tiers_of(spec)
        self._traffic = RecentTraffic(spec, self.window_s)
        self._wished_since_s = np.full(len(spec.pools), np.nan)

    def decide(self, state: FleetState) -> ScalingDecision:
        """Grow or shrink every tier whose classes have all been measured; hold the others."""
        target = self.standing_target(state)
        traffic, now_s = self._traffic, float(state.time_s)
        assert traffic is not None  # standing_target has refused a policy that was never reset
        traffic.observe(state)
        for tier in self._tiers:
            pools = list(tier.pools)
            needed = (1.0 + self.slack) * float(traffic.rates_per_s(tier, now_s).sum())
            rates = replica_rates_per_s(self.spec, tier, traffic, now_s)
            if np.isnan(state.classes.arrivals_per_s[list(tier.classes)]).any() or np.isnan(needed):
                self._wished_since_s[pools] = np.nan
                continue
            rates = np.where(np.isnan(rates), np.inf, rates)  # nothing arrives: any replica carries it
            capacity = carried_per_s(target[pools], rates)
            if capacity < needed:
                self._wished_since_s[pools] = np.nan
                target[pools] += self.growth(tier, target[pools], rates, needed - capacity)
            else:
                target[pools] = self._shrunk(tier, target[pools], rates, needed, now_s)
        return self.decision(self.stand_ins.release(target, state))

    def growth(self, tier: Tier, replicas: IntArray, rates: FloatArray, deficit: float) -> IntArray:
        """Replicas to add to each pool of a tier.

        Args:
            tier: its pools.
            replicas: asked for now, shape (len(tier.pools),).
            rates: requests per second of one replica, same shape, >= 0.
            deficit: requests per second to make up for, > 0.
        """
        room = self.spec.max_replicas[list(tier.pools)] - replicas
        price = price_per_replica_hour(self.spec, tier)
        with np.errstate(divide="ignore"):
            counts = np.ceil(deficit / rates - 1e-9)
        cost = np.where(counts <= room, counts * price, np.inf)
        added = np.zeros(len(tier.pools), dtype=np.int64)
        if np.isfinite(cost).any():
            largest, cheapest = int(np.argmax(replicas * rates)), int(np.argmin(cost))
            chosen = largest if cost[largest] <= UPGRADE_FACTOR * cost[cheapest] else cheapest
            added[chosen] = int(counts[chosen])
            return added
        with np.errstate(divide="ignore"):
            order = np.argsort(price / rates, kind="stable")
        for pool in order:
            if deficit > 0 and rates[pool] > 0:
                added[pool] = min(ceil_replicas(deficit / rates[pool]), int(room[pool]))
                deficit -= float(added[pool] * rates[pool])
        return added

    def _shrunk(self, tier: Tier, replicas: IntArray, rates: FloatArray, needed: float, now_s: float) -> IntArray:
        """One replica less of each pool whose removal has been wished for long enough, the dearest first."""
        left = replicas.copy()
        for k in np.argsort(-price_per_replica_hour(self.spec, tier), kind="stable"):
            pool = tier.pools[k]
            rest = left - (np.arange(len(left)) == k)
            spare = rest.sum() > 0 and carried_per_s(rest, rates) >= needed
            if left[k] <= self.spec.min_replicas[pool] or not spare:
                self._wished_since_s[pool] = np.nan
            elif np.isnan(self._wished_since_s[pool]):
                self._wished_since_s[pool] = now_s
            elif now_s - self._wished_since_s[pool] >= self.down_wait_s - 1e-9:
                self._wished_since_s[pool] = now_s
                left = rest
        return left
