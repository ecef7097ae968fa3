"""Running sequences move between the replicas of a pool, so that none is short of KV blocks while another has plenty.

What a pool's `RebalanceSpec` asks for; the rules are those of fleet/routing.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl_autoscale.fleet.pool import RebalanceSpec
from rl_autoscale.fleet.routing import pair_for_balance
from rl_autoscale.sim.reference.clock import Clock, balance_rank
from rl_autoscale.sim.reference.request import Request

if TYPE_CHECKING:
    from rl_autoscale.sim.reference.pool import Pool
    from rl_autoscale.sim.reference.replica import Process, Replica


def balance(clock: Clock, pool: Pool, rebalance: RebalanceSpec, number: int) -> Process:
    """Look at a pool every so often and ask the replicas that are short of KV blocks for a sequence.

    Args:
        clock: the simulated time.
        pool: the pool.
        rebalance: how often, and the bounds.
        number: the pool's, for the order of simultaneous looks.
    """
    while True:
        yield clock.wait(rebalance.every_s, balance_rank(number))
        replicas = pool.ready
        pairs = pair_for_balance(
            [replica.freeness for replica in replicas],
            [bool(_decodes(replica)) for replica in replicas],
            [replica.has_room for replica in replicas],
            rebalance.source_below,
            rebalance.destination_above,
        )
        for source, destination in pairs:
            replicas[source].giving_to = replicas[destination].slot - pool.base


def give(replica: Replica, rebalance: RebalanceSpec) -> None:
    """At the end of its iteration a replica gives the sequence that it was asked for: the cheapest to move.

    It keeps it if the other one has no room any more, or would be short of KV blocks then, too.
    """
    assert replica.giving_to is not None
    place, replica.giving_to = replica.pool.slots[replica.giving_to], None
    decodes = _decodes(replica)
    if place is None or not place.has_room or not decodes:
        return
    # The least urgent first: a class's priority is lower where it is served first.
    request = min(decodes, key=lambda decode: (-decode.service_class.priority, decode.num_tokens))
    if place.freeness_with(request) >= rebalance.source_below:
        replica.scheduler.swap_out(request)
        replica.pool.gateway.hand_over(replica, request, place)


def _decodes(replica: Replica) -> list[Request]:
    return [request for request in replica.running if request.decoding]
