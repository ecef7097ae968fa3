"""Kernel: which replica a request is sent to, and what is in flight where; the rules are those of fleet/routing.py."""

from __future__ import annotations

import math

import numpy as np

from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.batch import waiting_insert
from rl_autoscale.sim.freeness import freeness
from rl_autoscale.sim.layout import (
    FREENESS,
    LEAST_LOADED,
    NO_ROOM,
    NONE,
    PACKING,
    PREFIX_AFFINITY,
    READY,
    ROUND_ROBIN,
)
from rl_autoscale.sim.ordered import tree_argmin, tree_set
from rl_autoscale.sim.replica import cut_leap, wake
from rl_autoscale.sim.schedulers.ranks import rank_arrival


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


@njit
def freest_replica(w, row, now_s, slot):
    """The replica with room that has the most freeness, in the pools of a row of ``class_pools``; NONE if all are full.

    Of the first role that has any with room; the first among equals. Arguments as for `choose`.
    """
    best = NONE
    most = -math.inf
    for position in range(w.class_pools.shape[1]):
        p = w.class_pools[row, position]
        if p < 0 or (best >= 0 and w.pool[p].role != w.pool[w.rep[best].pool].role):
            break
        for r in range(w.pool[p].base, w.pool[p].base + w.pool[p].num_slots):
            if has_room(w, r):
                value = freeness(w, r, now_s, slot)
                if best < 0 or value > most:
                    best = r
                    most = value
    return best


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
        serves = False
        for position in range(w.class_pools.shape[1]):
            serves = serves or w.class_pools[c, position] == rep.pool
        if rep.state != READY or rep.generation != sent >> 32 or not serves:
            continue
        within_share = 4 * np.int64(rep.in_flight) * pool.ready < 5 * (pool.in_flight + 1)
        return r if within_share and has_room(w, r) else NONE
    return NONE


@hot
def choose(w, row, q, now_s, slot):
    """A replica with room in the pools of a row of ``class_pools``, tried in order; NONE if all are full.

    Pools of one role stand beside each other. LEAST_LOADED compares what each of them offers by the time in which the
    replica would work off what it has and the newcomer; so does PREFIX_AFFINITY where no replica is preferred; FREENESS
    takes the freest; the other rules take the first.

    Args:
        w: the fleet.
        row: a class, or the number of classes for the decode pools.
        q: the request.
        now_s: the time.
        slot: replica whose event this is, or NO_SLOT.
    """
    router = w.pool[0].router
    if router == FREENESS:
        return freest_replica(w, row, now_s, slot)
    u = w.route_u[q] if q < w.route_u.shape[0] else 0.0  # the other routers have no numbers
    best = NONE
    best_s = math.inf
    best_role = NONE
    for position in range(w.class_pools.shape[1]):
        p = w.class_pools[row, position]
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


@hot
def route(w, c, q, now_s, slot):
    """Where to send a request: the pools that may serve its class are tried in order; NONE if all are full.

    Arguments as for `choose`.
    """
    if w.pool[0].router == PREFIX_AFFINITY:
        preferred = affine_replica(w, c, q)
        if preferred >= 0:
            return preferred
    return choose(w, c, q, now_s, slot)


@njit
def remember_prompt(w, r, q):
    """Note for every prefix of a prompt that it was last sent to this replica."""
    prompt = w.prompt[q]
    for k in range(prompt.num_hashes):
        w.sent_to[w.hash_ids[prompt.hash_start + k]] = (np.int64(w.rep[r].generation) << 32) | r


@hot
def count_in_flight(w, r, c, change):
    """Book one request more or less in flight on a replica."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    rep.in_flight += change
    pool.in_flight += change
    rep.in_flight_urgent += w.cls[c].urgent * change
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
def join_engine(w, r, q, now_s, slot):
    """A request that was sent to a replica joins its engine's waiting queue and is seen at the next iteration.

    Args:
        w: the fleet.
        r: the replica.
        q: the request.
        now_s: the time.
        slot: replica whose event this is, or NO_SLOT; see `cut_leap`.
    """
    rep = w.rep[r]
    count_in_flight(w, r, w.req[q].class_index, 1)
    if w.pool[rep.pool].ranked:
        rank_arrival(w, r, q, now_s)
    attend(w, r, q, now_s, slot)


@hot
def attend(w, r, q, now_s, slot):
    """Put a request into an engine's waiting queue, and see to it that the engine looks; arguments as above."""
    rep = w.rep[r]
    waiting_insert(w, r, q, False)
    if rep.event_s == math.inf:
        wake(w, r, now_s)
    elif rep.cuttable and rep.wait_head == q:
        cut_leap(w, r, now_s, slot)
