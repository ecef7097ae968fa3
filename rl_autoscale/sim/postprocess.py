"""Kernel: a stream has its last token and leaves its replica, through the post-processing stage where there is one.

Semantics (docs/simulator.md; reference twin in sim/reference/postprocess.py): workers serve one request at a time, in
the order of a bounded queue. A stream that finds the queue full is *parked*: it keeps its sequence and KV blocks on its
replica until there is room, the longest parked first.

A worker is a leaf of the event tree, behind those of all replicas and links.
"""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.endings import complete, drop, last_token
from rl_autoscale.sim.estimate import book_residence, leave_replica
from rl_autoscale.sim.kv_cache import free_blocks
from rl_autoscale.sim.layout import FAILED, NONE
from rl_autoscale.sim.ordered import tree_set
from rl_autoscale.sim.replica import book_until


@hot
def finish(w, r, q, now_s):
    """A request that has left the batch has all its tokens."""
    request = w.req[q]
    last_token(w, q, now_s)
    if request.evict:
        request.evict = 0
        w.rep[r].num_evict_marked -= 1
    if w.fleet[0].num_workers > 0:
        hand_over(w, r, q, now_s)
    else:
        release(w, r, q, now_s)
        complete(w, q, now_s)


@hot
def release(w, r, q, now_s):
    """A finished stream gives back its KV blocks and its place on the replica."""
    free_blocks(w, r, q, w.req[q].computed_tokens, True)
    book_residence(w, r, q, now_s)
    leave_replica(w, r, q, now_s)


@njit
def hand_over(w, r, q, now_s):
    """A finished stream goes to post-processing, or stays on its replica while there is no room."""
    fleet = w.fleet[0]
    if fleet.num_working < fleet.num_workers or fleet.post_length < fleet.post_limit:
        release(w, r, q, now_s)
        begin_work(w, q, now_s)
        return
    request = w.req[q]
    request.next = NONE
    if fleet.num_parked > 0:
        w.req[fleet.parked_tail].next = q
    else:
        fleet.parked_head = q
    fleet.parked_tail = q
    fleet.num_parked += 1
    fleet.num_parkings += 1
    w.rep[r].num_parked += 1
    w.rep[r].num_parked_batch += 1 - w.cls[request.class_index].interactive


@njit
def begin_work(w, q, now_s):
    """A request takes the lowest free worker, or its place in the queue."""
    fleet = w.fleet[0]
    request = w.req[q]
    w.cls[request.class_index].in_flight += 1
    if fleet.num_working < fleet.num_workers:
        start_worker(w, q, now_s)
        return
    request.next = NONE
    if fleet.post_length > 0:
        w.req[fleet.post_tail].next = q
    else:
        fleet.post_head = q
    fleet.post_tail = q
    fleet.post_length += 1


@njit
def start_worker(w, q, now_s):
    """The lowest free worker begins a request."""
    fleet = w.fleet[0]
    first_leaf = 2 * w.rep.shape[0]
    worker = 0
    while w.event_tree[fleet.event_tree_size + first_leaf + worker] < math.inf:
        worker += 1
    w.worker[worker] = q
    fleet.num_working += 1
    end_s = now_s + (fleet.post_request_s + w.req[q].output_tokens * fleet.post_token_s)
    tree_set(w.event_tree, fleet.event_tree_size, first_leaf + worker, end_s)


@njit
def end_work(w, worker, now_s):
    """A worker is done and takes the next request; returns the replica that a parked stream leaves, or NONE."""
    fleet = w.fleet[0]
    q = w.worker[worker]
    tree_set(w.event_tree, fleet.event_tree_size, 2 * w.rep.shape[0] + worker, math.inf)
    fleet.num_working -= 1
    w.cls[w.req[q].class_index].in_flight -= 1
    complete(w, q, now_s)
    if fleet.post_length > 0:
        head = fleet.post_head
        fleet.post_head = w.req[head].next
        fleet.post_length -= 1
        start_worker(w, head, now_s)
    if fleet.num_parked == 0:
        return NONE
    q = fleet.parked_head
    fleet.parked_head = w.req[q].next
    fleet.num_parked -= 1
    r = w.req[q].replica
    w.rep[r].num_parked -= 1
    w.rep[r].num_parked_batch -= 1 - w.cls[w.req[q].class_index].interactive
    if w.pool[w.rep[r].pool].prefix_caching:
        book_until(w, r, now_s)  # what a leap has overwritten by now is gone before these blocks are free
    release(w, r, q, now_s)
    begin_work(w, q, now_s)
    return r


@njit
def lose_parked(w, r, now_s):
    """A replica crashes: the streams that were parked on it fail."""
    fleet = w.fleet[0]
    before = NONE
    q = fleet.parked_head
    for _ in range(fleet.num_parked):
        after = w.req[q].next
        if w.req[q].replica != r:
            before = q
        else:
            if before < 0:
                fleet.parked_head = after
            else:
                w.req[before].next = after
            fleet.parked_tail = before
            fleet.num_parked -= 1
            leave_replica(w, r, q, now_s)
            drop(w, q, FAILED, now_s)
        q = after
    fleet.parked_tail = before
