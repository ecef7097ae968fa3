"""Kernel, the gateway inside the simulation: arrivals are refused, dispatched, held or turned away.

The gateway sees what a live one sees: what it dispatched where, which streams have begun and ended. It does not see
output lengths to come, nor KV blocks, unless it routes by freeness. Requests in flight are held at or below the batch
cap of each replica, and the limit of their class; what does not fit waits in a bounded queue per class
(class_queue.py). router.py chooses replicas, estimate.py foresees waits, eviction.py makes room.
"""

from __future__ import annotations

import math

import numpy as np

from rl_autoscale.fleet.admission import moved_mean
from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.bridge import dispatch_bridge
from rl_autoscale.sim.class_queue import dequeue, enqueue, purge_timeouts
from rl_autoscale.sim.endings import drop
from rl_autoscale.sim.estimate import expected_first_token_s, leave_replica, refusal_ttft_s
from rl_autoscale.sim.eviction import evict_for, evictable_replica
from rl_autoscale.sim.layout import NO_SLOT, NONE, PREFIX_AFFINITY, QUEUE_FULL, REFUSED, ROUND_ROBIN
from rl_autoscale.sim.replica import cut_leap
from rl_autoscale.sim.router import attend, has_room, join_engine, remember_prompt, route
from rl_autoscale.sim.schedulers.slos_admission import give_up


@hot
def send(w, q, r, now_s, slot):
    """Dispatch a request to a replica.

    Args:
        w: the fleet.
        q: the request.
        r: the replica.
        now_s: the time.
        slot: replica whose event this is, or NO_SLOT; see `cut_leap`.
    """
    request = w.req[q]
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    if pool.router == ROUND_ROBIN:
        pool.round_robin_next = (r - pool.base + 1) % pool.num_slots
    elif pool.router == PREFIX_AFFINITY:
        remember_prompt(w, r, q)
    if pool.in_flight == 0:
        pool.busy_since_s = now_s
    request.replica = r
    request.dispatched_s = now_s
    tokens = np.int64(request.prompt_tokens)
    if request.on_host:  # a stream that goes on at once
        rep.seen_tokens += tokens
        rep.num_seen += 1
    else:
        request.awaited = 1
        rep.clearing_s = expected_first_token_s(w, r, tokens, now_s)
        rep.pending_tokens += tokens
        rep.pending_squares += tokens * tokens
    join_engine(w, r, q, now_s, slot)


@hot
def dispatch_queued(w, now_s, slot):
    """Send queued requests while there is room: the bridge's to decode replicas, then the gateway's.

    Classes go by priority, first come first served within a class.
    """
    if w.fleet[0].bridge_length > 0:
        dispatch_bridge(w, now_s, slot)
    for position in range(w.class_order.shape[0]):
        c = w.class_order[position]
        cls = w.cls[c]
        while cls.queue_length > 0:
            if cls.timeout_s < math.inf:
                purge_timeouts(w, c, now_s)
                if cls.queue_length == 0:
                    break
            if cls.in_flight >= cls.max_in_flight:
                break
            r = route(w, c, cls.queue_head, now_s, slot)
            if r < 0:
                break
            send(w, dequeue(w, c), r, now_s, slot)


@njit
def next_with_room(w, r):
    """The next replica of the pool, in the order of slots and round again, that has room; NONE if no other has any."""
    pool = w.pool[w.rep[r].pool]
    for step in range(1, pool.num_slots):
        other = pool.base + (r - pool.base + step) % pool.num_slots
        if has_room(w, other):
            return other
    return NONE


@njit
def forward_declined(w, r, now_s):
    """Send what a replica has declined to the next one with room; who finds none stays, as best effort."""
    rep = w.rep[r]
    while rep.declined_head >= 0:
        q = rep.declined_head
        rep.declined_head = w.req[q].next
        other = next_with_room(w, r)
        if other >= 0:
            w.pool[rep.pool].forwarded += 1
            leave_replica(w, r, q, now_s)
            send(w, q, other, now_s, r)
        else:
            give_up(w, q)
            attend(w, r, q, now_s, r)
    if w.fleet[0].queued > 0:
        dispatch_queued(w, now_s, r)


@njit
def dispatch_after_eviction(w, now_s):
    """Another replica may have room for the evicted request at once."""
    dispatch_queued(w, now_s, NO_SLOT)


@hot
def enter(w, q):
    """Fill the row of a request that arrives."""
    trace = w.trace[q]
    request = w.req[q]
    request.arrival_s = trace.arrival_s
    request.prompt_tokens = trace.prompt_tokens
    request.output_tokens = trace.output_tokens
    request.class_index = trace.class_index
    request.dispatched_s = math.nan
    request.scheduled_s = math.nan
    request.first_token_s = math.nan
    request.last_token_s = math.nan
    request.end_s = math.nan
    request.finish_iteration = 0
    request.generated_tokens = 0
    request.computed_tokens = 0
    request.chunk_tokens = 0
    request.replica = NONE
    request.outcome = 0
    request.slo_met = 0
    request.next = NONE
    request.prev = NONE
    request.in_batch = 0
    request.awaited = 0
    request.evict = 0
    request.num_preemptions = 0
    request.num_evictions = 0
    request.num_declined = 0
    request.rank = 0
    request.rank_s = 0.0
    request.level_s = 0.0
    request.idle_since_s = 0.0
    request.read_s = 0.0
    request.late_s = 0.0
    request.read_from_s = 0.0
    request.read_tokens = 0
    request.on_host = 0
    request.table_blocks = 0
    request.kv_in_bridge = 0


@hot
def arrive(w, q, now_s):
    """A request reaches the gateway: it is refused, dispatched, held, or turned away because the queue is full."""
    enter(w, q)
    c = w.req[q].class_index
    cls = w.cls[c]
    cls.arrived += 1
    cls.arrived_tokens += w.req[q].prompt_tokens
    cls.mean_prompt_tokens = moved_mean(cls.mean_prompt_tokens, cls.arrived, w.req[q].prompt_tokens)
    w.fleet[0].unresolved += 1
    if cls.queue_length > 0:
        purge_timeouts(w, c, now_s)
    r = NONE
    evicting = False
    if cls.queue_length == 0 and cls.in_flight < cls.max_in_flight:
        r = route(w, c, q, now_s, NO_SLOT)
        if r < 0 and cls.interactive and w.fleet[0].evict_batch:
            r = evictable_replica(w, c)
            evicting = r >= 0
    if cls.admission < math.inf and refusal_ttft_s(w, c, q, r, now_s) > cls.admission * cls.ttft_slo_s:
        drop(w, q, REFUSED, now_s)
    elif r >= 0:
        if evicting:
            rep = w.rep[r]
            evict_for(w, r, now_s)
            if rep.cuttable:  # one was marked, or the waiting queue's head left and the next one may fit
                cut_leap(w, r, now_s, NO_SLOT)
        send(w, q, r, now_s, NO_SLOT)
        if evicting and w.fleet[0].queued > 0:
            dispatch_after_eviction(w, now_s)
    elif cls.queue_length < cls.queue_limit:
        enqueue(w, q, False)
    else:
        drop(w, q, QUEUE_FULL, now_s)
