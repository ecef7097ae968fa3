"""Kernel: Llumnix's freeness of a replica, by which `router: freeness` sends requests.

The measure and its source: `fleet/routing.freeness`. Nothing is booked here, so a leap stays as it is: the blocks of
its iterations up to the running one are counted as a leap's are (replica.py).
"""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import njit
from rl_autoscale.sim.kv_cache import blocks_of, reserved_blocks
from rl_autoscale.sim.replica import leap_blocks, running_iteration


@njit
def blocks_held(w, r, now_s, slot):
    """KV blocks that a replica's sequences have now, those of the iteration in progress included.

    Args:
        w: the fleet.
        r: the replica.
        now_s: the time.
        slot: replica whose event this is, or NO_SLOT; see `running_iteration`. Its own iteration is over, and unless it
            has planned its next one that has no blocks yet.
    """
    rep = w.rep[r]
    if w.pool[rep.pool].contiguous:
        return rep.kv_reserved
    if rep.num_decode == 0 or rep.stalled or (r == slot and rep.event_s <= now_s):
        return rep.kv_used
    iterations = rep.leap_iterations
    if iterations > 1:
        iterations = min(iterations, running_iteration(w, r, now_s, slot))
    return rep.kv_used + leap_blocks(w, r, iterations)


@njit
def blocks_wanted(w, r, q):
    """KV blocks that a waiting sequence needs to be admitted, beside those that it has kept."""
    if w.pool[w.rep[r].pool].contiguous:
        return reserved_blocks(w, r, q)
    request = w.req[q]
    kept = 0 if request.on_host or request.kv_in_bridge else request.computed_tokens
    return blocks_of(request.prompt_tokens + request.generated_tokens) - blocks_of(kept)


@njit
def free_blocks_now(w, r, now_s, slot):
    """KV blocks less those that sequences have or wait for, or that are kept for urgent ones; args of `blocks_held`."""
    rep = w.rep[r]
    free = w.pool[rep.pool].kv_blocks - blocks_held(w, r, now_s, slot)
    if rep.in_flight_urgent > 0:
        free -= w.pool[rep.pool].urgent_headroom
    q = rep.wait_head
    while q >= 0:
        free -= blocks_wanted(w, r, q)
        q = w.req[q].next
    return free


@njit
def freeness(w, r, now_s, slot):
    """Free KV blocks per request; arguments as for `blocks_held`."""
    requests = w.rep[r].in_flight
    return free_blocks_now(w, r, now_s, slot) / requests if requests > 0 else math.inf
