"""Which replica a request is sent to; the rules behind `FleetSpec.router`, for the reference simulator and the gateway.

The compiled kernel (``sim/gateway.py``) keeps a tree instead of lists; the differential test binds it to this.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl_autoscale.fleet.spec import Role, Router


def choose_replica(router: Router, loads: Sequence[int], places: Sequence[int], next_place: int, u: float) -> int:
    """Pick one of the replicas of a pool that have room; the first among equals wins.

    Args:
        router: the rule.
        loads: requests in flight on each (at least one replica).
        places: each replica's number in the pool, increasing; for round robin.
        next_place: where round robin goes on: the place behind the replica that was sent to last.
        u: the request's routing number in [0, 1), for power of two.

    Returns:
        An index into ``loads``.
    """
    indices = range(len(loads))
    if router == "least_loaded":
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


def choose_pool(router: Router, roles: Sequence[Role], loads: Sequence[int], request_s: Sequence[float]) -> int:
    """Pick among the pools that offer a replica, preferred pools first.

    Least loaded compares what the pools of the first role offer by the time in which the replica would work off what it
    has and the newcomer, so that a faster GPU gets more; every other rule takes the first pool.

    Args:
        router: the rule.
        roles: of the pools that have a replica with room (at least one), preferred first.
        loads: requests in flight on the replica that each of them offers.
        request_s: seconds a typical request takes there (`LatencyProfile.typical_request_s`).

    Returns:
        An index into ``roles``; the first among equals wins.
    """
    if router != "least_loaded":
        return 0
    alike = [index for index, role in enumerate(roles) if role == roles[0]]
    return min(alike, key=lambda index: (loads[index] + 1) * request_s[index])
