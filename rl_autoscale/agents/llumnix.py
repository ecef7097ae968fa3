"""Llumnix: keep the average freeness of the instances inside a range.

Freeness of an instance is (M - V) / B: its KV blocks M less the virtual usage V of its requests, over its batch size B;
"how many more blocks each request of this batch could take". Queued requests count in V with what they demand, so a
blocked queue drives freeness down, below zero if need be. Over n instances of a pool:

    freeness(n) = (n M - V) / B,   V = blocks in use + blocks demanded by what waits,   B = requests, waiting ones too
    freeness(n) < low                  -> the fewest n with freeness(n) >= low   (empty instances are added in thought)
    freeness(n - 1) > high             -> n - 1, one per interval
    B = 0                              -> n - 1, one per interval

Demands are prompt tokens (exact at the gateway; in the engine, waiting requests times the mean prompt), since output
lengths are not known. Instances that start count: they are the empty ones added before. A removed replica drains; with
``drain: migrate`` its requests go on elsewhere, as Llumnix has it. Dispatch by freeness and migration between instances
that stay are the fleet's: ``router: freeness`` and ``rebalance``.

A pool whose KV use, running or waiting requests are unknown is held.

Source: Sun et al., OSDI 2024, arXiv 2406.03243, section 4.4.3; artifact: add hypothetical empty instances until the
average is back in range, bounds 10 and 60, interval 10 s. Taking the average over the pool as one big instance is the
artifact's form. Its bounds belong to A10 GPUs with little KV memory; larger ones belong to larger memories, so the knob
is the lower bound and the upper stays six times that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy, ceil_replicas
from rl_autoscale.agents.signals import queue_per_pool, share_per_pool
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, FloatArray, ScalingDecision

PRIOR_PROMPT_TOKENS = 1024.0
"""Mean prompt until the first arrivals (Azure 2023 conversation: 1,155)."""


@dataclass(kw_only=True, eq=False)
class LlumnixPolicy(RulePolicy):
    """Average freeness per pool between two bounds; see the module for the rule.

    Attributes:
        low: blocks per request below which instances are added.
        band: upper bound over lower bound.
        interval_s: least time between two evaluations.
    """

    NAME: ClassVar[str] = "llumnix"
    READS: ClassVar[str] = "asked-for, ready, KV use, running, waiting per pool; queue and prompt tokens per class"
    RULE: ClassVar[str] = (
        "fewest replicas with freeness (n M - V) / B >= low; one fewer while it would stay above the band"
    )
    SOURCE: ClassVar[str] = "Llumnix, OSDI 2024 (arXiv 2406.03243), section 4.4.3 and artifact defaults 10 and 60"
    KNOB: ClassVar[Knob] = Knob(
        "low", (5, 10, 20, 40, 80, 120, 180, 260, 380, 550, 800, 1200, 1800, 2700, 4000), "free KV blocks per request"
    )

    low: float = 10.0
    band: float = 6.0
    interval_s: float = 10.0
    _mean_prompt_tokens: FloatArray = field(default_factory=lambda: np.zeros(0), init=False, repr=False)
    _last_s: float = field(default=-math.inf, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("low", self.low, low=0.0, above=True)
        self._check("band", self.band, low=1.0)
        self._check("interval_s", self.interval_s, low=0.0)

    def reset(self, spec: FleetSpec) -> None:
        """Forget prompt lengths and the last evaluation."""
        super().reset(spec)
        self._mean_prompt_tokens = np.full(len(spec.classes), PRIOR_PROMPT_TOKENS)
        self._last_s = -math.inf

    def decide(self, state: FleetState) -> ScalingDecision:
        """Evaluate every pool's freeness if an interval has passed."""
        target = self.standing_target(state)
        self._learn_prompts(state)
        if float(state.time_s) - self._last_s < self.interval_s - 1e-9:
            return self.decision(target)
        self._last_s = float(state.time_s)
        blocks, requests = self._virtual_usage(state)
        for pool, pool_spec in enumerate(self.spec.pools):
            if not (np.isnan(blocks[pool]) or np.isnan(requests[pool])):
                least = max(1, int(self.spec.min_replicas[pool])) if requests[pool] > 0 else 0
                wanted = self.desired(int(target[pool]), pool_spec.num_kv_blocks, blocks[pool], requests[pool])
                target[pool] = max(wanted, least)
        return self.decision(target)

    def desired(self, replicas: int, blocks_per_replica: int, virtual_blocks: float, requests: float) -> int:
        """The answer for one pool.

        Args:
            replicas: n, asked for now.
            blocks_per_replica: M.
            virtual_blocks: V.
            requests: B, over the whole pool.
        """
        if requests <= 0:
            return replicas - 1 if replicas > 0 else 0
        if (replicas * blocks_per_replica - virtual_blocks) / requests < self.low:
            return ceil_replicas((self.low * requests + virtual_blocks) / blocks_per_replica)
        if ((replicas - 1) * blocks_per_replica - virtual_blocks) / requests > self.band * self.low:
            return replicas - 1
        return replicas

    def _learn_prompts(self, state: FleetState) -> None:
        """Keep each class's newest mean prompt length."""
        arrivals = state.classes.arrivals_per_s
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = state.classes.arrived_prompt_tokens_per_s / arrivals
        self._mean_prompt_tokens = np.where(np.isfinite(mean) & (arrivals > 0), mean, self._mean_prompt_tokens)

    def _virtual_usage(self, state: FleetState) -> tuple[FloatArray, FloatArray]:
        """(V, B) of every pool, each shape (num_pools,)."""
        spec, pools = self.spec, state.pools
        capacity = np.array([pool.num_kv_blocks for pool in spec.pools])
        mean_prompt = np.array(
            [
                self._mean_prompt_tokens[
                    [c for c in range(len(spec.classes)) if p in spec.pools_serving(c)] or [0]
                ].mean()
                for p in range(len(spec.pools))
            ]
        )
        waiting_blocks = (
            pools.waiting * mean_prompt + share_per_pool(spec, state, state.classes.queued_prompt_tokens)
        ) / BLOCK_SIZE_TOKENS
        used = np.where(pools.ready == 0, 0.0, pools.kv_usage * pools.ready * capacity)
        return used + waiting_blocks, pools.running + pools.waiting + queue_per_pool(spec, state)
