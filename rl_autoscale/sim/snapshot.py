"""Kernel: what a decision reads, filled in at the moment of the scrape; columns follow fleet/state.py."""

from __future__ import annotations

import math

from rl_autoscale.fleet.histogram import compiled_histogram_quantile
from rl_autoscale.fleet.jit import njit
from rl_autoscale.sim.class_queue import purge_timeouts
from rl_autoscale.sim.drafts import fraction_units
from rl_autoscale.sim.layout import OFF, READY, STARTING, TPOT_EDGES_S, TTFT_EDGES_S
from rl_autoscale.sim.replica import iteration_blocks, sync


@njit
def snapshot_pool(w, p, now_s, per_s, age_s):
    """One row of ``pool_state``."""
    pool = w.pool[p]
    last = w.last_pool[p]
    oldest_s = 0.0
    newest_s = math.inf
    running = 0
    waiting = 0
    pending = 0
    kv_used = 0
    fractions = 0
    for r in range(pool.base, pool.base + pool.num_slots):
        rep = w.rep[r]
        if rep.state == STARTING:
            oldest_s = max(oldest_s, now_s - rep.asked_s)
            newest_s = min(newest_s, now_s - rep.asked_s)
        elif rep.state != OFF:
            sync(w, r, now_s)
            running += rep.num_decode + rep.num_prefill + rep.num_parked
            waiting += rep.num_waiting
            pending += rep.pending_tokens
            if pool.token_shift > 0:
                fractions += fraction_units(w.residue[r], rep.iteration, pool.phase_mask, pool.token_shift)
            if rep.state == READY:
                kv_used += rep.kv_reserved if pool.contiguous else rep.kv_used + iteration_blocks(w, r)
    pool.generation_tokens = (pool.generation_units - fractions) >> pool.token_shift
    row = w.pool_state[p]
    row[0] = pool.ready
    row[1] = pool.starting
    row[2] = pool.draining
    row[3] = pool.target
    row[4] = oldest_s
    row[5] = newest_s if newest_s < math.inf else 0.0
    row[6] = running
    row[7] = waiting
    row[8] = pool.in_flight
    row[9] = pool.in_flight_interactive
    row[10] = pool.busy_interactive
    row[11] = pending
    row[12] = kv_used / (pool.kv_blocks * pool.ready) if pool.ready > 0 else 0.0
    row[13] = pool.cap
    num_gaps = pool.itl_count - last.itl_count
    row[14] = (pool.itl_sum_s - last.itl_sum_s) / num_gaps if num_gaps > 0 else math.nan
    row[15] = pool.preemptions - last.preemptions
    row[16] = pool.evictions - last.evictions
    row[17] = (pool.prompt_tokens - last.prompt_tokens) * per_s
    row[18] = (pool.generation_tokens - last.generation_tokens) * per_s
    row[19] = age_s
    w.last_pool[p] = w.pool[p]


@njit
def snapshot_class(w, c, now_s, per_s, age_s):
    """One row of ``class_state``."""
    purge_timeouts(w, c, now_s)
    cls = w.cls[c]
    last = w.last_cls[c]
    row = w.class_state[c]
    row[0] = (cls.arrived - last.arrived) * per_s
    row[1] = (cls.arrived_tokens - last.arrived_tokens) * per_s
    row[2] = cls.queue_length
    row[3] = cls.queue_tokens
    row[4] = now_s - w.req[cls.queue_head].arrival_s if cls.queue_length > 0 else 0.0
    row[5] = cls.in_flight
    num_first = cls.first_tokens - last.first_tokens
    row[6] = num_first * per_s
    row[7] = (cls.late_first_tokens - last.late_first_tokens) * per_s
    row[8] = (cls.ttft_sum_s - last.ttft_sum_s) / num_first if num_first > 0 else math.nan
    row[9] = compiled_histogram_quantile(w.ttft_hist[c], TTFT_EDGES_S, 0.95)
    num_tpot = cls.tpot_count - last.tpot_count
    row[10] = (cls.tpot_sum_s - last.tpot_sum_s) / num_tpot if num_tpot > 0 else math.nan
    row[11] = compiled_histogram_quantile(w.tpot_hist[c], TPOT_EDGES_S, 0.95)
    finished = cls.finished - last.finished
    row[12] = finished * per_s
    row[13] = (cls.met - last.met) * per_s
    row[14] = (cls.slow_answers - last.slow_answers) * per_s
    row[15] = (cls.output_tokens - last.output_tokens) / finished if finished > 0 else math.nan
    row[16] = (cls.refused - last.refused) * per_s
    dropped = cls.queue_full + cls.timed_out + cls.failed - last.queue_full - last.timed_out - last.failed
    row[17] = dropped * per_s
    row[18] = cls.admission
    row[19] = age_s
    w.last_cls[c] = w.cls[c]


@njit
def snapshot_stages(w, age_s):
    """``stage_state``."""
    fleet = w.fleet[0]
    row = w.stage_state
    row[0] = 0
    for r in range(w.rep.shape[0]):
        row[0] += w.rep[r].num_held
    row[1] = fleet.num_transfers
    row[2] = fleet.bridge_length
    row[3] = fleet.bridge_used
    row[4] = fleet.num_working
    row[5] = fleet.post_length
    row[6] = fleet.num_parked
    row[7] = age_s


@njit
def snapshot(w, now_s, age_s):
    """Fill ``pool_state``, ``class_state`` and ``stage_state``; columns are the fields of their telemetry in order."""
    fleet = w.fleet[0]
    window_s = now_s - fleet.snapshot_s
    per_s = 1.0 / window_s if window_s > 0.0 else math.nan
    for p in range(w.pool.shape[0]):
        snapshot_pool(w, p, now_s, per_s, age_s)
    for c in range(w.cls.shape[0]):
        snapshot_class(w, c, now_s, per_s, age_s)
    if fleet.bridge_limit + fleet.num_workers > 0:
        snapshot_stages(w, age_s)
    w.ttft_hist[:] = 0
    w.tpot_hist[:] = 0
    fleet.snapshot_s = now_s
