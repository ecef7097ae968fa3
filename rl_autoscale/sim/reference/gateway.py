"""The gateway: it holds, refuses, sends and takes back requests, and keeps the books of their classes.

It knows what it sent where and which streams have begun and ended; it sees no output length to come, and no KV blocks
but where it routes by freeness.
"""

from __future__ import annotations

from rl_autoscale.fleet.routing import choose_evicting
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NEVER_REFUSE, NO_LIMIT, FloatArray
from rl_autoscale.sim.layout import Outcome
from rl_autoscale.sim.reference.books import ClassBooks
from rl_autoscale.sim.reference.bridge import Bridge
from rl_autoscale.sim.reference.clock import Clock
from rl_autoscale.sim.reference.estimate import correct_clearing, expected_first_token_s, refusal_ttft_s
from rl_autoscale.sim.reference.pool import Pool
from rl_autoscale.sim.reference.postprocess import Postprocessor
from rl_autoscale.sim.reference.replica import Replica, State
from rl_autoscale.sim.reference.request import Request
from rl_autoscale.sim.reference.router import Router


class Gateway:
    """Class queues in front of the pools.

    Args:
        clock: the simulated time.
        spec: the fleet.
        routing_u: shape (num_requests,): one random number in [0, 1) per request, for routers that draw.
    """

    def __init__(self, clock: Clock, spec: FleetSpec, routing_u: FloatArray) -> None:
        self.clock = clock
        self.spec = spec
        self.pools: list[Pool] = []  # filled by the fleet, in the spec's order
        self.queues: list[list[Request]] = [[] for _ in spec.classes]
        self.books = [ClassBooks() for _ in spec.classes]
        self.admission = [float(NEVER_REFUSE) for _ in spec.classes]
        self.selectivity = [0.0 for _ in spec.classes]
        self.max_in_flight = [NO_LIMIT for _ in spec.classes]
        self.num_unresolved = 0
        self._router = Router(spec, routing_u)
        self.bridge = Bridge(clock, spec, self)
        self.postprocessor = None if spec.postprocess is None else Postprocessor(clock, spec.postprocess, self)
        self._class_order = sorted(range(len(spec.classes)), key=lambda c: spec.classes[c].priority)

    # -- arrivals --------------------------------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        """A request is refused, sent, held, or turned away because the queue is full."""
        c = request.class_index
        self.books[c].arrive(request.prompt_tokens)
        self.num_unresolved += 1
        self.drop_impatient(c)
        replica, evicting = self._place_for(request)
        if self._would_be_late(request, replica):
            self._drop(request, Outcome.REFUSED)
        elif replica is not None:
            if evicting:
                self._evict_from(replica)
            self._send(request, replica)
            if evicting:
                self.dispatch_queued()  # another replica may have room for the evicted request
        elif len(self.queues[c]) < request.service_class.queue_limit:
            self.queues[c].append(request)
        else:
            self._drop(request, Outcome.QUEUE_FULL)

    def _place_for(self, request: Request) -> tuple[Replica | None, bool]:
        """Where to send a request now, and whether batch work must make room for it there. Nobody overtakes a queue."""
        if self.queues[request.class_index] or self._at_limit(request.class_index):
            return None, False
        pools = self._pools_serving(request)
        replica = self._router.pick(request, pools)
        if replica is None and request.interactive and self.spec.evict_batch:
            replica = _most_evictable(pools)
            return replica, replica is not None
        return replica, False

    def _would_be_late(self, request: Request, replica: Replica | None) -> bool:
        """Whether the request is predicted to miss its TTFT SLO by more than its class's admission level allows."""
        admission = self.admission[request.class_index]
        if admission == NEVER_REFUSE:
            return False
        ahead = 0
        for c, service_class in enumerate(self.spec.classes):
            same_model = service_class.model == request.service_class.model
            if same_model and service_class.priority <= request.service_class.priority:
                self.drop_impatient(c)
                ahead += len(self.queues[c])
        c = request.class_index
        ttft_s = refusal_ttft_s(
            request,
            replica,
            self._pools_serving(request),
            ahead,
            self.books[c],
            self.selectivity[c],
            self.clock.now,
        )
        return ttft_s > admission * request.service_class.ttft_slo_s

    def _pools_serving(self, request: Request) -> list[Pool]:
        return [self.pools[p] for p in self.spec.pools_serving(request.class_index)]

    # -- queues ----------------------------------------------------------------------------------------------------

    def dispatch_queued(self) -> None:
        """Send requests while there is room: the bridge's to decode replicas, then held ones to those that serve them.

        Classes go by priority, first come first served within a class.
        """
        self._dispatch_bridge()
        for c in self._class_order:
            while True:
                self.drop_impatient(c)
                if not self.queues[c] or self._at_limit(c):
                    break
                head = self.queues[c][0]
                replica = self._router.pick(head, self._pools_serving(head))
                if replica is None:
                    break
                self._send(self.queues[c].pop(0), replica)

    def _at_limit(self, c: int) -> bool:
        """Whether a class has as many requests in flight as it may."""
        sent = [request for pool in self.pools for request in pool.in_flight] + self.bridge.queue
        if self.postprocessor is not None:
            sent += self.postprocessor.requests
        return sum(request.class_index == c for request in sent) >= self.max_in_flight[c]

    def _dispatch_bridge(self) -> None:
        decode_pools = [self.pools[p] for p in self.spec.decode_pools]
        while self.bridge.queue:
            replica = self._router.pick_any(self.bridge.queue[0], decode_pools)
            if replica is None:
                return
            request = self.bridge.queue.pop(0)
            request.slot = replica.slot
            self._router.on_send(replica)
            replica.receive(request)

    def drop_impatient(self, c: int) -> None:
        """Drop requests whose patience has ended from the head of a queue, as of the moment when it ended.

        Only the head is looked at: the oldest is first, unless a stream that was evicted stands in front.
        """
        queue = self.queues[c]
        while queue and queue[0].lost_patience(self.clock.now):
            request = queue.pop(0)
            assert request.service_class.timeout_s is not None
            self._drop(request, Outcome.TIMED_OUT, request.arrival_s + request.service_class.timeout_s)

    def drop_all_impatient(self) -> None:
        """Bring the books up to date for whoever reads them now."""
        for c in range(len(self.queues)):
            self.drop_impatient(c)

    def _requeue(self, request: Request) -> None:
        """A request that lost its replica goes to the front of its queue, if its patience lasts."""
        self.drop_impatient(request.class_index)
        if request.lost_patience(self.clock.now):
            self._drop(request, Outcome.TIMED_OUT)
        else:
            request.num_declined = 0
            self.queues[request.class_index].insert(0, request)

    def forward_declined(self, replica: Replica) -> None:
        """Send what a replica has declined to the next one with room; who finds none stays, as best effort."""
        declined, replica.scheduler.declined = replica.scheduler.declined, []
        for request in declined:
            other = replica.pool.next_with_room(replica)
            if other is None:
                replica.take_as_best_effort(request)
                continue
            replica.pool.books.forwarded += 1
            replica.in_flight.remove(request)
            correct_clearing(replica, self.clock.now)
            self._send(request, other)
        self.dispatch_queued()

    def _send(self, request: Request, replica: Replica) -> None:
        if not replica.pool.in_flight:
            replica.pool.busy_since_s = self.clock.now
        request.dispatched_s = self.clock.now
        request.slot = replica.slot
        if not request.on_host:  # else it is a stream that goes on at once
            request.awaited = True
            replica.clearing_s = expected_first_token_s(request, replica, self.clock.now)
        self._router.on_send(replica)
        self._router.remember(request, replica)
        replica.receive(request)

    # -- what comes back -------------------------------------------------------------------------------------------

    def on_token(self, replica: Replica, request: Request, *, finished: bool) -> None:
        """A stream has sent a token: its first, its last, both or neither."""
        if not request.has_begun:
            self._book_first_token(replica, request)
        if request.awaited:
            request.awaited = False
            correct_clearing(replica, self.clock.now)
        if finished:
            self._book_last_token(request)
            if self.postprocessor is not None:
                self.postprocessor.take(replica, request)
            else:
                self.release(replica, request)
                self.complete(request)

    def _book_first_token(self, replica: Replica, request: Request) -> None:
        request.first_token_s = self.clock.now
        replica.pool.books.prompt_tokens += request.prompt_tokens
        books = self.books[request.class_index]
        books.ttft_s.append(self.clock.now - request.arrival_s)
        books.late_first_tokens += request.first_token_late
        books.missed += request.first_token_late

    def _book_last_token(self, request: Request) -> None:
        request.last_token_s = self.clock.now
        request.marked_for_eviction = False
        if request.output_tokens > 1:
            self.books[request.class_index].tpot_s.append(request.tpot_s)

    def release(self, replica: Replica, request: Request) -> None:
        """A finished stream leaves its replica."""
        replica.scheduler.count_release(request)
        replica.scheduler.remove(request)
        replica.in_flight.remove(request)
        replica.pool.book_residence(self.clock.now - request.dispatched_s)

    def complete(self, request: Request) -> None:
        """A request has got all that it asked for, post-processing included."""
        books = self.books[request.class_index]
        books.finish(request.output_tokens)
        request.slo_met = request.meets_slos(self.clock.now)
        books.met += request.slo_met
        books.slow_answers += request.slow
        books.missed += not request.slo_met and not request.first_token_late  # a late first token is booked already
        self._end(request, Outcome.FINISHED, self.clock.now)

    def lose(self, replica: Replica, request: Request) -> None:
        """A request's replica has crashed: a stream that has begun fails, another is held again."""
        replica.in_flight.remove(request)
        request.marked_for_eviction = False
        request.kv_in_bridge = False
        if request.has_begun:
            self._drop(request, Outcome.FAILED)
        else:
            self._requeue(request)

    def forget(self, replica: Replica) -> None:
        """A replica has crashed: nothing of it is under way or waits any more."""
        self.bridge.forget(replica)
        if self.postprocessor is not None:
            self.postprocessor.forget(replica)

    def evict(self, replica: Replica, request: Request) -> None:
        """A marked request leaves a running batch; its KV cache is lost, unless it decodes and the host keeps it."""
        if self.spec.eviction == "host" and request.decoding:
            replica.scheduler.swap_out(request)
        else:
            replica.scheduler.interrupt(request)
            replica.scheduler.remove(request)
        self.take_back(replica, request)

    def migrate_from(self, replica: Replica) -> None:
        """Give away what a draining replica has and another has a place for, decode sequences with their KV cache."""
        scheduler = replica.scheduler
        decodes = [request for request in scheduler.running if request.decoding]
        for request in decodes + list(scheduler.waiting):
            place = self._router.pick(request, self._pools_serving(request))
            if place is None:
                continue
            if request in decodes:
                scheduler.swap_out(request)
            else:
                scheduler.waiting.remove(request)
            self.hand_over(replica, request, place)

    def hand_over(self, replica: Replica, request: Request, place: Replica) -> None:
        """A request, already off its engine, goes on at another replica."""
        self._leave(replica, request)
        replica.pool.books.migrations += 1
        self._send(request, place)

    def _leave(self, replica: Replica, request: Request) -> None:
        replica.in_flight.remove(request)
        if request.awaited:
            request.awaited = False
            correct_clearing(replica, self.clock.now)

    def take_back(self, replica: Replica, request: Request) -> None:
        """An evicted request, already off the engine, is held again; it keeps its tokens so far."""
        self._leave(replica, request)
        request.marked_for_eviction = False
        request.num_evictions += 1
        replica.pool.books.evictions += 1
        self._requeue(request)

    def _evict_from(self, replica: Replica) -> None:
        """Free a place: the youngest waiting batch request leaves now, or the youngest running one soon."""
        for request in reversed(replica.scheduler.waiting):
            if not request.interactive:
                if self.spec.eviction == "host":  # it waits without KV cache, or with one on the host
                    replica.scheduler.waiting.remove(request)
                else:
                    replica.scheduler.remove(request)
                self.take_back(replica, request)
                return
        for request in reversed(replica.scheduler.running):
            if not request.interactive and not request.marked_for_eviction:
                request.marked_for_eviction = True
                return

    # -- ends ------------------------------------------------------------------------------------------------------

    def _drop(self, request: Request, outcome: Outcome, end_s: float | None = None) -> None:
        """End a request without (full) service: always a miss."""
        books = self.books[request.class_index]
        if outcome is Outcome.REFUSED:
            books.refused += 1
        else:
            books.dropped += 1
        books.missed += not request.first_token_late
        self._end(request, outcome, self.clock.now if end_s is None else end_s)

    def _end(self, request: Request, outcome: Outcome, end_s: float) -> None:
        request.outcome = outcome
        request.end_s = end_s
        self.num_unresolved -= 1


def _most_evictable(pools: list[Pool]) -> Replica | None:
    """The ready replica with the most batch requests that may still be evicted; the first among equals."""
    candidates = [replica for pool in pools if pool.spec.role != "prefill" for replica in pool.replicas(State.READY)]
    best = choose_evicting([_num_evictable(replica) for replica in candidates])
    return None if best is None else candidates[best]


def _num_evictable(replica: Replica) -> int:
    return sum(
        not request.interactive and not request.marked_for_eviction and request not in replica.scheduler.parked
        for request in replica.in_flight
    )
