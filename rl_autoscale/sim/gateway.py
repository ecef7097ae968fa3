"""Kernel, the gateway inside the simulation: class queues, refusal, routing, eviction, and how every request ends.

The gateway sees what a live one sees: what it dispatched where, which streams have begun and ended. It does not see KV
blocks or output lengths to come. Requests in flight per replica are held at or below the batch cap; what does not
fit waits in a bounded queue per class.
"""

from __future__ import annotations

import math

import numpy as np

from rl_autoscale.fleet.admission import (
    corrected_clearing_s,
    estimate_queue_wait_s,
    prefill_time_s,
    residual_iteration_s,
    wait_ahead_s,
)
from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.layout import (
    FAILED,
    FINISHED,
    LEAST_LOADED,
    NO_ROOM,
    NO_SLOT,
    NONE,
    PACKING,
    PREFIX_AFFINITY,
    QUEUE_FULL,
    READY,
    REFUSED,
    ROUND_ROBIN,
    TIMED_OUT,
    TPOT_EDGES_S,
    TTFT_EDGES_S,
)
from rl_autoscale.sim.ordered import tree_argmin, tree_set
from rl_autoscale.sim.replica import (
    cut_leap,
    unload,
    waiting_insert,
    waiting_remove,
    wake,
)


@hot
def has_room(w, r):
    """Whether the gateway may dispatch to the replica."""
    rep = w.rep[r]
    return rep.state == READY and rep.in_flight < w.pool[rep.pool].cap


@hot
def update_route(w, r):
    """Refresh the replica's key in its pool's routing tree: smallest key is routed to first."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    if pool.router < LEAST_LOADED:
        return
    key = NO_ROOM
    if has_room(w, r):
        key = NO_ROOM - 1 - rep.in_flight if pool.router == PACKING else rep.in_flight
    tree_set(w.route_tree[rep.pool], pool.tree_size, r - pool.base, key)


@hot
def pick_replica(w, p, u):
    """A replica of the pool with room, or NONE.

    Args:
        w: the fleet.
        p: pool index.
        u: the request's routing random number in [0, 1).
    """
    pool = w.pool[p]
    if pool.ready == 0:
        return NONE
    if pool.router >= LEAST_LOADED:
        tree = w.route_tree[p]
        return pool.base + tree_argmin(tree, pool.tree_size) if tree[1] < NO_ROOM else NONE
    if pool.router == ROUND_ROBIN:
        for step in range(pool.num_slots):
            slot = (pool.round_robin_next + step) % pool.num_slots
            if has_room(w, pool.base + slot):
                return pool.base + slot
        return NONE
    # Power of two choices (Mitzenmacher): two of the replicas with room, the less loaded one.
    num_open = 0
    for slot in range(pool.num_slots):
        if has_room(w, pool.base + slot):
            num_open += 1
    if num_open == 0:
        return NONE
    first = int(u * num_open)
    second = int((u * num_open - first) * num_open)
    best = NONE
    seen = 0
    for slot in range(pool.num_slots):
        r = pool.base + slot
        if has_room(w, r):
            if seen in (first, second) and (best < 0 or w.rep[r].in_flight < w.rep[best].in_flight):
                best = r
            seen += 1
    return best


@njit
def affine_replica(w, c, q):
    """The replica that was last sent the longest prefix of a prompt, unless it is full or has more than its share.

    Its share is 1.25 times the pool's mean load: consistent hashing with bounded loads (Mirrokni et al., SODA 2018).
    """
    prompt = w.prompt[q]
    for k in range(prompt.num_hashes - 1, -1, -1):
        sent = w.sent_to[w.hash_ids[prompt.hash_start + k]]
        if sent < 0:
            continue
        r = sent & 0xFFFFFFFF
        rep = w.rep[r]
        pool = w.pool[rep.pool]
        serves = pool.serves_interactive if w.cls[c].interactive else pool.serves_batch
        if rep.state != READY or rep.generation != sent >> 32 or not serves:
            continue
        within_share = 4 * np.int64(rep.in_flight) * pool.ready < 5 * (pool.in_flight + 1)
        return r if within_share and has_room(w, r) else NONE
    return NONE


@hot
def route(w, c, q):
    """Where to send a request: the pools that may serve its class are tried in order; NONE if all are full.

    Pools of one role stand beside each other. LEAST_LOADED compares what each of them offers by the time in which the
    replica would work off what it has and the newcomer; so does PREFIX_AFFINITY where no replica is preferred; the
    other rules take the first.
    """
    router = w.pool[0].router
    if router == PREFIX_AFFINITY:
        preferred = affine_replica(w, c, q)
        if preferred >= 0:
            return preferred
    u = w.route_u[q] if q < w.route_u.shape[0] else 0.0  # the other routers have no numbers
    best = NONE
    best_s = math.inf
    best_role = NONE
    for position in range(w.class_pools.shape[1]):
        p = w.class_pools[c, position]
        if p < 0:
            break
        pool = w.pool[p]
        if best >= 0 and pool.role != best_role:
            break
        r = pick_replica(w, p, u)
        if r < 0:
            continue
        if router != LEAST_LOADED and router != PREFIX_AFFINITY:
            return r
        work_s = (w.rep[r].in_flight + 1) * pool.request_s
        if work_s < best_s:
            best = r
            best_s = work_s
            best_role = pool.role
    return best


@njit
def evictable_replica(w, c):
    """Replica that may serve the class and holds the most unmarked batch requests; NONE if none has any."""
    best = NONE
    most = 0
    for position in range(w.class_pools.shape[1]):
        p = w.class_pools[c, position]
        if p < 0:
            break
        pool = w.pool[p]
        if pool.serves_batch == 0 or pool.in_flight == pool.in_flight_interactive:
            continue
        for r in range(pool.base, pool.base + pool.num_slots):
            rep = w.rep[r]
            batch = rep.in_flight - rep.in_flight_interactive - rep.num_evict_marked
            if rep.state == READY and batch > most:
                best = r
                most = batch
    return best


@hot
def count_in_flight(w, r, c, change):
    """Book one request more or less in flight on a replica."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    rep.in_flight += change
    pool.in_flight += change
    w.cls[c].in_flight += change
    if w.cls[c].interactive:
        before = rep.in_flight_interactive
        rep.in_flight_interactive = before + change
        pool.in_flight_interactive += change
        if before == 0:
            pool.busy_interactive += 1
        elif before + change == 0:
            pool.busy_interactive -= 1
    update_route(w, r)


@hot
def pending_time_s(w, r, more_tokens):
    """How long the replica's pending prompts take from their beginning, with one more prompt of so many tokens."""
    rep = w.rep[r]
    return prefill_time_s(
        rep.pending_tokens + more_tokens,
        rep.pending_squares + more_tokens * more_tokens,
        rep.num_seen,
        rep.seen_tokens,
        w.pool[rep.pool].token_budget,
        w.token_time[rep.pool],
        w.coefficients[rep.pool],
    )


@hot
def expected_first_token_s(w, r, prompt_tokens, now_s):
    """When a prompt sent to the replica now should have its first token."""
    rep = w.rep[r]
    residual_s = residual_iteration_s(
        rep.num_seen,
        rep.seen_tokens,
        w.pool[rep.pool].token_budget,
        w.token_time[rep.pool],
        w.coefficients[rep.pool],
    )
    ahead_s = pending_time_s(w, r, 0)
    own_s = pending_time_s(w, r, prompt_tokens) - ahead_s
    return now_s + wait_ahead_s(now_s, rep.clearing_s, ahead_s, residual_s) + own_s


@hot
def no_longer_pending(w, r, tokens, now_s):
    """A prompt that was awaited has its first token, or has left: correct the replica's clearing time."""
    rep = w.rep[r]
    rep.pending_tokens -= tokens
    rep.pending_squares -= tokens * tokens
    rep.clearing_s = corrected_clearing_s(now_s, rep.clearing_s, pending_time_s(w, r, 0))


@hot
def count_seen(w, r, q, now_s):
    """The stream's first token since its dispatch was seen: its prompt is no longer pending."""
    rep = w.rep[r]
    request = w.req[q]
    if request.awaited:
        request.awaited = 0
        rep.seen_tokens += request.prompt_tokens
        rep.num_seen += 1
        no_longer_pending(w, r, np.int64(request.prompt_tokens), now_s)


@hot
def leave_replica(w, r, q, now_s):
    """Undo what dispatch booked: the request is no longer on the replica."""
    rep = w.rep[r]
    request = w.req[q]
    if request.awaited:
        request.awaited = 0
        no_longer_pending(w, r, np.int64(request.prompt_tokens), now_s)
    else:
        rep.seen_tokens -= request.prompt_tokens
        rep.num_seen -= 1
    count_in_flight(w, r, request.class_index, -1)


@hot
def end_request(w, q, outcome, now_s):
    """Record how a request ended; from here on nothing touches it."""
    request = w.req[q]
    request.outcome = outcome
    request.end_s = now_s
    w.fleet[0].unresolved -= 1


@njit
def drop(w, q, outcome, now_s):
    """End a request without service: refused, queue full, timed out or failed. Always a miss."""
    cls = w.cls[w.req[q].class_index]
    if outcome == REFUSED:
        cls.refused += 1
    elif outcome == QUEUE_FULL:
        cls.queue_full += 1
    elif outcome == TIMED_OUT:
        cls.timed_out += 1
    elif outcome == FAILED:
        cls.failed += 1
    if not late_first_token(w, q):
        cls.missed += 1
    end_request(w, q, outcome, now_s)


@hot
def late_first_token(w, q):
    """Whether the request's first token came too late (and was booked as a miss then)."""
    request = w.req[q]
    return request.first_token_s - request.arrival_s > w.cls[request.class_index].ttft_slo_s


@hot
def histogram_add(histogram, edges, value):
    """Add to a histogram whose last column counts what lies beyond the last edge."""
    low = 0
    high = edges.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if edges[middle] < value:
            low = middle + 1
        else:
            high = middle
    histogram[low] += 1


@hot
def first_token(w, r, q, now_s):
    """Book a request's first token: TTFT, and a miss as soon as it is one."""
    request = w.req[q]
    cls = w.cls[request.class_index]
    request.first_token_s = now_s
    ttft_s = now_s - request.arrival_s
    w.pool[w.rep[r].pool].prompt_tokens += request.prompt_tokens
    cls.first_tokens += 1
    cls.ttft_sum_s += ttft_s
    histogram_add(w.ttft_hist[request.class_index], TTFT_EDGES_S, ttft_s)
    if ttft_s > cls.ttft_slo_s:
        cls.missed += 1


@hot
def finish(w, r, q, now_s):
    """A request's last token is out: judge its SLOs and let it go."""
    request = w.req[q]
    cls = w.cls[request.class_index]
    pool = w.pool[w.rep[r].pool]
    tpot_s = 0.0
    if request.output_tokens > 1:
        tpot_s = (now_s - request.first_token_s) / (request.output_tokens - 1)
        cls.tpot_sum_s += tpot_s
        cls.tpot_count += 1
        histogram_add(w.tpot_hist[request.class_index], TPOT_EDGES_S, tpot_s)
    cls.finished += 1
    cls.output_tokens += request.output_tokens
    late = late_first_token(w, q)
    if not late:
        if tpot_s <= cls.tpot_slo_s and now_s - request.arrival_s <= cls.deadline_s:
            request.slo_met = 1
            cls.met += 1
        else:
            cls.missed += 1
    request.generated_tokens = request.output_tokens
    pool.residence_count += 1
    pool.residence_s += (now_s - request.dispatched_s - pool.residence_s) / min(pool.residence_count, 64)
    if request.evict:
        request.evict = 0
        w.rep[r].num_evict_marked -= 1
    leave_replica(w, r, q, now_s)
    end_request(w, q, FINISHED, now_s)


@njit
def enqueue(w, q, front):
    """Hold a request in its class's gateway queue."""
    request = w.req[q]
    cls = w.cls[request.class_index]
    request.prev = NONE
    request.next = NONE
    if cls.queue_length == 0:
        cls.queue_head = q
        cls.queue_tail = q
    elif front:
        request.next = cls.queue_head
        cls.queue_head = q
    else:
        w.req[cls.queue_tail].next = q
        cls.queue_tail = q
    cls.queue_length += 1
    cls.queue_tokens += request.prompt_tokens
    w.fleet[0].queued += 1


@hot
def dequeue(w, c):
    """Take the head of a class's gateway queue."""
    cls = w.cls[c]
    q = cls.queue_head
    cls.queue_head = w.req[q].next
    cls.queue_length -= 1
    if cls.queue_length == 0:
        cls.queue_head = NONE
        cls.queue_tail = NONE
    cls.queue_tokens -= w.req[q].prompt_tokens
    w.fleet[0].queued -= 1
    return q


@njit
def purge_timeouts(w, c, now_s):
    """Drop the requests at the head of the queue whose patience has ended; booked at the moment it ended.

    Only requests without a first token time out, and only once they reach the head: within a class the oldest is first.
    """
    cls = w.cls[c]
    while cls.queue_length > 0:
        request = w.req[cls.queue_head]
        if request.first_token_s >= 0.0 or request.arrival_s + cls.timeout_s > now_s:
            return
        q = dequeue(w, c)
        drop(w, q, TIMED_OUT, w.req[q].arrival_s + cls.timeout_s)


@njit
def requeue(w, q, now_s):
    """Put a request that lost its replica in front of its class's queue, if its patience lasts.

    Those whose patience has ended go first, so that nobody hides behind a stream that has begun and cannot time out.
    """
    c = w.req[q].class_index
    purge_timeouts(w, c, now_s)
    if not w.req[q].first_token_s >= 0.0 and w.req[q].arrival_s + w.cls[c].timeout_s <= now_s:
        drop(w, q, TIMED_OUT, now_s)
    else:
        enqueue(w, q, True)


@njit
def remember_prompt(w, r, q):
    """Note for every prefix of a prompt that it was last sent to this replica."""
    prompt = w.prompt[q]
    for k in range(prompt.num_hashes):
        w.sent_to[w.hash_ids[prompt.hash_start + k]] = (np.int64(w.rep[r].generation) << 32) | r


@hot
def send(w, q, r, now_s, slot):
    """Dispatch a request to a replica: it joins the engine's waiting queue and is seen at the next iteration.

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
    request.replica = r
    request.dispatched_s = now_s
    request.awaited = 1
    tokens = np.int64(request.prompt_tokens)
    rep.clearing_s = expected_first_token_s(w, r, tokens, now_s)
    rep.pending_tokens += tokens
    rep.pending_squares += tokens * tokens
    count_in_flight(w, r, request.class_index, 1)
    waiting_insert(w, r, q, False)
    if rep.event_s == math.inf:
        wake(w, r, now_s)
    elif rep.cuttable and rep.wait_head == q:
        cut_leap(w, r, now_s, slot)


@hot
def dispatch_queued(w, now_s, slot):
    """Send queued requests while there is room, classes by priority, first come first served within a class."""
    for position in range(w.class_order.shape[0]):
        c = w.class_order[position]
        cls = w.cls[c]
        while cls.queue_length > 0:
            if cls.timeout_s < math.inf:
                purge_timeouts(w, c, now_s)
                if cls.queue_length == 0:
                    break
            r = route(w, c, cls.queue_head)
            if r < 0:
                break
            send(w, dequeue(w, c), r, now_s, slot)


@njit
def evict_for(w, r, now_s):
    """Free one place on a replica by sending a batch request back to the gateway's queue.

    A request still waiting in the engine leaves at once; else the youngest running one leaves when the iteration ends.
    """
    rep = w.rep[r]
    q = rep.wait_tail
    while q >= 0:
        if not w.cls[w.req[q].class_index].interactive:
            waiting_remove(w, r, q)
            return_to_queue(w, r, q, now_s)
            return
        q = w.req[q].prev
    q = rep.batch_tail
    while q >= 0:
        request = w.req[q]
        if not w.cls[request.class_index].interactive and not request.evict:
            request.evict = 1
            rep.num_evict_marked += 1
            return
        q = request.prev


@njit
def return_to_queue(w, r, q, now_s):
    """An evicted request, already off the engine, goes back to its class's queue; it keeps its tokens so far."""
    leave_replica(w, r, q, now_s)
    w.req[q].num_evictions += 1
    w.pool[w.rep[r].pool].evictions += 1
    requeue(w, q, now_s)


@njit
def complete_evictions(w, r, now_s):
    """At an iteration's end, take the marked batch requests off the engine, youngest first.

    All of them are still in the batch: they were marked during the iteration that ends; preemption is at the next.
    """
    rep = w.rep[r]
    q = rep.batch_tail
    while q >= 0 and rep.num_evict_marked > 0:
        before = w.req[q].prev
        if w.req[q].evict:
            w.req[q].evict = 0
            rep.num_evict_marked -= 1
            unload(w, r, q)
            return_to_queue(w, r, q, now_s)
        q = before


@njit
def requests_ahead(w, c, now_s):
    """Requests in gateway queues that are served before a new one of this class."""
    ahead = 0
    for other in range(w.cls.shape[0]):
        if w.cls[other].priority <= w.cls[c].priority:
            purge_timeouts(w, other, now_s)
            ahead += w.cls[other].queue_length
    return ahead


@hot
def estimate_ttft_s(w, c, q, r, has_place, now_s):
    """What the gateway expects the time to first token to be; see fleet/admission.py.

    Args:
        w: the fleet.
        c: class of the request.
        q: the request.
        r: replica the router would choose, or NONE.
        has_place: whether it would be dispatched now.
        now_s: the time.
    """
    wait_s = 0.0
    p = w.class_pools[c, 0]
    if not has_place:
        in_flight = 0
        residence_s = 0.0
        ready = 0
        for position in range(w.class_pools.shape[1]):
            candidate = w.class_pools[c, position]
            if candidate >= 0:
                pool = w.pool[candidate]
                in_flight += pool.in_flight
                ready += pool.ready
                if pool.ready > 0:
                    residence_s = max(residence_s, pool.residence_s)
        if ready > 0:
            wait_s = estimate_queue_wait_s(requests_ahead(w, c, now_s), in_flight, residence_s)
        else:
            pool = w.pool[p]
            wait_s = pool.wake_mean_s if pool.sleeping + pool.waking > 0 else pool.startup_mean_s
    tokens = np.int64(w.req[q].prompt_tokens)
    if has_place:
        return expected_first_token_s(w, r, tokens, now_s) - now_s
    return wait_s + prefill_time_s(
        tokens, tokens * tokens, 0, 0, w.pool[p].token_budget, w.token_time[p], w.coefficients[p]
    )


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
    request.table_blocks = 0


@hot
def arrive(w, q, now_s):
    """A request reaches the gateway: it is refused, dispatched, held, or turned away because the queue is full."""
    enter(w, q)
    c = w.req[q].class_index
    cls = w.cls[c]
    cls.arrived += 1
    cls.arrived_tokens += w.req[q].prompt_tokens
    w.fleet[0].unresolved += 1
    if cls.queue_length > 0:
        purge_timeouts(w, c, now_s)
    r = NONE
    evicting = False
    if cls.queue_length == 0:
        r = route(w, c, q)
        if r < 0 and cls.interactive and w.fleet[0].evict_batch:
            r = evictable_replica(w, c)
            evicting = r >= 0
    if cls.admission < math.inf and estimate_ttft_s(w, c, q, r, r >= 0, now_s) > cls.admission * cls.ttft_slo_s:
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
