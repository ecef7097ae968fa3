"""Kernel: KV cache on its way from prefill to decode replicas, over links and through the bounded bridge.

Semantics (docs/simulator.md; reference twin in sim/reference/bridge.py):

- A computed prompt stays *held* on its prefill replica, KV blocks and place in flight included, until its KV has
  been sent. A replica sends one prompt at a time, first come first served.
- A transfer begins when the bridge has a place for it; replicas for which it has none are *blocked* and get the next
  places in the order in which they asked.
- What has arrived in the bridge is sent to a decode replica with room, first come first served, and keeps its place
  until that replica has KV blocks for it.

A replica's link is a leaf of the event tree, behind those of all replicas: at equal times transfers end after every
replica's iteration, lowest slot first.
"""

from __future__ import annotations

import math

import numpy as np

from rl_autoscale.fleet.jit import njit
from rl_autoscale.sim.batch import batch_remove
from rl_autoscale.sim.endings import drop
from rl_autoscale.sim.estimate import book_residence, no_longer_pending
from rl_autoscale.sim.kv_cache import blocks_of, free_blocks
from rl_autoscale.sim.layout import FAILED, NONE, ROUND_ROBIN
from rl_autoscale.sim.ordered import tree_set
from rl_autoscale.sim.router import choose, count_in_flight, join_engine


@njit
def set_link(w, r, end_s):
    """When the transfer from a replica ends; inf while its link is idle."""
    tree_set(w.event_tree, w.fleet[0].event_tree_size, w.rep.shape[0] + r, end_s)


@njit
def hold_prompt(w, r, q, now_s):
    """A prompt is computed and its first token is out: it leaves the batch and waits for its transfer."""
    rep = w.rep[r]
    request = w.req[q]
    batch_remove(w, r, q)
    request.awaited = 0
    no_longer_pending(w, r, np.int64(request.prompt_tokens), now_s)
    request.next = NONE
    if rep.num_held > 0:
        w.req[rep.held_tail].next = q
    else:
        rep.held_head = q
    rep.held_tail = q
    rep.num_held += 1
    if rep.num_held == 1:
        ask_for_transfer(w, r, now_s)


@njit
def ask_for_transfer(w, r, now_s):
    """A replica whose link is free wants to send its next prompt: now, or when the bridge has a place."""
    fleet = w.fleet[0]
    if fleet.bridge_used < fleet.bridge_limit:
        begin_transfer(w, r, now_s)
        return
    w.rep[r].blocked_next = NONE
    if fleet.num_blocked > 0:
        w.rep[fleet.blocked_tail].blocked_next = r
    else:
        fleet.blocked_head = r
    fleet.blocked_tail = r
    fleet.num_blocked += 1
    fleet.num_blockings += 1


@njit
def begin_transfer(w, r, now_s):
    """Take a place in the bridge and the replica's link."""
    fleet = w.fleet[0]
    rep = w.rep[r]
    fleet.bridge_used += 1
    fleet.num_transfers += 1
    rep.sending = 1
    num_blocks = blocks_of(w.req[rep.held_head].computed_tokens)
    set_link(w, r, now_s + (fleet.transfer_latency_s + num_blocks * w.pool[rep.pool].transfer_block_s))


@njit
def start_transfers(w, now_s):
    """Places in the bridge may have become free: blocked replicas get them, first come first served."""
    fleet = w.fleet[0]
    while fleet.num_blocked > 0 and fleet.bridge_used < fleet.bridge_limit:
        r = fleet.blocked_head
        fleet.blocked_head = w.rep[r].blocked_next
        fleet.num_blocked -= 1
        begin_transfer(w, r, now_s)


@njit
def end_transfer(w, r, now_s):
    """A prompt's KV has arrived in the bridge; its blocks on the prefill replica are free."""
    fleet = w.fleet[0]
    rep = w.rep[r]
    q = rep.held_head
    request = w.req[q]
    rep.held_head = request.next
    rep.num_held -= 1
    rep.sending = 0
    set_link(w, r, math.inf)
    fleet.num_transfers -= 1
    free_blocks(w, r, q, request.computed_tokens, True)
    book_residence(w, r, q, now_s)
    count_in_flight(w, r, request.class_index, -1)
    w.cls[request.class_index].in_flight += 1
    request.kv_in_bridge = 1
    request.next = NONE
    if fleet.bridge_length > 0:
        w.req[fleet.bridge_tail].next = q
    else:
        fleet.bridge_head = q
    fleet.bridge_tail = q
    fleet.bridge_length += 1
    fleet.queued += 1
    if rep.num_held > 0:
        ask_for_transfer(w, r, now_s)


@njit
def dispatch_bridge(w, now_s, slot):
    """Send what waits in the bridge to decode replicas while they have room; see `gateway.dispatch_queued`."""
    fleet = w.fleet[0]
    while fleet.bridge_length > 0:
        q = fleet.bridge_head
        r = choose(w, w.cls.shape[0], q, now_s, slot)
        if r < 0:
            return
        request = w.req[q]
        fleet.bridge_head = request.next
        fleet.bridge_length -= 1
        fleet.queued -= 1
        rep = w.rep[r]
        pool = w.pool[rep.pool]
        if pool.router == ROUND_ROBIN:
            pool.round_robin_next = (r - pool.base + 1) % pool.num_slots
        request.replica = r
        rep.seen_tokens += request.prompt_tokens
        rep.num_seen += 1
        w.cls[request.class_index].in_flight -= 1
        join_engine(w, r, q, now_s, slot)


@njit
def lose_held(w, r, now_s):
    """A prefill replica crashes: what it held or was sending fails, for the streams have begun."""
    fleet = w.fleet[0]
    rep = w.rep[r]
    if rep.num_held == 0:
        return
    if rep.sending:
        fleet.bridge_used -= 1
        fleet.num_transfers -= 1
        set_link(w, r, math.inf)
    else:
        unblock(w, r)
    q = rep.held_head
    while q >= 0:
        after = w.req[q].next
        count_in_flight(w, r, w.req[q].class_index, -1)
        drop(w, q, FAILED, now_s)
        q = after


@njit
def unblock(w, r):
    """Take a replica out of the list of those that wait for a place in the bridge."""
    fleet = w.fleet[0]
    fleet.num_blocked -= 1
    if fleet.blocked_head == r:
        fleet.blocked_head = w.rep[r].blocked_next
        return
    before = fleet.blocked_head
    while w.rep[before].blocked_next != r:
        before = w.rep[before].blocked_next
    w.rep[before].blocked_next = w.rep[r].blocked_next
    if fleet.blocked_tail == r:
        fleet.blocked_tail = before
