"""Which replica a request is sent to; see `FleetSpec.router`."""

from __future__ import annotations

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FloatArray
from rl_autoscale.sim.reference.pool import Pool
from rl_autoscale.sim.reference.replica import Replica
from rl_autoscale.sim.reference.request import Request


class Router:
    """Picks a replica with room, preferred pools first.

    Args:
        spec: the fleet; gives the rule.
        routing_u: shape (num_requests,): one random number in [0, 1) per request.
    """

    def __init__(self, spec: FleetSpec, routing_u: FloatArray) -> None:
        self._rule = spec.router
        self._routing_u = routing_u
        self._next_place: dict[str, int] = {pool.name: 0 for pool in spec.pools}  # round robin: where to look first

    def pick(self, request: Request, pools: list[Pool]) -> Replica | None:
        """A replica with room, of the first role of which there is one; None if all are full.

        Least loaded compares what the pools of that role offer by the time in which the replica would work off what it
        has and the newcomer; every other rule takes the first pool with room.
        """
        offers: list[Replica] = []
        for pool in pools:
            candidates = [replica for replica in pool.ready if replica.has_room]
            if candidates and (not offers or offers[0].pool.spec.role == pool.spec.role):
                offers.append(self._choose(request, pool, candidates))
        if self._rule == "least_loaded":
            return min(offers, key=_work_s, default=None)
        return offers[0] if offers else None

    def on_send(self, replica: Replica) -> None:
        """A request goes to this replica: round robin goes on behind it."""
        pool = replica.pool
        self._next_place[pool.spec.name] = replica.slot - pool.base + 1

    def _choose(self, request: Request, pool: Pool, candidates: list[Replica]) -> Replica:
        """Apply the rule to the replicas with room (at least one), lowest slot first; the first among equals wins."""
        if self._rule == "least_loaded":
            return min(candidates, key=_load)
        if self._rule == "packing":  # the fullest that still has room
            return max(candidates, key=_load)
        if self._rule == "round_robin":
            behind = [r for r in candidates if r.slot - pool.base >= self._next_place[pool.spec.name]]
            return (behind or candidates)[0]
        # Power of two choices (Mitzenmacher 2001): the less loaded of two drawn with replacement. One number in [0, 1)
        # gives both: its first digit in base n and, from the rest, its second.
        first = float(self._routing_u[request.index]) * len(candidates)
        second = (first - int(first)) * len(candidates)
        pair = sorted({int(first), int(second)})
        return min((candidates[k] for k in pair), key=_load)


def _load(replica: Replica) -> int:
    return len(replica.in_flight)


def _work_s(replica: Replica) -> float:
    return (_load(replica) + 1) * replica.pool.spec.hardware.typical_request_s
