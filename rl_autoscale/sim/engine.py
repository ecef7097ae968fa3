"""Kernel, the fleet as a whole: events in time order, replicas that come and go, and the snapshot a decision reads.

`run_until` is the compiled engine's event loop. At equal times replica events come before arrivals, and among replicas
the lowest slot is first. Entry points at the bottom are the only functions called from Python.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from rl_autoscale.fleet.jit import cached_njit, hot, njit
from rl_autoscale.sim.gateway import (
    arrive,
    complete_evictions,
    count_seen,
    dispatch_queued,
    drop,
    finish,
    first_token,
    leave_replica,
    purge_timeouts,
    requeue,
    update_route,
)
from rl_autoscale.sim.kv_cache import empty_cache, free_blocks
from rl_autoscale.sim.layout import (
    BLOCK,
    DRAINING,
    FAILED,
    NO_SLOT,
    NONE,
    OFF,
    READY,
    STARTING,
    TPOT_EDGES_S,
    TTFT_EDGES_S,
    UNFINISHED,
    World,
)
from rl_autoscale.sim.replica import (
    batch_remove,
    clear_replica,
    commit_decode,
    heap_remove,
    join_decode,
    plan,
    schedule_event,
    sync,
    tree_argmin,
)


@njit
def accrue(w, p, now_s):
    """Integrate replica-seconds up to now; call before any change of the counts."""
    pool = w.pool[p]
    elapsed_s = now_s - pool.accrued_to_s
    pool.replica_s += elapsed_s * (pool.ready + pool.starting + pool.draining)
    pool.ready_s += elapsed_s * pool.ready
    pool.accrued_to_s = now_s


@hot
def complete_prefills(w, r, now_s):
    """Book the prompt chunks of the iteration that just ended; they are the batch's tail."""
    rep = w.rep[r]
    q = rep.batch_tail
    for _ in range(rep.num_prefill - 1):
        q = w.req[q].prev
    for _ in range(rep.num_prefill):
        request = w.req[q]
        after = request.next
        request.computed_tokens += request.chunk_tokens
        request.chunk_tokens = 0
        if request.computed_tokens == request.prompt_tokens + request.generated_tokens:
            if rep.partial == q:
                rep.partial = NONE
            request.generated_tokens += 1
            w.pool[rep.pool].generation_tokens += 1
            if not request.first_token_s >= 0.0:
                first_token(w, r, q, now_s)
            count_seen(w, r, q, now_s)
            if request.generated_tokens < request.output_tokens:
                join_decode(w, r, q)
            else:
                free_blocks(w, r, q, request.computed_tokens, True)
                batch_remove(w, r, q)
                finish(w, r, q, now_s)
        q = after
    rep.num_prefill = 0


@hot
def complete_decodes(w, r, now_s):
    """Let the sequences go whose last token came with this iteration."""
    rep = w.rep[r]
    heap = w.heap[r]
    while rep.heap_size > 0 and heap[0] >> 32 == rep.iteration:
        q = heap[0] & 0xFFFFFFFF
        heap_remove(heap, rep.heap_size, 0)
        rep.heap_size -= 1
        request = w.req[q]
        computed = request.prompt_tokens + request.output_tokens - 1
        w.residue[r, (rep.iteration - computed) & (BLOCK - 1)] -= 1
        rep.num_decode -= 1
        rep.decode_tokens -= computed
        free_blocks(w, r, q, computed, True)
        request.finish_iteration = 0
        batch_remove(w, r, q)
        finish(w, r, q, now_s)


@hot
def end_iterations(w, r, now_s):
    """The replica's iterations in progress end: book them and let finished and evicted requests go."""
    rep = w.rep[r]
    commit_decode(w, r, rep.leap_iterations, now_s - rep.leap_start_s)
    rep.cuttable = 0
    complete_decodes(w, r, now_s)
    if rep.num_prefill > 0:
        complete_prefills(w, r, now_s)
    if rep.num_evict_marked > 0:
        complete_evictions(w, r, now_s)


@njit
def retire(w, r, now_s):
    """A draining replica has nothing left to do and leaves."""
    p = w.rep[r].pool
    accrue(w, p, now_s)
    w.pool[p].draining -= 1
    clear_replica(w, r)


@njit
def become_ready(w, r, now_s):
    """A starting replica takes requests from now on."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    accrue(w, rep.pool, now_s)
    rep.state = READY
    rep.event_s = math.inf
    pool.starting -= 1
    pool.ready += 1
    if pool.prefix_caching:
        empty_cache(w, r)
    schedule_event(w, r)
    update_route(w, r)


@njit
def start_replica(w, p, now_s):
    """Start a replica in a free slot; returns False when all slots are taken (too many are draining)."""
    pool = w.pool[p]
    for r in range(pool.base, pool.base + pool.num_slots):
        rep = w.rep[r]
        if rep.state == OFF:
            draw = pool.num_starts % w.startup_s.shape[1]
            pool.num_starts += 1
            pool.starting += 1
            rep.state = STARTING
            rep.asked_s = now_s
            rep.event_s = now_s + w.startup_s[p, draw]
            rep.crash_s = rep.event_s + w.life_s[p, draw]
            schedule_event(w, r)
            return True
    return False


@njit
def reclaim_replica(w, p):
    """Return a draining replica to service: the cheapest capacity there is."""
    pool = w.pool[p]
    for r in range(pool.base, pool.base + pool.num_slots):
        if w.rep[r].state == DRAINING:
            w.rep[r].state = READY
            pool.draining -= 1
            pool.ready += 1
            pool.reclaimed += 1
            update_route(w, r)
            return


@njit
def cancel_start(w, p):
    """Give up the newest start."""
    pool = w.pool[p]
    newest = NONE
    for r in range(pool.base, pool.base + pool.num_slots):
        if w.rep[r].state == STARTING and (newest < 0 or w.rep[r].asked_s >= w.rep[newest].asked_s):
            newest = r
    pool.starting -= 1
    pool.cancelled_starts += 1
    clear_replica(w, newest)


@njit
def drain_replica(w, p):
    """Take the ready replica with the least interactive work, then the least work, out of service."""
    pool = w.pool[p]
    best = NONE
    for r in range(pool.base, pool.base + pool.num_slots):
        rep = w.rep[r]
        if rep.state == READY and (
            best < 0
            or rep.in_flight_interactive < w.rep[best].in_flight_interactive
            or (
                rep.in_flight_interactive == w.rep[best].in_flight_interactive
                and rep.in_flight <= w.rep[best].in_flight
            )
        ):
            best = r
    pool.ready -= 1
    w.rep[best].state = DRAINING
    update_route(w, best)
    if w.rep[best].in_flight == 0:
        clear_replica(w, best)
    else:
        pool.draining += 1


@njit
def reconcile(w, p, now_s):
    """Bring ready + starting to the target: reclaim before starting, cancel before draining."""
    pool = w.pool[p]
    accrue(w, p, now_s)
    while pool.ready + pool.starting < pool.target:
        if pool.draining > 0:
            reclaim_replica(w, p)
        elif not start_replica(w, p, now_s):
            break
    while pool.ready + pool.starting > pool.target:
        if pool.starting > 0:
            cancel_start(w, p)
        else:
            drain_replica(w, p)


@njit
def crash(w, r, now_s):
    """A replica dies: streams that have begun fail, the rest go back to the front of their queues; it is replaced."""
    rep = w.rep[r]
    p = rep.pool
    pool = w.pool[p]
    sync(w, r, now_s)
    accrue(w, p, now_s)
    if rep.state == READY:
        pool.ready -= 1
    else:
        pool.draining -= 1
    pool.crashes += 1
    rep.state = OFF
    for waiting in (True, False):
        # Youngest first, so that each goes in front of the younger ones.
        q = rep.wait_tail if waiting else rep.batch_tail
        while q >= 0:
            before = w.req[q].prev
            lose_request(w, r, q, now_s)
            q = before
    clear_replica(w, r)
    update_route(w, r)
    reconcile(w, p, now_s)


@njit
def lose_request(w, r, q, now_s):
    """What becomes of a request whose replica crashed."""
    request = w.req[q]
    request.in_batch = 0
    request.evict = 0
    request.computed_tokens = 0
    request.chunk_tokens = 0
    request.finish_iteration = 0
    leave_replica(w, r, q, now_s)
    if request.first_token_s >= 0.0:
        drop(w, q, FAILED, now_s)
    else:
        requeue(w, q, now_s)


@njit
def change_replica(w, r, now_s):
    """A replica becomes ready or dies."""
    if w.rep[r].state == STARTING:
        become_ready(w, r, now_s)
    else:
        crash(w, r, now_s)


@njit
def run_until(w, until_s):
    """Handle every event at or before a time.

    Each event: book what happened, refill replicas from the gateway's queues, then let the replica whose iteration
    ended plan its next one.
    """
    fleet = w.fleet[0]
    tree = w.event_tree
    size = fleet.event_tree_size
    num_requests = fleet.num_requests
    arrival_s = w.trace[fleet.next_arrival].arrival_s if fleet.next_arrival < num_requests else math.inf
    while True:
        event_s = tree[1]
        if event_s > arrival_s:
            if arrival_s > until_s:
                break
            fleet.num_events += 1
            fleet.now_s = arrival_s
            arrive(w, fleet.next_arrival, arrival_s)
            fleet.next_arrival += 1
            arrival_s = w.trace[fleet.next_arrival].arrival_s if fleet.next_arrival < num_requests else math.inf
            continue
        if event_s > until_s or event_s == math.inf:
            break
        fleet.num_events += 1
        fleet.now_s = event_s
        r = tree_argmin(tree, size)
        rep = w.rep[r]
        iterating = rep.state != STARTING and rep.event_s < rep.crash_s
        if iterating:
            end_iterations(w, r, event_s)
        else:
            change_replica(w, r, event_s)
        if fleet.queued > 0:
            dispatch_queued(w, event_s, r)
        if iterating:
            if rep.state == DRAINING and rep.in_flight == 0:
                retire(w, r, event_s)
            else:
                plan(w, r, event_s)
    if until_s < math.inf:
        fleet.now_s = until_s


@njit
def quantile_from_histogram(histogram, edges, share):
    """Prometheus' histogram_quantile: linear inside the bucket; the last edge for what lies beyond; NaN when empty."""
    total = histogram.sum()
    if total == 0:
        return math.nan
    rank = share * total
    below = 0
    for column in range(edges.shape[0]):
        if below + histogram[column] >= rank:
            low = edges[column - 1] if column > 0 else 0.0
            return low + (edges[column] - low) * (rank - below) / histogram[column]
        below += histogram[column]
    return edges[-1]


@njit
def snapshot(w, now_s, age_s):
    """Fill ``pool_state`` and ``class_state``; columns are the fields of PoolTelemetry and ClassTelemetry in order."""
    fleet = w.fleet[0]
    window_s = now_s - fleet.snapshot_s
    per_s = 1.0 / window_s if window_s > 0.0 else math.nan
    for p in range(w.pool.shape[0]):
        snapshot_pool(w, p, now_s, per_s, age_s)
    for c in range(w.cls.shape[0]):
        snapshot_class(w, c, now_s, per_s, age_s)
    w.ttft_hist[:] = 0
    w.tpot_hist[:] = 0
    fleet.snapshot_s = now_s


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
    for r in range(pool.base, pool.base + pool.num_slots):
        rep = w.rep[r]
        if rep.state == STARTING:
            oldest_s = max(oldest_s, now_s - rep.asked_s)
            newest_s = min(newest_s, now_s - rep.asked_s)
        elif rep.state != OFF:
            sync(w, r, now_s)
            running += rep.num_decode + rep.num_prefill
            waiting += rep.num_waiting
            pending += rep.pending_tokens
            if rep.state == READY:
                kv_used += rep.kv_used + w.residue[r, rep.iteration & (BLOCK - 1)]
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
    row[7] = (cls.ttft_sum_s - last.ttft_sum_s) / num_first if num_first > 0 else math.nan
    row[8] = quantile_from_histogram(w.ttft_hist[c], TTFT_EDGES_S, 0.95)
    num_tpot = cls.tpot_count - last.tpot_count
    row[9] = (cls.tpot_sum_s - last.tpot_sum_s) / num_tpot if num_tpot > 0 else math.nan
    row[10] = quantile_from_histogram(w.tpot_hist[c], TPOT_EDGES_S, 0.95)
    finished = cls.finished - last.finished
    row[11] = finished * per_s
    row[12] = (cls.met - last.met) * per_s
    row[13] = (cls.output_tokens - last.output_tokens) / finished if finished > 0 else math.nan
    row[14] = (cls.refused - last.refused) * per_s
    dropped = cls.queue_full + cls.timed_out + cls.failed - last.queue_full - last.timed_out - last.failed
    row[15] = dropped * per_s
    row[16] = cls.admission
    row[17] = age_s
    w.last_cls[c] = w.cls[c]


@njit
def apply_decision(w, targets, caps, admission):
    """Set absolute targets now; see ScalingDecision."""
    now_s = w.fleet[0].now_s
    for c in range(w.cls.shape[0]):
        w.cls[c].admission = admission[c]
    for p in range(w.pool.shape[0]):
        pool = w.pool[p]
        pool.target = targets[p]
        if pool.cap != caps[p]:
            pool.cap = caps[p]
            for r in range(pool.base, pool.base + pool.num_slots):
                update_route(w, r)
        reconcile(w, p, now_s)
    if w.fleet[0].queued > 0:
        dispatch_queued(w, now_s, NO_SLOT)


@njit
def initialise(w):
    """Make the initial replicas ready at time 0 and take the first snapshot."""
    for r in range(w.rep.shape[0]):
        clear_replica(w, r)
        update_route(w, r)
    for p in range(w.pool.shape[0]):
        for _ in range(w.pool[p].target):
            start_replica(w, p, 0.0)
        pool = w.pool[p]
        for r in range(pool.base, pool.base + pool.num_slots):
            if w.rep[r].state == STARTING:
                w.rep[r].crash_s -= w.rep[r].event_s
                w.rep[r].event_s = 0.0
                become_ready(w, r, 0.0)
    snapshot(w, 0.0, 0.0)


@njit
def cut_off(w, now_s):
    """Close the books: whatever has not ended is UNFINISHED, a miss."""
    for q in range(w.fleet[0].next_arrival):
        request = w.req[q]
        if request.outcome == 0:
            if not request.first_token_s - request.arrival_s > w.cls[request.class_index].ttft_slo_s:
                w.cls[request.class_index].missed += 1
            request.outcome = UNFINISHED
            request.end_s = now_s
    w.fleet[0].unresolved = 0


@njit
def world_of(batch, e):
    """One fleet of a batch, as views."""
    return World(
        batch.trace[e],
        batch.req[e],
        batch.rep[e],
        batch.pool[e],
        batch.cls[e],
        batch.fleet[e],
        batch.heap[e],
        batch.residue[e],
        batch.event_tree[e],
        batch.route_tree[e],
        batch.token_time[e],
        batch.coefficients[e],
        batch.class_pools,
        batch.class_order,
        batch.startup_s[e],
        batch.life_s[e],
        batch.route_u[e],
        batch.ttft_hist[e],
        batch.tpot_hist[e],
        batch.last_pool[e],
        batch.last_cls[e],
        batch.pool_state[e],
        batch.class_state[e],
        batch.kv[e],
        batch.prompt[e],
        batch.hash_ids[e],
        batch.table[e],
    )


INITIALISE, STEP, CUT_OFF, RUN = 0, 1, 2, 3
"""What `advance` is asked to do; one entry point, because each would compile the whole engine again."""


def _source_digest() -> str:
    folder = Path(__file__).parent
    files = [folder / name for name in ("layout.py", "kv_cache.py", "replica.py", "gateway.py", "engine.py")]
    files += [folder.parent / "fleet" / name for name in ("jit.py", "admission.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _compile_entry(source_digest: str):
    # Numba keys its disk cache on the entry's own file only; a digest of all kernel files in the closure makes an edit
    # of any of them a cache miss.
    @cached_njit
    def advance(batch, which, operation, targets, caps, admission, until_s, age_s):
        """Work on the fleets with the indices ``which``, one after the other.

        Args:
            batch: World with a leading fleet dimension.
            which: shape (n,), int64.
            operation: INITIALISE a loaded episode; STEP: apply the decision, run to ``until_s`` and take the snapshot
                ``age_s`` before it; RUN to ``until_s`` without a decision; CUT_OFF: close the books.
            targets: shape (num_fleets, num_pools), int64; read by STEP.
            caps: the same shape; read by STEP.
            admission: shape (num_fleets, num_classes), float64; read by STEP.
            until_s: shape (num_fleets,).
            age_s: seconds.
        """
        digest = source_digest  # noqa: F841
        for position in range(which.shape[0]):
            e = which[position]
            w = world_of(batch, e)
            if operation == INITIALISE:
                initialise(w)
                continue
            if operation == CUT_OFF:
                cut_off(w, w.fleet[0].now_s)
                continue
            if operation == STEP:
                apply_decision(w, targets[e], caps[e], admission[e])
            for leg in range(2):
                run_until(w, until_s[e] - age_s if leg == 0 else until_s[e])
                if leg == 0:
                    snapshot(w, until_s[e] - age_s, age_s)
            for p in range(w.pool.shape[0]):
                accrue(w, p, w.fleet[0].now_s)
            for c in range(w.cls.shape[0]):
                purge_timeouts(w, c, w.fleet[0].now_s)

    return advance


advance = _compile_entry(_source_digest())
