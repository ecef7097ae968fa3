"""CPU work after a request's last token: workers behind one bounded queue, first come first served.

A stream that finds the queue full stays on its replica, with its sequence and KV blocks, until there is room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl_autoscale.fleet.stages import PostprocessSpec
from rl_autoscale.sim.reference.clock import Clock, worker_rank
from rl_autoscale.sim.reference.request import Request

if TYPE_CHECKING:
    from rl_autoscale.sim.reference.gateway import Gateway
    from rl_autoscale.sim.reference.replica import Replica


class Postprocessor:
    """The stage behind the engines.

    Args:
        clock: the simulated time.
        spec: of the stage.
        gateway: is told what leaves its replica, and what has ended.

    Attributes:
        queue: requests that wait for a worker.
        parked: (replica, request) pairs for which the queue has no room.
    """

    def __init__(self, clock: Clock, spec: PostprocessSpec, gateway: Gateway) -> None:
        self.queue: list[Request] = []
        self.parked: list[tuple[Replica, Request]] = []
        self._workers: list[Request | None] = [None] * spec.num_workers
        self._clock, self._spec, self._gateway = clock, spec, gateway

    @property
    def running(self) -> list[Request]:
        """Requests on workers."""
        return [request for request in self._workers if request is not None]

    @property
    def requests(self) -> list[Request]:
        """Requests in the stage."""
        return self.running + self.queue

    def take(self, replica: Replica, request: Request) -> None:
        """A stream has its last token: it goes on, or stays where it is."""
        if None in self._workers or len(self.queue) < self._spec.queue_limit:
            self._gateway.release(replica, request)
            self._enter(request)
        else:
            replica.scheduler.park(request)
            self.parked.append((replica, request))

    def forget(self, replica: Replica) -> None:
        """A replica is lost, with the streams that are parked on it."""
        self.parked = [(other, request) for other, request in self.parked if other is not replica]

    def _enter(self, request: Request) -> None:
        if None in self._workers:
            self._work(request)
        else:
            self.queue.append(request)

    def _work(self, request: Request) -> None:
        worker = self._workers.index(None)
        self._workers[worker] = request
        duration_s = self._spec.work_s(request.output_tokens)
        self._clock.call_after(duration_s, worker_rank(worker), lambda: self._on_done(worker, request))

    def _on_done(self, worker: int, request: Request) -> None:
        """A request ends; the head of the queue takes its worker, and the longest parked stream comes in."""
        self._workers[worker] = None
        self._gateway.complete(request)
        if self.queue:
            self._work(self.queue.pop(0))
        if self.parked:
            replica, stream = self.parked.pop(0)
            self._gateway.release(replica, stream)
            self._enter(stream)
            replica.on_room()
        self._gateway.dispatch_queued()
