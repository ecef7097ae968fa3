"""Chiron's global batch loop: what it remembers between ticks, and the rates its sizing needs.

The arithmetic and its sources are in `rl_autoscale.agents.chiron_groups`. Here, all ours where not tagged otherwise:

- the queue's deadlines are rebuilt from the policy's own history of arrivals, the queue lengths and the head's age;
- a request must start by arrival + ttft_slo_s, and where it has a deadline early enough to finish at its tpot_slo_s;
- an instance's rate is its profile's at the current B, times a correction learned (EWMA) from rates measured while the
  pool is full;
- mixed instances lend the share of B that interactive work leaves free: rate * (B - interactive running) / B;
- all batch instances go when no batch request is queued or running, and never earlier (as in the SageServe
  authors' rebuild).
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from rl_autoscale.agents.chiron_groups import (
    BatchPlan,
    QueuedBatch,
    form_groups,
    plan_batch,
    queued_arrivals,
    work_bounds_tokens,
)
from rl_autoscale.agents.chiron_local import BoolArray, full_pools
from rl_autoscale.agents.tiers import Tier
from rl_autoscale.fleet.answer_lengths import AnswerLengths
from rl_autoscale.fleet.demand import allowed_wait_s
from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, FloatArray

RATE_WEIGHT = 0.2
"""Weight of the newest measurement in the correction of an instance's rate."""
RATE_CORRECTION_BOUNDS = (0.25, 2.0)
"""A measurement outside this range of the profile says more about the measurement."""
PROMPT_WEIGHT = 0.1
"""Weight of the newest window in the mean prompt length."""
PRIOR_PROMPT_TOKENS = 1024.0
"""Mean prompt length assumed until the first arrivals."""


def instance_tokens_per_s(pool: PoolSpec, batch_cap: float, prompt_tokens: float, output_tokens: float) -> float:
    """Output tokens per second of one busy instance at a batch cap, prompts computed along the way.

    The batch is also bounded by the KV cache: blocks * 16 tokens over prompt plus half the output.
    """
    hardware = pool.hardware
    context_tokens = prompt_tokens + output_tokens / 2.0
    fits = pool.num_kv_blocks * BLOCK_SIZE_TOKENS / context_tokens
    batch_size = max(1, int(min(batch_cap, fits)))
    decode_s = pool.decode_s_per_token(batch_size, context_tokens)
    prefill_s = hardware.prefill_s_per_token(max(1, round(prompt_tokens))) * prompt_tokens / output_tokens
    return 1.0 / (decode_s + prefill_s)


class BatchLoop:
    """The batch loop of a fleet, with its memory.

    Args:
        spec: the fleet.
        z: normal quantile of the waiting-time bound.
        output_cv: standard deviation over mean of output lengths, which telemetry does not give.
        tier: whose queue and pools (QLM); None: batch classes on batch pools and on what mixed pools lend (Chiron). The
            pools of a tier are all its own.
    """

    def __init__(self, spec: FleetSpec, *, z: float, output_cv: float, tier: Tier | None = None) -> None:
        self._spec, self._z, self._output_cv = spec, z, output_cv
        self._lending = tier is None
        if tier is None:
            pools = tuple(p for p, pool in enumerate(spec.pools) if pool.role != "interactive")
            tier = Tier(pools, tuple(c for c, item in enumerate(spec.classes) if item.kind == "batch"))
        self._pools, self.classes = tier.pools, list(tier.classes)
        self._history: dict[int, deque[tuple[float, float]]] = {c: deque() for c in self.classes}
        self._answers = AnswerLengths((len(spec.classes),))
        self._prompt_tokens = np.full(len(spec.classes), PRIOR_PROMPT_TOKENS)
        self._rate_correction = np.ones(len(spec.pools))

    def observe(self, state: FleetState, batch_cap: FloatArray, readable: BoolArray) -> None:
        """Take in one tick: arrivals, lengths, and measured rates of pools that are full."""
        if not self.classes:
            return
        self._answers.update(state)
        classes, window_s = state.classes, float(state.window_s)
        with np.errstate(divide="ignore", invalid="ignore"):
            prompt_tokens = classes.arrived_prompt_tokens_per_s / classes.arrivals_per_s
        moved = self._prompt_tokens + PROMPT_WEIGHT * (prompt_tokens - self._prompt_tokens)
        self._prompt_tokens = np.where(np.isfinite(prompt_tokens), np.maximum(moved, 1.0), self._prompt_tokens)
        turned_away = np.nan_to_num(classes.refused_per_s) + np.nan_to_num(classes.dropped_per_s)
        admitted = np.maximum(classes.arrivals_per_s - turned_away, 0.0) * window_s
        for c in self.classes:
            if admitted[c] > 0:
                self._history[c].append((float(state.time_s) - window_s / 2.0, float(admitted[c])))
        self._learn_rates(state, batch_cap, readable)

    def idle(self, state: FleetState) -> bool:
        """No batch request is queued or running; False where that cannot be read."""
        return all(state.classes.queue_length[c] == 0 and state.classes.in_flight[c] == 0 for c in self.classes)

    def plan(
        self, state: FleetState, batch_cap: FloatArray, pool: int, *, load_time_s: float, loading: int, fewer: int = 0
    ) -> BatchPlan:
        """How many instances to add to a pool so that the queue's deadlines hold.

        Args:
            state: telemetry; a class whose queue is unknown asks for nothing.
            batch_cap: B per pool.
            pool: where batch instances are added.
            load_time_s: their start-up time.
            loading: instances of that pool already starting or about to.
            fewer: plan as if so many of its ready instances were gone.
        """
        instance_rate = self.instance_rate(pool, float(batch_cap[pool]))
        now_s = float(state.time_s)
        queue = [item for c in self.classes for item in self._queue(c, state, now_s)]
        return plan_batch(
            form_groups(queue, now_s),
            now_s=now_s,
            tokens_per_s=self.tokens_per_s(state, batch_cap) - fewer * instance_rate,
            instance_tokens_per_s=instance_rate,
            load_time_s=load_time_s,
            loading=loading,
            z=self._z,
        )

    def slack_s(
        self, state: FleetState, batch_cap: FloatArray, pool: int, *, replicas: int, load_time_s: float
    ) -> float:
        """Least time that any group of the queue has to spare if so many replicas of a pool serve it, once loaded.

        Negative when a group's bound exceeds its time left; inf without a queue.
        """
        now_s = float(state.time_s)
        groups = form_groups([item for c in self.classes for item in self._queue(c, state, now_s)], now_s)
        rate = replicas * self.instance_rate(pool, float(batch_cap[pool]))
        waits_s = [load_time_s + tokens / rate for tokens in work_bounds_tokens(groups, self._z)]
        return min((g.deadline_s - now_s - wait_s for g, wait_s in zip(groups, waits_s, strict=True)), default=math.inf)

    def waiting_time_s(self, state: FleetState, batch_cap: FloatArray) -> tuple[float, float]:
        """QLM's estimate of the wait of a request that joins the end of the queue now: mean and standard deviation.

        Infinite when nothing serves.
        """
        groups = form_groups([item for c in self.classes for item in self._queue(c, state, float(state.time_s))], 0.0)
        rate = self.tokens_per_s(state, batch_cap)
        if not rate > 0:
            return math.inf, math.inf
        variance = sum(group.work_variance for group in groups)
        return sum(group.work_tokens for group in groups) / rate, math.sqrt(variance) / rate

    def _queue(self, class_index: int, state: FleetState, now_s: float) -> list[QueuedBatch]:
        """One class's queue as arrival batches with deadlines; forgets history that the queue has passed."""
        length, wait_s = state.classes.queue_length[class_index], state.classes.oldest_wait_s[class_index]
        if np.isnan(length) or np.isnan(wait_s):
            return []
        history = self._history[class_index]
        arrivals = queued_arrivals(history, float(length), now_s - float(wait_s))
        while history and (not arrivals or history[0][0] < arrivals[0][0]):
            history.popleft()
        mean = float(self._answers.mean_tokens[class_index])
        allowed_s = float(allowed_wait_s(self._spec, self._answers.mean_tokens)[class_index])
        return [QueuedBatch(arrived + allowed_s, n, mean, self._output_cv * mean) for arrived, n in arrivals]

    def tokens_per_s(self, state: FleetState, batch_cap: FloatArray) -> float:
        """Tokens per second that ready instances can give to these classes."""
        total = 0.0
        for p in self._pools:
            ready = float(np.nan_to_num(state.pools.ready[p]))
            if ready <= 0:
                continue
            share = 1.0
            if self._lending and self._spec.pools[p].role == "mixed":
                interactive = state.pools.in_flight_interactive[p] / ready
                # An unreadable mixed pool lends nothing: missing is not idle.
                share = float(np.clip(np.nan_to_num(1.0 - interactive / batch_cap[p]), 0.0, 1.0))
            total += ready * self.instance_rate(p, float(batch_cap[p])) * share
        return total

    def instance_rate(self, pool: int, batch_cap: float) -> float:
        """Output tokens per second of one busy instance, as learned."""
        lengths = self._batch_lengths()
        return float(self._rate_correction[pool]) * instance_tokens_per_s(self._spec.pools[pool], batch_cap, *lengths)

    def _batch_lengths(self) -> tuple[float, float]:
        """Mean prompt and output tokens over the classes, weighed by nothing: their mix in the queue is not known."""
        prompt = float(self._prompt_tokens[self.classes].mean())
        return prompt, float(self._answers.mean_tokens[self.classes].mean())

    def _learn_rates(self, state: FleetState, batch_cap: FloatArray, readable: BoolArray) -> None:
        """Correct the profile by measured tokens per second; a pool that is not full shows its load, not its rate."""
        full = full_pools(state, batch_cap) & readable
        for p in self._pools:
            pool, ready = self._spec.pools[p], state.pools.ready[p]
            measured = state.pools.generation_tokens_per_s[p]
            if not full[p] or not measured > 0:
                continue
            expected = float(ready) * instance_tokens_per_s(pool, float(batch_cap[p]), *self._batch_lengths())
            ratio = np.clip(measured / expected, *RATE_CORRECTION_BOUNDS)
            self._rate_correction[p] += RATE_WEIGHT * (ratio - self._rate_correction[p])
