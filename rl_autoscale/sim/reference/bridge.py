"""KV cache on its way from prefill to decode replicas: links, the bounded bridge, and what it holds up.

A computed prompt stays on its prefill replica, with its KV blocks and its place in flight, until its KV has been sent.
A replica sends one prompt at a time. A transfer begins when the bridge has a place for it; the place is given back when
a decode replica has KV blocks for the request. Everything is first come first served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.reference.clock import Clock, link_rank
from rl_autoscale.sim.reference.request import Request, blocks_for

if TYPE_CHECKING:
    from rl_autoscale.sim.reference.gateway import Gateway
    from rl_autoscale.sim.reference.replica import Replica


class Bridge:
    """Between the prefill and the decode pools; of other fleets nothing ever comes here.

    Args:
        clock: the simulated time.
        spec: the fleet.
        gateway: sends what has arrived to decode replicas.

    Attributes:
        queue: requests whose KV has arrived and that no decode replica has been sent.
        sending: replicas with a transfer under way.
    """

    def __init__(self, clock: Clock, spec: FleetSpec, gateway: Gateway) -> None:
        self.queue: list[Request] = []
        self.sending: list[Replica] = []
        self._blocked: list[Replica] = []  # their next prompt waits for a place
        self._arrived: list[Request] = []  # everything whose KV is in the bridge, or was
        self._clock, self._spec, self._gateway = clock, spec, gateway
        self._limit = 0 if spec.kv_transfer is None else spec.kv_transfer.bridge_limit

    @property
    def num_used(self) -> int:
        """Places in use."""
        self._arrived = [request for request in self._arrived if request.kv_in_bridge]
        return len(self.sending) + len(self._arrived)

    def on_held(self, replica: Replica) -> None:
        """A prompt is computed and held; it is its replica's turn to ask unless it has asked already."""
        if len(replica.held) == 1:
            self._ask(replica)

    def start_transfers(self) -> None:
        """Give free places to the replicas that have waited longest."""
        while self._blocked and self.num_used < self._limit:
            self._send(self._blocked.pop(0))

    def forget(self, replica: Replica) -> None:
        """A replica is lost, with what it holds."""
        for replicas in (self.sending, self._blocked):
            if replica in replicas:
                replicas.remove(replica)

    def _ask(self, replica: Replica) -> None:
        if self.num_used < self._limit:
            self._send(replica)
        else:
            self._blocked.append(replica)

    def _send(self, replica: Replica) -> None:
        self.sending.append(replica)
        num_blocks = blocks_for(replica.held[0].computed_tokens)
        duration_s = self._spec.transfer_s(self._gateway.pools.index(replica.pool), num_blocks)
        self._clock.call_after(duration_s, link_rank(replica.slot), lambda: self._on_sent(replica))

    def _on_sent(self, replica: Replica) -> None:
        """The KV of a prompt has arrived; its replica may send the next."""
        if replica.is_gone:
            return
        self.sending.remove(replica)
        request = replica.held.pop(0)
        replica.scheduler.send_off(request)
        replica.in_flight.remove(request)
        replica.pool.book_residence(self._clock.now - request.dispatched_s)
        request.kv_in_bridge = True
        self._arrived.append(request)
        self.queue.append(request)
        if replica.held:
            self._ask(replica)
        replica.on_room()
        self._gateway.dispatch_queued()
