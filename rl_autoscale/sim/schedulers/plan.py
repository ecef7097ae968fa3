"""Kernel: ask a replica's scheduler what runs next, and find when it ends."""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.layout import ANDES, DRAINING, FASTSERVE, SARATHI, SLOS_SERVE, VLLM_PRIORITY, VLLM_V0
from rl_autoscale.sim.replica import constant_s, leap_duration_s, schedule_event
from rl_autoscale.sim.schedulers.andes import schedule_andes
from rl_autoscale.sim.schedulers.fastserve import schedule_fastserve
from rl_autoscale.sim.schedulers.sarathi import schedule_sarathi
from rl_autoscale.sim.schedulers.slos_serve import schedule_slos_serve
from rl_autoscale.sim.schedulers.trtllm import schedule_trtllm
from rl_autoscale.sim.schedulers.vllm import schedule_vllm
from rl_autoscale.sim.schedulers.vllm_v0 import schedule_vllm_v0


@hot
def mixed_duration_s(w, r):
    """Seconds of one iteration with prompt chunks."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    coefficients = w.coefficients[rep.pool]
    num_decode = 0 if rep.stalled else rep.num_decode
    context_tokens = 0.0 if rep.stalled else rep.decode_units * pool.unit_tokens + num_decode * rep.step_tokens
    return w.fleet[0].speed * (
        constant_s(w, r)
        + coefficients[0] * context_tokens
        + coefficients[2] * rep.chunk_pairs
        + coefficients[3] * rep.chunk_context
        + coefficients[4] * rep.num_prefill
        + coefficients[5] * (context_tokens + num_decode * rep.lost_tokens)
        + coefficients[6] * num_decode
    )


@njit
def schedule_any(w, r, now_s):
    """Ask the scheduler that the pool names."""
    kind = w.pool[w.rep[r].pool].scheduler
    if kind <= VLLM_PRIORITY:
        return schedule_vllm(w, r, now_s)
    if kind == VLLM_V0:
        return schedule_vllm_v0(w, r, now_s)
    if kind == SARATHI:
        return schedule_sarathi(w, r, now_s)
    if kind == FASTSERVE:
        return schedule_fastserve(w, r, now_s)
    if kind == SLOS_SERVE:
        return schedule_slos_serve(w, r, now_s)
    if kind == ANDES:
        return schedule_andes(w, r, now_s)
    return schedule_trtllm(w, r, now_s)


@hot
def plan(w, r, now_s, others):
    """Decide the replica's next iteration, or its next leap, and when it ends.

    Args:
        w: the fleet.
        r: its replica.
        now_s: the time.
        others: None where every pool has vLLM's scheduler and none is rebalanced; Numba then compiles no other.
    """
    rep = w.rep[r]
    rep.leap_start_s = now_s
    rep.num_prefill = 0
    rep.chunk_tokens = 0
    rep.chunk_pairs = 0.0
    rep.chunk_context = 0
    rep.stalled = 0
    iterations = schedule_vllm(w, r, now_s) if others is None else schedule_any(w, r, now_s)
    moved_blocks = rep.moved_blocks
    rep.moved_blocks = 0
    if iterations == 0:
        rep.event_s = math.inf
        rep.cuttable = 0
        schedule_event(w, r)
        return
    if moved_blocks > 0 or (rep.state == DRAINING and w.fleet[0].migrates):  # it looks for places at each one's end
        iterations = 1
    if rep.num_prefill > 0:
        duration_s = mixed_duration_s(w, r)
    else:
        rep.leap_iteration_s = w.fleet[0].speed * constant_s(w, r)
        duration_s = leap_duration_s(w, r, iterations)
    if moved_blocks > 0:  # beside the computation
        duration_s = max(duration_s, moved_blocks * w.pool[rep.pool].block_move_s)
    rep.leap_iterations = iterations
    rep.event_s = now_s + duration_s
    rep.cuttable = 1 if iterations > 1 else 0
    schedule_event(w, r)
