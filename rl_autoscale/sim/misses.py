"""Where misses come from: every missed request gets exactly one cause, found after the episode.

A cause is the first of these that holds:

``too_long``      the prompt alone, on an idle replica of the fastest pool that may serve it, exceeds the TTFT SLO: no
                  decision could have helped
``failed``        its replica crashed while it streamed
``shed``          the gateway refused it early (a queue that overflows is no decision: that is lag or capacity)
``startup_lag``   more replicas were asked for than were ready: help was on its way
``capacity``      nothing was on its way, and no pool could have been asked for more (replica bounds, GPU budget,
                  shared GPUs)
``trigger_lag``   nothing was on its way although it could have been: the policy had not asked, or for too little

The last three are properties of a control interval and of the pools that may serve the request's class. An interval in
which nothing was asked for, but a queue of earlier intervals was getting shorter, has the cause of the interval before:
requests that wait behind a backlog suffer from what made the backlog. An interactive request belongs to the interval
of its arrival; a batch request, which may wait for long, to the interval in which its first promise ran out.

A policy that refuses early turns lag into refusals, so compare the causes of policies with one refusal setting.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from enum import IntEnum

import numpy as np

from rl_autoscale.fleet.admission import prefill_time_s
from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.layout import FloatArray, IntArray, Outcome, RecordArray


class MissCause(IntEnum):
    """Why a request missed an SLO; see the module."""

    TOO_LONG = 0
    FAILED = 1
    SHED = 2
    STARTUP_LAG = 3
    CAPACITY = 4
    TRIGGER_LAG = 5


def count_misses(spec: FleetSpec, requests: RecordArray, timeline: Mapping[str, FloatArray]) -> dict[str, int]:
    """Misses by cause, for all classes together; the counts add up to all misses.

    Args:
        spec: the fleet.
        requests: arrived REQUEST records, all ended.
        timeline: `episode.Timeline.arrays`.
    """
    counts = np.zeros(len(MissCause), dtype=np.int64)
    for c in range(len(spec.classes)):
        missed = requests[(requests["class_index"] == c) & (requests["slo_met"] == 0)]
        if len(missed):
            counts += np.bincount(_causes(spec, c, missed, timeline), minlength=len(MissCause))
    return {cause.name.lower(): int(counts[cause]) for cause in MissCause}


def _causes(spec: FleetSpec, c: int, missed: RecordArray, timeline: Mapping[str, FloatArray]) -> IntArray:
    """The cause of each missed request of one class."""
    chosen = spec.classes[c]
    promise_s = 0.0 if chosen.kind == "interactive" else min(chosen.ttft_slo_s, chosen.deadline_s or np.inf)
    step = np.searchsorted(timeline["time_s"], missed["arrival_s"] + promise_s, side="right") - 1
    causes = interval_causes(spec, c, timeline)[np.maximum(step, 0)]
    outcome = missed["outcome"]
    causes[outcome == Outcome.REFUSED] = MissCause.SHED
    causes[outcome == Outcome.FAILED] = MissCause.FAILED
    prompts = missed["prompt_tokens"]
    limits = [_longest_in_time(spec.pools[p], chosen.ttft_slo_s, int(prompts.max())) for p in spec.pools_serving(c)]
    causes[prompts > max(limits)] = MissCause.TOO_LONG
    return causes


def interval_causes(spec: FleetSpec, c: int, timeline: Mapping[str, FloatArray]) -> IntArray:
    """The cause of misses in each control interval, for the pools that may serve a class; shape (num_steps,)."""
    pools = list(spec.pools_serving(c))
    target, ready = timeline["target"], timeline["ready"]
    queue = timeline["queue_length"][:, c] + timeline["waiting"][:, pools].sum(axis=1)
    on_its_way = (target > ready)[:, pools].any(axis=1)
    full = (target >= spec.max_replicas)[:, pools].all(axis=1)
    if spec.gpu_budget is not None:
        left = spec.gpu_budget - target @ spec.gpus_per_replica
        full |= left < spec.gpus_per_replica[pools].min()
    for shared, gpus in spec.gpu_groups:
        if set(pools) <= set(shared):
            left = gpus - target[:, shared] @ spec.gpus_per_replica[list(shared)]
            full |= left < spec.gpus_per_replica[pools].min()
    shrinking = np.diff(queue, prepend=queue[:1]) < 0
    causes = np.where(on_its_way, MissCause.STARTUP_LAG, np.where(full, MissCause.CAPACITY, MissCause.TRIGGER_LAG))
    for k in np.flatnonzero(~on_its_way & shrinking & (queue > 0)):
        causes[k] = causes[k - 1]
    return causes.astype(np.int64)


def _longest_in_time(pool: PoolSpec, ttft_s: float, longest: int) -> int:
    """The longest prompt up to ``longest`` whose first token an idle replica gives in time; more tokens take longer."""
    table_s = pool.hardware.token_time_table_s(pool.token_budget)
    coefficients_s = pool.hardware.attention_coefficients_s

    def alone_s(tokens: int) -> float:
        return float(prefill_time_s(tokens, tokens * tokens, 0, 0, pool.token_budget, table_s, coefficients_s))

    return bisect_right(range(longest + 1), ttft_s, key=alone_s) - 1
