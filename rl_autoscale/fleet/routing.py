"""Which replica a request is sent to; the rules behind `FleetSpec.router`, for the reference simulator and the gateway.

The compiled kernel (``sim/router.py``) keeps a tree instead of lists; the differential test binds it to this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.spec import Router


def freeness(num_blocks: int, virtual_blocks: int, num_requests: int) -> float:
    """Free KV blocks per request of a replica: for how many more blocks each the batch has memory.

    Args:
        num_blocks: KV blocks M of the replica.
        virtual_blocks: virtual usage V: what its sequences have, what those that wait in its engine need to be
            admitted, and `PoolSpec.urgent_headroom_blocks` while a request of the most urgent priority is on it.
        num_requests: requests B on it, running or waiting.

    Returns:
        (M - V) / B: negative where more is wanted than there is, inf for an empty replica.

    Source: Llumnix (OSDI 2024, arXiv 2406.03243), section 4.4. Its algorithm counts the demand of the queue's head; we
    count all that wait, as the authors' code does when it dispatches (``remaining_steps``): otherwise requests that
    come during one iteration would all go to one replica. It gives each urgent request its share of the headroom of its
    priority, which sums up to that headroom; there it counts from admission, here from dispatch.
    """
    return (num_blocks - virtual_blocks) / num_requests if num_requests else math.inf


def choose_replica(router: Router, loads: Sequence[float], places: Sequence[int], next_place: int, u: float) -> int:
    """Pick one of the replicas of a pool that have room; the first among equals wins.

    Args:
        router: the rule.
        loads: requests in flight on each (at least one replica); for freeness, each one's freeness, negated.
        places: each replica's number in the pool, increasing; for round robin.
        next_place: where round robin goes on: the place behind the replica that was sent to last.
        u: the request's routing number in [0, 1), for power of two.

    Returns:
        An index into ``loads``.
    """
    indices = range(len(loads))
    if router in ("least_loaded", "prefix_affinity", "freeness"):
        return min(indices, key=loads.__getitem__)
    if router == "packing":  # the fullest that still has room
        return max(indices, key=loads.__getitem__)
    if router == "round_robin":
        return next((index for index in indices if places[index] >= next_place), 0)
    # Power of two choices (Mitzenmacher 2001): the less loaded of two drawn with replacement. One number in [0, 1)
    # gives both: its first digit in base n and, from the rest, its second.
    first = u * len(loads)
    second = (first - int(first)) * len(loads)
    return min(sorted({int(first), int(second)}), key=loads.__getitem__)


def pair_for_balance(
    freeness_of: Sequence[float], gives: Sequence[bool], takes: Sequence[bool], below: float, above: float
) -> list[tuple[int, int]]:
    """Pair the replicas of a pool that are short of KV blocks with those that have plenty, the extremes first.

    Args:
        freeness_of: each one's.
        gives: whether it has a sequence to give.
        takes: whether it has room for one.
        below: sources have less freeness.
        above: destinations have more (>= below).

    Returns:
        (source, destination) as indices; no replica is in two pairs.
    """
    indices = range(len(freeness_of))
    sources = sorted((i for i in indices if gives[i] and freeness_of[i] < below), key=freeness_of.__getitem__)
    destinations = sorted((i for i in indices if takes[i] and freeness_of[i] > above), key=lambda i: -freeness_of[i])
    return list(zip(sources, destinations, strict=False))


def choose_evicting(num_evictable: Sequence[int]) -> int | None:
    """Pick the replica on which batch work makes room for an interactive request; the first among equals wins.

    Args:
        num_evictable: batch requests that each replica could give up.

    Returns:
        An index into ``num_evictable``; None if no replica has any.
    """
    best = max(range(len(num_evictable)), key=num_evictable.__getitem__, default=None)
    return best if best is not None and num_evictable[best] > 0 else None


def choose_pool(router: Router, pools: Sequence[PoolSpec], loads: Sequence[float]) -> int:
    """Pick among the replicas that several pools offer, one each.

    Pools of one role stand beside each other: the least loaded replica is the one that would be first to work off what
    it has and the newcomer; by freeness it is the freest. Every other rule takes the first.

    Args:
        router: the rule.
        pools: those with room (at least one), in the order of preference; the first one's role is served.
        loads: of the replica that each of them offers, as for `choose_replica`.

    Returns:
        An index into ``pools``.
    """
    beside = [index for index, pool in enumerate(pools) if pool.role == pools[0].role]
    if router == "freeness":
        return min(beside, key=loads.__getitem__)
    if router not in ("least_loaded", "prefix_affinity"):
        return 0
    return min(beside, key=lambda index: (loads[index] + 1) * pools[index].typical_request_s)
