"""Kernel, a replica's two lists: its batch in admission order, and its engine's waiting queue."""

from __future__ import annotations

from rl_autoscale.fleet.jit import hot
from rl_autoscale.sim.kv_cache import reserved_blocks
from rl_autoscale.sim.layout import NONE


@hot
def batch_append(w, r, q):
    """Append a request to the replica's batch (linked list in admission order)."""
    rep = w.rep[r]
    request = w.req[q]
    request.in_batch = 1
    request.next = NONE
    request.prev = rep.batch_tail
    if rep.batch_tail >= 0:
        w.req[rep.batch_tail].next = q
    else:
        rep.batch_head = q
    rep.batch_tail = q
    if w.pool[rep.pool].reserves:
        rep.kv_reserved += reserved_blocks(w, r, q)


@hot
def batch_remove(w, r, q):
    """Unlink a request from the replica's batch."""
    rep = w.rep[r]
    request = w.req[q]
    request.in_batch = 0
    if request.prev >= 0:
        w.req[request.prev].next = request.next
    else:
        rep.batch_head = request.next
    if request.next >= 0:
        w.req[request.next].prev = request.prev
    else:
        rep.batch_tail = request.prev
    if w.pool[rep.pool].reserves:
        rep.kv_reserved -= reserved_blocks(w, r, q)


@hot
def precedes(w, a, b):
    """Whether request a is served before b where the waiting queue is sorted."""
    left = w.req[a]
    right = w.req[b]
    if left.rank != right.rank:
        return left.rank < right.rank
    if left.rank_s != right.rank_s:
        return left.rank_s < right.rank_s
    return a < b


@hot
def waiting_insert(w, r, q, front):
    """Put a request into the engine's waiting queue.

    FCFS: at the back, or at the front when it was preempted. Else sorted by rank, since when, and arrival.
    """
    rep = w.rep[r]
    request = w.req[q]
    if w.pool[rep.pool].ranked:
        after = rep.wait_tail
        while after >= 0 and not precedes(w, after, q):
            after = w.req[after].prev
    else:
        after = NONE if front else rep.wait_tail
    before = rep.wait_head if after < 0 else w.req[after].next
    request.prev = after
    request.next = before
    if after >= 0:
        w.req[after].next = q
    else:
        rep.wait_head = q
    if before >= 0:
        w.req[before].prev = q
    else:
        rep.wait_tail = q
    rep.num_waiting += 1


@hot
def waiting_remove(w, r, q):
    """Unlink a request from the engine's waiting queue."""
    rep = w.rep[r]
    request = w.req[q]
    if request.prev >= 0:
        w.req[request.prev].next = request.next
    else:
        rep.wait_head = request.next
    if request.next >= 0:
        w.req[request.next].prev = request.prev
    else:
        rep.wait_tail = request.prev
    rep.num_waiting -= 1
