"""One replica's life: start-up, iterations one by one, drain, crash."""

from __future__ import annotations

from collections.abc import Generator
from enum import Enum
from typing import TYPE_CHECKING, Any

import simpy

from rl_autoscale.fleet.routing import freeness
from rl_autoscale.sim.reference.balancer import give
from rl_autoscale.sim.reference.clock import Clock, crash_rank, replica_rank
from rl_autoscale.sim.reference.request import Request, blocks_for
from rl_autoscale.sim.reference.scheduler import Iteration, Scheduler
from rl_autoscale.sim.reference.schedulers.slos_serve import give_up

if TYPE_CHECKING:
    from rl_autoscale.sim.reference.pool import Pool

Process = Generator[simpy.Event, Any, None]


class State(Enum):
    """Where a replica stands."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"  # start cancelled, drained or crashed


class Replica:
    """One serving engine.

    Args:
        clock: the simulated time.
        pool: who owns it.
        slot: its number in the fleet; slots are used again.
        state: STARTING, or READY at time 0.
        startup_s: how long its start takes.
        life_s: ready time until it crashes; inf for never.
        spot_life_s: ready time until the notice that it will be taken away; inf for never.
        speed: true iteration time over the profile's.
    """

    def __init__(
        self,
        clock: Clock,
        pool: Pool,
        slot: int,
        state: State,
        startup_s: float,
        life_s: float,
        spot_life_s: float,
        speed: float,
    ) -> None:
        self.clock = clock
        self.pool = pool
        self.slot = slot
        self.asked_s = clock.now
        self.state = state
        self.scheduler = Scheduler(pool.spec, pool.books)
        self.in_flight: list[Request] = []  # what was sent here and has not left
        self.held: list[Request] = []  # computed prompts whose KV has not been sent on; the first is the next
        self.clearing_s = 0.0  # when the prompts sent here should have their first tokens, see fleet/admission.py
        self.waking = False  # it starts from sleep
        self.doomed = False  # it will be taken away
        self.giving_to: int | None = None  # place of the replica that gets a sequence when the iteration ends
        self._speed = speed
        self._work: simpy.Event | None = None  # what an idle replica waits for
        clock.process(self._live(startup_s))
        clock.process(self._die(startup_s, life_s))
        clock.process(self._be_taken_away(startup_s, spot_life_s))

    # -- what the gateway knows ------------------------------------------------------------------------------------

    @property
    def is_gone(self) -> bool:
        """Whether it has left the fleet."""
        return self.state is State.GONE

    @property
    def num_interactive(self) -> int:
        """Interactive requests in flight."""
        return sum(request.interactive for request in self.in_flight)

    @property
    def has_room(self) -> bool:
        """Whether the gateway may send it one more request."""
        return self.state is State.READY and len(self.in_flight) < self.pool.cap

    @property
    def freeness(self) -> float:
        """Free KV blocks per request, as the engine itself counts them now."""
        return self._freeness(self.scheduler.virtual_blocks, self.in_flight)

    def freeness_with(self, request: Request) -> float:
        """The same if a sequence of another replica went on here."""
        return self._freeness(
            self.scheduler.virtual_blocks + blocks_for(request.num_tokens), [*self.in_flight, request]
        )

    def _freeness(self, virtual_blocks: int, requests: list[Request]) -> float:
        urgent = self.pool.gateway.spec.urgent_priority
        if any(request.service_class.priority == urgent for request in requests):
            virtual_blocks += self.pool.spec.urgent_headroom_blocks
        return freeness(self.pool.spec.num_kv_blocks, virtual_blocks, len(requests))

    @property
    def pending(self) -> list[Request]:
        """Requests in flight that have sent no token since they were dispatched."""
        return [request for request in self.in_flight if request.awaited]

    @property
    def streams(self) -> list[Request]:
        """Requests in flight that have sent a token since they were dispatched, and go on."""
        return [request for request in self.in_flight if not request.awaited and request not in self.held]

    @property
    def running(self) -> list[Request]:
        """Sequences in the engine's batch."""
        return self.scheduler.running

    def receive(self, request: Request) -> None:
        """Take a request; an engine in the middle of an iteration sees it when that ends."""
        self.in_flight.append(request)
        self.scheduler.add(request, self.clock.now)
        self.look_for_work()

    def take_as_best_effort(self, request: Request) -> None:
        """A request that it has declined, and no other replica has room for, waits here."""
        give_up(request)
        self.scheduler.enqueue(request)
        self.look_for_work()

    def look_for_work(self) -> None:
        """Let an idle engine see what it could run now."""
        if self._work is not None:
            self.clock.trigger(self._work, replica_rank(self.slot))
            self._work = None

    def on_room(self) -> None:
        """Something has left it outside of an iteration: it may go on, or may go."""
        if self.state is State.DRAINING and not self.in_flight:
            self.pool.on_drained(self)
        elif self.scheduler.waiting:
            self.look_for_work()

    # -- its processes ---------------------------------------------------------------------------------------------

    def _live(self, startup_s: float) -> Process:
        """Start, then run one iteration after the other until there is nothing left to do and none will come."""
        rank = replica_rank(self.slot)
        if self.state is State.STARTING:
            yield self.clock.wait(startup_s, rank)
            if self.is_gone:
                return
            self.pool.on_ready(self)
            self.pool.gateway.dispatch_queued()
        while True:
            tries = self.pool.spec.slos_serve.tries if self.state is State.READY else 0
            self.scheduler.most_tries = min(tries, len(self.pool.ready))
            iteration = self.scheduler.schedule(self.clock.now)
            work = self._work = self.clock.event() if iteration is None else None
            self.pool.gateway.bridge.start_transfers()
            if self.scheduler.declined:
                self.pool.gateway.forward_declined(self)
            if work is not None:
                yield work
                if self.is_gone:
                    return
                continue
            assert iteration is not None
            duration_s = max(self._speed * iteration.duration_s(self.pool.spec.hardware), iteration.move_s)
            yield self.clock.wait(duration_s, rank)
            if self.is_gone:
                return
            self._end_iteration(iteration, duration_s)
            self.pool.gateway.dispatch_queued()
            if self.state is State.DRAINING and not self.in_flight:
                self.pool.on_drained(self)
                return

    def _end_iteration(self, iteration: Iteration, duration_s: float) -> None:
        """Hand out the iteration's tokens, let finished requests go, then the evicted ones, youngest first."""
        books = self.pool.books
        self.scheduler.now_s = self.clock.now
        books.itl_sum_s += duration_s * (len(iteration.decodes) + iteration.num_stalled)
        books.itl_count += len(iteration.decodes)
        for request in self.scheduler.complete(iteration):
            if request.has_begun:
                self.pool.gaps_s.append(self.clock.now - request.latest_token_s)
            request.latest_token_s = self.clock.now
            finished = request.generated_tokens == request.output_tokens
            prefilled = self.pool.spec.role == "prefill" and not finished
            if prefilled:
                self.scheduler.hold(request)
                self.held.append(request)
            self.pool.gateway.on_token(self, request, finished=finished)
            if prefilled:
                self.pool.gateway.bridge.on_held(self)
        for request in reversed(list(self.scheduler.running)):
            if request.marked_for_eviction:
                self.pool.gateway.evict(self, request)
        if self.giving_to is not None and self.pool.spec.rebalance is not None:
            give(self, self.pool.spec.rebalance)
        if self.state is State.DRAINING and self.pool.gateway.spec.drain == "migrate":
            self.pool.gateway.migrate_from(self)

    def _die(self, startup_s: float, life_s: float) -> Process:
        """Crash at the end of its life, unless it has left before; the iteration in progress is lost."""
        yield self.clock.wait(startup_s, replica_rank(self.slot))
        yield self.clock.wait(life_s, crash_rank(self.slot))
        if not self.is_gone:
            self._crash()

    def _crash(self) -> None:
        self.pool.on_crash(self)
        self.pool.gateway.dispatch_queued()
        self.pool.gateway.bridge.start_transfers()

    def _be_taken_away(self, startup_s: float, spot_life_s: float) -> Process:
        """Get the notice, drain, and die when it ends, unless it has left before."""
        yield self.clock.wait(startup_s, replica_rank(self.slot))
        yield self.clock.wait(spot_life_s, crash_rank(self.slot))
        if self.is_gone or self.pool.spec.spot is None:
            return
        self.pool.on_notice(self)
        self.pool.gateway.dispatch_queued()
        yield self.clock.wait(self.pool.spec.spot.notice_s, crash_rank(self.slot))
        if not self.is_gone:
            self._crash()
