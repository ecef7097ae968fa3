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
        self._last_sent: dict[int, Replica] = {}  # prefix affinity: by hash
        self._next_place: dict[str, int] = {pool.name: 0 for pool in spec.pools}  # round robin: where to look first

    def pick(self, request: Request, pools: list[Pool]) -> Replica | None:
        """A replica with room in the pools of the first role that has one; None if all are full."""
        preferred = self._affine(request, pools)
        return self.pick_any(request, pools) if preferred is None else preferred

    def pick_any(self, request: Request, pools: list[Pool]) -> Replica | None:
        """The same, wherever the prompt's prefix was sent before."""
        offers: list[Replica] = []
        for pool in pools:
            if candidates := [replica for replica in pool.ready if replica.has_room]:
                offers.append(self._choose(request, pool, candidates))
        if not offers:
            return None
        chosen = choose_pool(self._rule, [replica.pool.spec for replica in offers], [self._load(r) for r in offers])
        return offers[chosen]

    def _affine(self, request: Request, pools: list[Pool]) -> Replica | None:
        """The replica that was last sent the longest prefix, unless it is full or has more than 1.25 times its share.

        Consistent hashing with bounded loads (Mirrokni et al., SODA 2018); only prefix affinity remembers anything.
        """
        for key in reversed(request.hash_ids):
            replica = self._last_sent.get(key)
            if replica is None or replica not in replica.pool.ready or replica.pool not in pools:
                continue
            share = 1.25 * (len(replica.pool.in_flight) + 1) / len(replica.pool.ready)
            return replica if replica.has_room and len(replica.in_flight) < share else None
        return None

    def remember(self, request: Request, replica: Replica) -> None:
        """Prefix affinity remembers to which replica a prompt was sent."""
        if self._rule == "prefix_affinity":
            self._last_sent.update(dict.fromkeys(request.hash_ids, replica))

    def on_send(self, replica: Replica) -> None:
        """A request goes to this replica: round robin goes on behind it."""
        pool = replica.pool
        self._next_place[pool.spec.name] = replica.slot - pool.base + 1

    def _choose(self, request: Request, pool: Pool, candidates: list[Replica]) -> Replica:
        """Apply the rule to the replicas with room (at least one), lowest slot first."""
        chosen = choose_replica(
            self._rule,
            [self._load(replica) for replica in candidates],
            [replica.slot - pool.base for replica in candidates],
            self._next_place[pool.spec.name],
            float(self._routing_u[request.index]),
        )
        return candidates[chosen]

    def _load(self, replica: Replica) -> float:
        return -replica.freeness if self._rule == "freeness" else len(replica.in_flight)
