"""Which replica a request is sent to; the rules are those of fleet/routing.py."""

from __future__ import annotations

from rl_autoscale.fleet.routing import choose_pool, choose_replica
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
        """A replica with room; None if all are full."""
        offers: list[Replica] = []
        for pool in pools:
            candidates = [replica for replica in pool.ready if replica.has_room]
            if candidates:
                offers.append(self._choose(request, pool, candidates))
        if not offers:
            return None
        specs = [replica.pool.spec for replica in offers]
        best = choose_pool(
            self._rule,
            [spec.role for spec in specs],
            [_load(replica) for replica in offers],
            [spec.hardware.typical_request_s for spec in specs],
        )
        return offers[best]

    def on_send(self, replica: Replica) -> None:
        """A request goes to this replica: round robin goes on behind it."""
        pool = replica.pool
        self._next_place[pool.spec.name] = replica.slot - pool.base + 1

    def _choose(self, request: Request, pool: Pool, candidates: list[Replica]) -> Replica:
        """Apply the rule to the replicas with room (at least one), lowest slot first."""
        chosen = choose_replica(
            self._rule,
            [_load(replica) for replica in candidates],
            [replica.slot - pool.base for replica in candidates],
            self._next_place[pool.spec.name],
            float(self._routing_u[request.index]),
        )
        return candidates[chosen]


def _load(replica: Replica) -> int:
    return len(replica.in_flight)
