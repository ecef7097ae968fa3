"""Kernel: sequences that go on elsewhere with their KV cache: what a draining replica has, and what balances a pool.

Semantics (docs/simulator.md; reference twins: `Gateway.migrate_from`, sim/reference/balancer.py). KV cache goes through
host memory, as in an eviction to the host, and a sequence leaves at the end of an iteration.

- A draining replica gives away, at the end of each of its iterations, what another replica has a place for, as the
  router says: running decode sequences in the order of the batch, then the waiting queue. A prompt under way stays
  until it is computed. What finds no place stays and is served.
- A pool with `rebalance` is looked at every so often. Replicas with the least freeness are paired with those with the
  most, and each of the first gives one decode sequence at the end of its iteration: one of the least urgent class, of
  those the shortest, of those the first of the batch. It stays if the other has no room any more, or would be short of
  KV blocks then, too.

Looks come after whatever replicas do at the same time, and before arrivals; they are no leaves of the event tree. A
fleet without `rebalance` and with vLLM's scheduler compiles none of it.
"""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import njit
from rl_autoscale.sim.batch import waiting_remove
from rl_autoscale.sim.estimate import leave_replica
from rl_autoscale.sim.freeness import free_blocks_now, freeness
from rl_autoscale.sim.gateway import send
from rl_autoscale.sim.kv_cache import blocks_of
from rl_autoscale.sim.layout import NO_SLOT, NONE, READY
from rl_autoscale.sim.replica import cut_leap, gained_units, swap_out
from rl_autoscale.sim.router import has_room, route


@njit
def hand_over(w, r, q, place, now_s):
    """A request, already off its engine, goes on at another replica."""
    leave_replica(w, r, q, now_s)
    w.pool[w.rep[r].pool].migrations += 1
    send(w, q, place, now_s, r)


@njit
def migrate(w, r, now_s):
    """Give away what has a place elsewhere, at the end of an iteration."""
    rep = w.rep[r]
    for waiting in (False, True):
        q = rep.wait_head if waiting else rep.batch_head
        while q >= 0:
            request = w.req[q]
            after = request.next
            if waiting or request.finish_iteration > 0:
                place = route(w, request.class_index, q, now_s, r)
                if place >= 0:
                    if waiting:
                        waiting_remove(w, r, q)
                    else:
                        swap_out(w, r, q)
                    hand_over(w, r, q, place, now_s)
            q = after


@njit
def next_look(w, after_s):
    """Move the looks that are due by then to the first time after it."""
    fleet = w.fleet[0]
    fleet.balance_s = math.inf
    for p in range(w.pool.shape[0]):
        pool = w.pool[p]
        while pool.balance_s <= after_s:
            pool.balance_s += pool.balance_every_s
        fleet.balance_s = min(fleet.balance_s, pool.balance_s)


@njit
def balance(w, p, now_s):
    """Pair the pool's replicas as `fleet/routing.pair_for_balance` does."""
    pool = w.pool[p]
    for r in range(pool.base, pool.base + pool.num_slots):
        if w.rep[r].state == READY:
            w.rep[r].freeness = freeness(w, r, now_s, NO_SLOT)
    while True:
        source = destination = NONE
        least = pool.source_below
        most = pool.destination_above
        for r in range(pool.base, pool.base + pool.num_slots):
            rep = w.rep[r]
            if rep.state == READY and rep.num_decode > 0 and rep.freeness < least:
                source = r
                least = rep.freeness
            if has_room(w, r) and rep.freeness > most:
                destination = r
                most = rep.freeness
        if source < 0 or destination < 0:
            return
        rep = w.rep[source]
        rep.giving_to = destination
        rep.freeness = pool.source_below  # neither a source nor a destination any more
        w.rep[destination].freeness = pool.source_below
        if rep.cuttable:
            cut_leap(w, source, now_s, NO_SLOT)


@njit
def look(w, now_s):
    """It is time to look for sequences that should move, in one pool or several."""
    for p in range(w.pool.shape[0]):
        if w.pool[p].balance_s <= now_s:
            balance(w, p, now_s)
    next_look(w, now_s)


@njit
def tokens_now(w, r, q):
    """Tokens of a decode sequence at the end of an iteration, its prompt's included."""
    gained = gained_units(w, r, q) >> w.pool[w.rep[r].pool].token_shift
    return w.req[q].prompt_tokens + w.req[q].generated_tokens + gained


@njit
def cheapest_to_move(w, r):
    """The decode sequence that a replica gives, or NONE."""
    best = NONE
    best_priority = 0
    best_tokens = 0
    q = w.rep[r].batch_head
    while q >= 0:
        request = w.req[q]
        if request.finish_iteration > 0:
            priority = w.cls[request.class_index].priority
            tokens = tokens_now(w, r, q)
            if best < 0 or priority > best_priority or (priority == best_priority and tokens < best_tokens):
                best = q
                best_priority = priority
                best_tokens = tokens
        q = request.next
    return best


@njit
def give(w, r, now_s):
    """At the end of its iteration a replica gives the sequence that it was asked for."""
    rep = w.rep[r]
    place = rep.giving_to
    rep.giving_to = NONE
    q = cheapest_to_move(w, r)
    if q < 0 or not has_room(w, place):
        return
    left = free_blocks_now(w, place, now_s, r) - blocks_of(tokens_now(w, r, q))
    if w.cls[w.req[q].class_index].urgent and w.rep[place].in_flight_urgent == 0:
        left -= w.pool[rep.pool].urgent_headroom
    if left / (w.rep[place].in_flight + 1) >= w.pool[rep.pool].source_below:
        swap_out(w, r, q)
        hand_over(w, r, q, place, now_s)
