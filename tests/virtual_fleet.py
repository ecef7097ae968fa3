"""The gateway's core in front of the emulator's engines in virtual time: the live fleet without sockets.

Order of simultaneous events as in the simulator: replicas first, lowest place first, then arrivals.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.serving.emulator.engine import Engine
from rl_autoscale.serving.gateway.core import GatewayCore
from rl_autoscale.serving.gateway.tickets import State, Ticket
from rl_autoscale.serving.gateway_api import ReplicaAddress
from rl_autoscale.sim.reference.request import Request
from rl_autoscale.workload.trace import Workload


class VirtualFleet:
    """Every pool holds its initial replicas for ever; answers to batch requests may come in one piece."""

    def __init__(
        self, spec: FleetSpec, workload: Workload, draw: Callable[[], float], *, batch_streams: bool = True
    ) -> None:
        self._batch_streams = batch_streams
        self.core = GatewayCore(spec, draw)
        self.tickets: list[Ticket] = []
        self.requests = [
            Request(
                q,
                int(workload.class_index[q]),
                spec.classes[int(workload.class_index[q])],
                float(workload.arrival_s[q]),
                int(workload.prompt_tokens[q]),
                int(workload.output_tokens[q]),
            )
            for q in range(workload.num_requests)
        ]
        self.engines: dict[str, Engine] = {}
        self._due_s: dict[str, float] = {}
        self._sent: dict[Ticket, tuple[str, int]] = {}  # where it was sent last, and the how manieth time that was
        self._request_of: dict[Ticket, Request] = {}
        self._ticket_of: dict[Request, Ticket] = {}
        addresses = []
        for pool in spec.pools:
            for place in range(pool.initial):
                name = f"{pool.name}-{place}"
                self.engines[name] = Engine(pool)
                self._due_s[name] = math.inf
                addresses.append(ReplicaAddress(replica_id=name, pool=pool.name, url="http://x", phase="ready"))
        self.core.set_replicas(addresses, 0.0)

    def run(self) -> None:
        """Until nothing happens any more."""
        position = 0
        while True:
            name, due_s = min(self._due_s.items(), key=lambda item: item[1], default=("", math.inf))
            arrival_s = self.requests[position].arrival_s if position < len(self.requests) else math.inf
            now_s = min(due_s, arrival_s)
            if now_s == math.inf:
                self.core.tick(1e9)  # patience ends
                return
            if due_s <= arrival_s:
                self._end_iteration(name, now_s)
            else:
                self._arrive(self.requests[position], now_s)
                position += 1
            self._deliver()
            self._begin_iterations(now_s)

    def _arrive(self, request: Request, now_s: float) -> None:
        streams = request.interactive or self._batch_streams
        ticket = self.core.arrive(request.class_index, request.prompt_tokens, now_s, streams=streams)
        self.tickets.append(ticket)
        self._request_of[ticket] = request
        self._ticket_of[request] = ticket

    def _end_iteration(self, name: str, now_s: float) -> None:
        self._due_s[name] = math.inf
        step = self.engines[name].end()
        for request in step.yielded:
            ticket = self._ticket_of[request]
            if ticket.awaited and ticket.streams:
                request.first_token_s = now_s
                self.core.see_token(ticket, now_s)
            if request in step.finished:
                request.end_s = now_s
                self.core.finish(ticket, request.output_tokens, now_s)

    def _deliver(self) -> None:
        """What the core has sent reaches the engines, in the order in which it was sent."""
        for ticket in self.tickets:
            if ticket.state is State.SENT and ticket not in self._sent:
                self._sent[ticket] = (ticket.replica.replica_id, ticket.num_sent)
        fresh = [ticket for ticket in self._sent if self._request_of[ticket].slot < 0]
        for ticket in sorted(
            fresh, key=lambda item: (self.core.classes[item.class_index].promise.priority, item.class_index)
        ):
            self._request_of[ticket].slot = 0
            self.engines[ticket.replica.replica_id].add(self._request_of[ticket])

    def _begin_iterations(self, now_s: float) -> None:
        for name, engine in self.engines.items():
            if not engine.busy and (duration_s := engine.begin(now_s)) is not None:
                self._due_s[name] = now_s + duration_s
