"""Kernel: ask a replica's scheduler what runs next, and find when it ends."""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import hot
from rl_autoscale.sim.replica import leap_duration_s, schedule_event
from rl_autoscale.sim.schedulers.vllm import schedule_vllm


@hot
def mixed_duration_s(w, r):
    """Seconds of one iteration with prompt chunks."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    coefficients = w.coefficients[rep.pool]
    return w.fleet[0].speed * (
        constant_s(w, r)
        + coefficients[0] * (rep.decode_units * pool.unit_tokens + rep.num_decode * pool.step_tokens)
        + coefficients[2] * rep.chunk_pairs
        + coefficients[3] * rep.chunk_context
        + coefficients[4] * rep.num_prefill
    )


@hot
def constant_s(w, r):
    """Seconds of an iteration but for attention to what is in the KV cache, at the profile's speed."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    coefficients = w.coefficients[rep.pool]
    num_decode = rep.num_decode
    fixed_s = (
        w.token_time[rep.pool, num_decode * pool.verified_tokens + rep.chunk_tokens] + coefficients[1] * num_decode
    )
    if num_decode > 0:  # drafting, and reading drafts that are not kept
        fixed_s += pool.draft_s + coefficients[0] * (num_decode * pool.lost_tokens)
    return fixed_s


@hot
def plan(w, r, now_s):
    """Decide the replica's next iteration, or its next leap, and when it ends."""
    rep = w.rep[r]
    rep.leap_start_s = now_s
    rep.num_prefill = 0
    rep.chunk_tokens = 0
    rep.chunk_pairs = 0.0
    rep.chunk_context = 0
    iterations = schedule_vllm(w, r, now_s)
    if iterations == 0:
        rep.event_s = math.inf
        rep.cuttable = 0
        schedule_event(w, r)
        return
    if rep.num_prefill > 0:
        duration_s = mixed_duration_s(w, r)
    else:
        rep.leap_iteration_s = w.fleet[0].speed * constant_s(w, r)
        duration_s = leap_duration_s(w, r, iterations)
    rep.leap_iterations = iterations
    rep.event_s = now_s + duration_s
    rep.cuttable = 1 if iterations > 1 else 0
    schedule_event(w, r)
