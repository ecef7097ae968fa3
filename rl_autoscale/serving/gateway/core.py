"""What the gateway decides: which request is sent where, held, refused, dropped or tried again. No I/O, no clock.

Every method takes the time (monotonic seconds). The rules are those of the simulator's gateway, in the same order, and
a test gives both the same arrivals and compares request by request. What differs is what a simulator does not have:
clients that go away, replicas that answer with an error, answers in one piece. Eviction is narrower: a live engine
cannot give a running request back with its tokens, so only one of which the client has nothing is taken off a replica,
and it begins anew.

Two laws hold at any moment: every request that arrived is in exactly one state, and a replica that has its pool's cap
in flight gets an interactive request only in a batch request's place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from rl_autoscale.fleet.admission import estimate_queue_wait_s, selective_ttft_s
from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.fleet.routing import choose_evicting, choose_pool, choose_replica
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NEVER_REFUSE, NO_LIMIT
from rl_autoscale.serving.gateway.books import PoolBook, ReplicaBook
from rl_autoscale.serving.gateway.classes import ClassBook
from rl_autoscale.serving.gateway.tickets import INSIDE, State, Ticket, _nobody_waits
from rl_autoscale.serving.gateway_api import GatewayDecision, GatewaySnapshot, ReplicaAddress

_FIRST_SUSPENSION_S = 0.5
_LONGEST_SUSPENSION_S = 30.0
_MIN_RETRY_AFTER_S = 1.0


class GatewayCore:
    """Queues, caps, routing, refusal and books.

    Args:
        spec: the fleet: classes, pools, router.
        draw: gives random numbers in [0, 1), for the power of two router.
        max_sent: how often a request is sent before it counts as failed; evictions are not counted.
        max_evictions: how often a request gives its place to another.

    Raises:
        SpecError: the router needs hashes of prompts or counts of KV blocks, which this gateway does not have, or
            requests pass several stages.
    """

    def __init__(
        self, spec: FleetSpec, draw: Callable[[], float], *, max_sent: int = 3, max_evictions: int = 3
    ) -> None:
        if spec.router == "prefix_affinity":
            raise SpecError(
                "router: prefix_affinity is for simulated fleets: the gateway does not hash prompts; "
                "use least_loaded, power_of_two, round_robin or packing"
            )
        if spec.router == "freeness":
            raise SpecError(
                "router: freeness is for simulated fleets: the gateway does not know the KV blocks of a replica when "
                "it sends a request; use least_loaded, power_of_two, round_robin or packing"
            )
        if spec.has_stages:
            raise SpecError(
                "prefill and decode pools and postprocess are for simulated fleets: the gateway sends a request to one "
                "replica; use roles interactive, mixed and batch"
            )
        self.spec = spec
        self.classes = [ClassBook(promise) for promise in spec.classes]
        self.pools = [PoolBook(pool) for pool in spec.pools]
        self.replicas: dict[str, ReplicaBook] = {}
        self._draw = draw
        self._max_sent = max_sent
        self._max_evictions = max_evictions if spec.evict_batch else 0
        self._num_places = 0
        self._pools_of = [[self.pools[p] for p in spec.pools_serving(c)] for c in range(len(spec.classes))]
        self._class_order = sorted(range(len(spec.classes)), key=lambda c: spec.classes[c].priority)

    # -- what clients do -------------------------------------------------------------------------------------------

    def arrive(
        self,
        class_index: int,
        prompt_tokens: int,
        now_s: float,
        *,
        streams: bool = True,
        on_change: Callable[[], None] = _nobody_waits,
        on_evict: Callable[[], None] = _nobody_waits,
    ) -> Ticket:
        """A request is refused, sent, held, or turned away because the queue is full.

        Args:
            class_index: its class.
            prompt_tokens: estimated.
            now_s: the time.
            streams: whether its first token will be seen.
            on_change: called when it leaves the queue later on.
            on_evict: called when the replica it was sent to has to give it up.

        Returns:
            The ticket, in any state but FINISHED, CANCELLED and FAILED.
        """
        book = self.classes[class_index]
        ticket = Ticket(class_index, prompt_tokens, now_s, book.arrivals, streams, self._draw(), on_change, on_evict)
        book.book_arrival(prompt_tokens)
        self._drop_impatient(book, now_s)
        replica, evicting = self._place_for(ticket, now_s)
        excess_s = self._lateness_s(ticket, replica, now_s)
        if excess_s > 0.0:
            ticket.retry_after_s = max(excess_s, _MIN_RETRY_AFTER_S) if math.isfinite(excess_s) else 60.0
            self._end(ticket, State.REFUSED, "the wait would exceed the class's time to first token")
        elif replica is not None:
            if evicting:
                self._evict_from(replica, now_s)
            self._send(ticket, replica, now_s)
            if evicting:
                self.dispatch_queued(now_s)  # another replica may have room for the evicted request
        elif len(book.queue) < book.promise.queue_limit:
            book.enqueue(ticket)
        else:
            ticket.retry_after_s = max(self._queue_wait_s(ticket, now_s), _MIN_RETRY_AFTER_S)
            self._end(ticket, State.DROPPED, "the class's queue is full")
        return ticket

    def cancel(self, ticket: Ticket, now_s: float, reason: str = "the client went away") -> None:
        """The client no longer waits for a request that has not ended."""
        self._leave(ticket, State.CANCELLED, reason, now_s)

    # -- what replicas do ------------------------------------------------------------------------------------------

    def see_token(self, ticket: Ticket, now_s: float) -> None:
        """A stream has sent its first token."""
        replica = _replica_of(ticket)
        replica.num_failures = 0
        self.keep(ticket)
        if not ticket.has_begun:
            self.classes[ticket.class_index].book_first_token(ticket, now_s)
        if ticket.awaited:
            replica.see_token(ticket, now_s)

    def keep(self, ticket: Ticket) -> None:
        """Its client is about to get something of the answer: from now on it is not evicted."""
        _replica_of(ticket).evictable.pop(ticket, None)

    def finish(self, ticket: Ticket, output_tokens: int, now_s: float) -> None:
        """An answer is complete and the client has it."""
        replica = _replica_of(ticket)
        book = self.classes[ticket.class_index]
        replica.num_failures = 0
        if not ticket.streams:
            book.first_tokens += 1
        elif not ticket.has_begun:
            self.see_token(ticket, now_s)
        book.book_finish(ticket, output_tokens, now_s)
        replica.pool.book_residence(now_s - ticket.sent_s)
        self._leave(ticket, State.FINISHED, "", now_s)

    def lose(self, ticket: Ticket, now_s: float, reason: str) -> None:
        """A replica has failed a request: one of which the client has nothing yet is held again, another has failed.

        Args:
            ticket: a sent request; afterwards it is queued, sent elsewhere, dropped or failed.
            now_s: the time.
            reason: what happened.
        """
        replica = _replica_of(ticket)
        self._suspend(replica, now_s)
        if ticket.has_begun or ticket.num_sent - ticket.num_evictions >= self._max_sent:
            self._leave(ticket, State.FAILED, reason, now_s)
            return
        self._hold_again(ticket, replica, now_s)
        self.dispatch_queued(now_s)

    # -- what the controller says ----------------------------------------------------------------------------------

    def set_replicas(self, addresses: Iterable[ReplicaAddress], now_s: float) -> None:
        """Take the list of all replicas; those missing from it get nothing more and are forgotten once empty.

        Raises:
            UnknownNameError: a pool that the fleet does not have; nothing has changed then.
        """
        pools = dict(zip(self.spec.pool_names, self.pools, strict=True))
        listed = {address.replica_id: address for address in addresses}
        for address in listed.values():
            if address.pool not in pools:
                raise UnknownNameError("pool", address.pool, pools)
        for replica in list(self.replicas.values()):
            if replica.replica_id not in listed:
                replica.listed = False
                replica.phase = "draining"
                self._forget_if_empty(replica)
        for address in listed.values():
            self._list(address, pools[address.pool])
        self.dispatch_queued(now_s)

    def decide(self, decision: GatewayDecision, now_s: float) -> None:
        """Take caps, admission levels, selectivities and limits of classes; what is not named stays.

        Raises:
            UnknownNameError: a pool or class that the fleet does not have; nothing has changed then.
        """
        _refuse_unknown("pool", decision.max_batch_size, self.spec.pool_names)
        _refuse_unknown(
            "class", {**decision.admission, **decision.max_in_flight, **decision.selectivity}, self.spec.class_names
        )
        for pool in self.pools:
            pool.cap = decision.max_batch_size.get(pool.spec.name, pool.cap)
        for book in self.classes:
            if book.promise.name in decision.admission:
                level = decision.admission[book.promise.name]
                book.admission = float(NEVER_REFUSE) if level is None else level
            book.selectivity = decision.selectivity.get(book.promise.name, book.selectivity)
            if book.promise.name in decision.max_in_flight:
                limit = decision.max_in_flight[book.promise.name]
                book.max_in_flight = NO_LIMIT if limit is None else limit
        self.dispatch_queued(now_s)

    # -- time ------------------------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Let time pass: patience ends, suspensions end, answers in one piece are taken to have begun on time."""
        for book in self.classes:
            self._drop_impatient(book, now_s)
        for replica in self.replicas.values():
            for ticket in replica.tickets:
                if ticket.awaited and not ticket.streams and ticket.expected_s <= now_s:
                    replica.see_token(ticket, now_s)
        self.dispatch_queued(now_s)

    def dispatch_queued(self, now_s: float) -> None:
        """Send held requests while there is room, classes by priority, first come first served within a class."""
        for c in self._class_order:
            book = self.classes[c]
            while book.queue:
                self._drop_impatient(book, now_s)
                if not book.queue or book.at_limit:
                    break
                replica = self._pick(book.queue[0], now_s)
                if replica is None:
                    break
                ticket = book.dequeue()
                self._send(ticket, replica, now_s)
                ticket.on_change()

    def snapshot(self, now_s: float, *, started_at_s: float, uptime_s: float) -> GatewaySnapshot:
        """Counters and gauges for the controller."""
        for book in self.classes:
            self._drop_impatient(book, now_s)
        return GatewaySnapshot(
            started_at_s=started_at_s,
            uptime_s=uptime_s,
            pools={pool.spec.name: pool.snapshot() for pool in self.pools},
            classes={book.promise.name: book.snapshot(now_s) for book in self.classes},
            in_flight_by_replica={replica.replica_id: replica.load for replica in self.replicas.values()},
        )

    # -- inside ----------------------------------------------------------------------------------------------------

    def _pick(self, ticket: Ticket, now_s: float) -> ReplicaBook | None:
        """A replica with room in the pools of the first role that has one; None if all are full."""
        offers: list[ReplicaBook] = []
        for pool in self._pools_of[ticket.class_index]:
            open_ones = [replica for replica in pool.replicas if replica.has_room(now_s)]
            if open_ones:
                chosen = choose_replica(
                    self.spec.router,
                    [replica.load for replica in open_ones],
                    [replica.place for replica in open_ones],
                    pool.next_place,
                    ticket.routing_u,
                )
                offers.append(open_ones[chosen])
        if not offers:
            return None
        return offers[choose_pool(self.spec.router, [r.pool.spec for r in offers], [r.load for r in offers])]

    def _place_for(self, ticket: Ticket, now_s: float) -> tuple[ReplicaBook | None, bool]:
        """Where to send a request now, and whether batch work must make room for it there. Nobody overtakes a queue."""
        book = self.classes[ticket.class_index]
        if book.queue or book.at_limit:
            return None, False
        replica = self._pick(ticket, now_s)
        if replica is None and book.interactive:
            listening = [r for pool in self._pools_of[ticket.class_index] for r in pool.replicas if r.listens(now_s)]
            best = choose_evicting([len(candidate.evictable) for candidate in listening])
            if best is not None:
                return listening[best], True
        return replica, False

    def _evict_from(self, replica: ReplicaBook, now_s: float) -> None:
        """Free a place: the youngest request of the least urgent class is held again, and is not sent by this."""
        victim = max(reversed(replica.evictable), key=lambda ticket: self.classes[ticket.class_index].promise.priority)
        victim.num_evictions += 1
        replica.pool.evictions += 1
        self._hold_again(victim, replica, now_s)
        victim.on_evict()

    def _hold_again(self, ticket: Ticket, replica: ReplicaBook, now_s: float) -> None:
        """A request of which the client has nothing has lost its replica: it is held at its place, or out of patience.

        Nobody is told: who handles the request looks at its state once the replica is done with it.
        """
        book = self.classes[ticket.class_index]
        self._off_replica(ticket, replica, now_s)
        self._drop_impatient(book, now_s)
        if book.lost_patience(ticket, now_s):
            self._end(ticket, State.DROPPED, "waited longer than the class's timeout")
        else:
            book.enqueue(ticket)

    def _send(self, ticket: Ticket, replica: ReplicaBook, now_s: float) -> None:
        book = self.classes[ticket.class_index]
        ticket.state = State.SENT
        ticket.replica = replica
        ticket.sent_s = now_s
        ticket.num_sent += 1
        replica.pool.next_place = replica.place + 1
        evictable = not book.interactive and ticket.num_evictions < self._max_evictions
        replica.add(ticket, interactive=book.interactive, evictable=evictable, now_s=now_s)
        book.in_flight += 1

    def _lateness_s(self, ticket: Ticket, replica: ReplicaBook | None, now_s: float) -> float:
        """By how much the expected time to first token exceeds what the class's admission level allows."""
        book = self.classes[ticket.class_index]
        if book.admission == NEVER_REFUSE:
            return -math.inf
        tokens, preferred = ticket.prompt_tokens, self._pools_of[ticket.class_index][0]
        alone_s = (preferred if replica is None else replica.pool).prefill_time_s(tokens, tokens * tokens, 0, 0)
        if replica is None:
            expected_s = self._queue_wait_s(ticket, now_s) + alone_s
        else:
            expected_s = replica.expected_first_token_s(tokens, now_s) - now_s
        answer = book.mean_answer_tokens * preferred.spec.answer_token_work
        counted_s = selective_ttft_s(expected_s, alone_s, tokens, book.mean_prompt_tokens, answer, book.selectivity)
        return counted_s - book.admission * book.promise.ttft_slo_s

    def _queue_wait_s(self, ticket: Ticket, now_s: float) -> float:
        """Wait for a place: by Little's law while replicas are ready, else the start-up time that the spec promises."""
        pools = self._pools_of[ticket.class_index]
        ready = [pool for pool in pools if any(replica.phase == "ready" for replica in pool.replicas)]
        if not ready:
            return pools[0].spec.startup_mean_s
        ahead = 0
        for book in self.classes:
            promise = self.classes[ticket.class_index].promise
            if book.promise.priority <= promise.priority and book.promise.model == promise.model:
                self._drop_impatient(book, now_s)
                ahead += len(book.queue)
        in_flight = sum(pool.in_flight for pool in pools)
        return float(estimate_queue_wait_s(ahead, in_flight, max(pool.residence_s(now_s) for pool in ready)))

    def _drop_impatient(self, book: ClassBook, now_s: float) -> None:
        while book.queue and book.lost_patience(book.queue[0], now_s):
            ticket = book.dequeue()
            self._end(ticket, State.DROPPED, "waited longer than the class's timeout")
            ticket.on_change()

    def _leave(self, ticket: Ticket, state: State, reason: str, now_s: float) -> None:
        """End a request wherever it is; its place may go to another."""
        if ticket.state is State.QUEUED:
            self.classes[ticket.class_index].withdraw(ticket)
            self._end(ticket, state, reason)
        elif ticket.state is State.SENT:
            self._off_replica(ticket, _replica_of(ticket), now_s)
            self._end(ticket, state, reason)
            self.dispatch_queued(now_s)

    def _off_replica(self, ticket: Ticket, replica: ReplicaBook, now_s: float) -> None:
        book = self.classes[ticket.class_index]
        replica.remove(ticket, interactive=book.interactive, now_s=now_s)
        book.in_flight -= 1
        self._forget_if_empty(replica)

    def _end(self, ticket: Ticket, state: State, reason: str) -> None:
        assert ticket.state in INSIDE, f"a request that was {ticket.state.value} cannot be {state.value}"
        ticket.state = state
        ticket.reason = reason
        self.classes[ticket.class_index].ended[state] += 1

    def _list(self, address: ReplicaAddress, pool: PoolBook) -> None:
        replica = self.replicas.get(address.replica_id)
        if replica is None:
            replica = ReplicaBook(address.replica_id, pool, address.url, address.phase, self._num_places)
            self._num_places += 1
            self.replicas[address.replica_id] = replica
            pool.replicas.append(replica)
        replica.listed, replica.phase, replica.url = True, address.phase, address.url

    def _forget_if_empty(self, replica: ReplicaBook) -> None:
        if not replica.listed and not replica.tickets and replica.replica_id in self.replicas:
            del self.replicas[replica.replica_id]
            replica.pool.replicas.remove(replica)

    def _suspend(self, replica: ReplicaBook, now_s: float) -> None:
        """Leave a replica alone: half a second after the first failure, then twice as long each time."""
        if replica.suspended_until_s > now_s:
            return  # a crash loses many requests at once and is one failure
        replica.num_failures += 1
        pause_s = min(_FIRST_SUSPENSION_S * 2.0 ** min(replica.num_failures - 1, 10), _LONGEST_SUSPENSION_S)
        replica.suspended_until_s = now_s + pause_s


def _replica_of(ticket: Ticket) -> ReplicaBook:
    assert ticket.state is State.SENT, f"the request is {ticket.state.value}, not on a replica"
    assert ticket.replica is not None
    return ticket.replica


def _refuse_unknown(kind: str, given: Mapping[str, object], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise UnknownNameError(kind, name, known)
