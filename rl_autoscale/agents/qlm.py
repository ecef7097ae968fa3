"""QLM: request groups, and replicas as far as their waiting times say.

Per tier of pools that can stand in for each other, at every control step:

    groups     queued requests with similar deadlines (arrival + TTFT SLO, or early enough for the class's deadline)
    wait       of a group: normal with mean n mu / R and deviation sqrt(n) sigma / R, n requests of mean output mu being
               in front of its end and R the tier's tokens per second
    growth     the fewest replicas with which no group's bound (mean + z deviations) exceeds its time left
    base       no fewer than carry, at ``load_share`` of R, the arriving tokens of classes that cannot wait for a start
    order      the cheapest pool with room grows, the dearest shrinks
    shrinking  one replica per step while no group would be in danger without it, from one load time after the last
               growth on, down to the base

Source: Patke et al., QLM, SoCC 2024 (arXiv 2407.00047): groups, the estimator (its formula from memory, its idea
confirmed by the authors' blog) and the trigger, "only when the estimator predicts a violation". QLM manages a *fixed*
fleet; its workshop version names autoscaling among the operations without a rule, so growth, base and shrinking are
ours (growth is the sizing of Chiron's batch loop, by the same authors). Of QLM's other operations, eviction, load
balancing and the order of service are the gateway's here (``evict_batch``, ``router``, class priorities), the same for
every policy, and pulling is bounded by ``batch_cap``. Left out: the linear programme, since groups are not placed on
instances but taken by whichever is free.

Model swapping: where pools share GPUs (``FleetSpec.shared_gpus``), what the sizing asks for is dealt out by
`rl_autoscale.agents.turns`, the model whose groups have the least time to spare first. A load then takes as long as the
swap and two control steps, in which what is swapped out drains and the free GPU is seen; work with a step's time to
spare or less cannot wait any longer (both ours: QLM's scheduler decides at once and evicts what runs).

The bound needs long queues: with a few requests ahead, what the running ones have left dominates the wait
(`benchmarks/waiting_time.py`). QLM promises first tokens within 20 s or more and no inter-token latency; with an SLO of
one second the base decides nearly everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy
from rl_autoscale.agents.chiron_batch import BatchLoop
from rl_autoscale.agents.tiers import RecentTraffic, Tier, tiers_of
from rl_autoscale.agents.turns import take_turns
from rl_autoscale.fleet.spec import FleetSpec, IntArray
from rl_autoscale.fleet.state import FleetState, ScalingDecision


@dataclass(kw_only=True, eq=False)
class QlmPolicy(RulePolicy):
    """QLM's waiting-time estimator as an autoscaler; see the module for the rule.

    Attributes:
        load_share: of the replicas' token rate at full batches that arrivals may take.
        z: normal quantile of the bound on waiting times.
        output_cv: standard deviation over mean of output lengths.
        window_s: over which arrivals are averaged.
    """

    NAME: ClassVar[str] = "qlm"
    READS: ClassVar[str] = (
        "asked-for, ready, starting, in flight, generated tokens per pool; arrivals, queue, oldest wait, mean output "
        "tokens per class"
    )
    RULE: ClassVar[str] = "fewest replicas with which no request group's waiting-time bound exceeds its time left"
    SOURCE: ClassVar[str] = "QLM, SoCC 2024 (arXiv 2407.00047): groups, estimator, trigger; sizing ours"
    KNOB: ClassVar[Knob] = Knob(
        "load_share",
        (0.2, 0.27, 0.35, 0.42, 0.5, 0.57, 0.65, 0.72, 0.8, 0.9, 1.0, 1.2),
        "share of the full-batch token rate that arrivals may take",
    )

    load_share: float = 0.8
    z: float = 1.645
    output_cv: float = 1.0
    window_s: float = 30.0
    _tiers: list[Tier] = field(default_factory=list, init=False, repr=False)
    _queues: list[BatchLoop] = field(default_factory=list, init=False, repr=False)
    _traffic: RecentTraffic | None = field(default=None, init=False, repr=False)
    _last_growth_s: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("load_share", self.load_share, low=0.0, above=True)
        self._check("z", self.z, low=0.0)
        self._check("output_cv", self.output_cv, low=0.0)
        self._check("window_s", self.window_s, low=0.0, above=True)

    def reset(self, spec: FleetSpec) -> None:
        """Forget queues, learned rates and traffic."""
        super().reset(spec)
        order = [p for pools in spec.cheapest_first for p in pools]
        self._tiers = [Tier(tuple(sorted(tier.pools, key=order.index)), tier.classes) for tier in tiers_of(spec)]
        self._queues = [BatchLoop(spec, z=self.z, output_cv=self.output_cv, tier=tier) for tier in self._tiers]
        self._traffic = RecentTraffic(spec, self.window_s)
        self._last_growth_s = [np.nan] * len(self._tiers)

    def decide(self, state: FleetState) -> ScalingDecision:
        """Size every tier by its groups and its arrivals; a tier that cannot be read may grow but not shrink."""
        target = self.standing_target(state)
        assert self._traffic is not None  # standing_target has refused a policy that was never reset
        self._traffic.observe(state)
        readable = ~(np.isnan(state.pools.ready) | np.isnan(state.pools.in_flight))
        for k in range(len(self._tiers)):
            self._queues[k].observe(state, self.batch_ceiling().astype(np.float64), readable)
            target = self._sized(k, target, state, bool(readable[list(self._tiers[k].pools)].all()))
        for pools, num_gpus in self.spec.gpu_groups:
            target[list(pools)] = self._dealt(list(pools), num_gpus, target, self.standing_target(state), state)
        return self.decision(self.stand_ins.release(target, state))

    def _dealt(self, pools: list[int], num_gpus: int, target: IntArray, held: IntArray, state: FleetState) -> IntArray:
        """Replicas of pools that share GPUs, shape (len(pools),)."""
        cap = self.batch_ceiling().astype(np.float64)
        needed, slack_s = target.copy(), np.full(len(target), np.inf)
        for tier, queue in zip(self._tiers, self._queues, strict=True):
            for p in set(tier.pools) & set(pools):
                load_time_s = 0.0 if held[p] > 0 else self._load_time_s(p)
                slack_s[p] = queue.slack_s(state, cap, p, replicas=max(int(held[p]), 1), load_time_s=load_time_s)
                if slack_s[p] == np.inf:  # nothing waits, and what runs may drain
                    needed[p] = self._base(tier, queue, float(state.time_s))[p]
        return take_turns(
            needed[pools],
            held[pools],
            slack_s[pools],
            margin_s=self.spec.control_interval_s,
            gpus_each=self.spec.gpus_per_replica[pools],
            num_gpus=num_gpus,
        )

    def _load_time_s(self, pool: int) -> float:
        """From the decision for a replica to its first request."""
        shares = any(pool in pools for pools, _ in self.spec.gpu_groups)
        return self.spec.pools[pool].startup_mean_s + 2 * self.spec.control_interval_s * shares

    def _sized(self, k: int, target: IntArray, state: FleetState, readable: bool) -> IntArray:
        """The tier's pools resized, shape (num_pools,)."""
        tier, queue, now_s = self._tiers[k], self._queues[k], float(state.time_s)
        pools, cap = list(tier.pools), self.batch_ceiling().astype(np.float64)
        if np.isnan(self._last_growth_s[k]):
            self._last_growth_s[k] = now_s  # a fleet that has only just been seen is not over-provisioned
        base = self._base(tier, queue, now_s)
        grown = np.maximum(target, base)
        pool = next((p for p in pools if grown[p] < self.spec.max_replicas[p]), pools[0])
        load_time_s = self._load_time_s(pool)
        loading = int(np.nan_to_num(state.pools.starting[pools]).sum() + (grown - target).sum())
        grown[pool] += queue.plan(state, cap, pool, load_time_s=load_time_s, loading=loading).instances
        if (grown > target).any():
            self._last_growth_s[k] = now_s
            return grown
        classes, of_tier = state.classes, list(tier.classes)
        blind = not readable or np.isnan(classes.queue_length[of_tier] + classes.arrivals_per_s[of_tier]).any()
        spare = next((p for p in reversed(pools) if target[p] > base[p]), None)
        if blind or spare is None or now_s - self._last_growth_s[k] < load_time_s - 1e-9:
            return target
        without = queue.plan(state, cap, spare, load_time_s=load_time_s, loading=0, fewer=1)
        if without.backpressure == 0:
            target[spare] -= 1
        return target

    def _base(self, tier: Tier, queue: BatchLoop, now_s: float) -> IntArray:
        """Fewest replicas, cheapest pools first, that carry the arriving tokens; zero for the pools of other tiers."""
        assert self._traffic is not None
        arrivals = np.nan_to_num(self._traffic.rates_per_s(tier, now_s))
        load_time_s = min(self._load_time_s(p) for p in tier.pools)
        left = sum(
            rate * self._traffic.lengths(c, now_s)[1] / self.load_share
            for c, rate in zip(tier.classes, arrivals, strict=True)
            if self.spec.classes[c].ttft_slo_s <= load_time_s
        )
        base = np.zeros(len(self.spec.pools), dtype=np.int64)
        rates = {p: queue.instance_rate(p, float(self.batch_ceiling()[p])) for p in tier.pools}
        for p in tier.pools:
            base[p] = self.spec.min_replicas[p]
            left -= base[p] * rates[p]
        for p in tier.pools:
            more = int(np.clip(np.ceil(left / rates[p] - 1e-9), 0, self.spec.max_replicas[p] - base[p]))
            base[p] += more
            left -= more * rates[p]
        return base
