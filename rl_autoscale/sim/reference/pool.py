"""Replicas of one pool: started, reclaimed, cancelled, drained, replaced after a crash."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl_autoscale.fleet.spec import PoolSpec
from rl_autoscale.fleet.state import FloatArray
from rl_autoscale.sim.reference.books import PoolBooks
from rl_autoscale.sim.reference.clock import Clock
from rl_autoscale.sim.reference.replica import Replica, State
from rl_autoscale.sim.reference.request import Request

if TYPE_CHECKING:
    from rl_autoscale.sim.reference.gateway import Gateway

_RESIDENCE_MEMORY = 64
"""Finished requests over which the mean residence forgets."""


class Pool:
    """Replicas that share hardware, role and settings.

    Args:
        clock: the simulated time.
        spec: the pool.
        base: number of its first slot in the fleet.
        gateway: who sends requests.
        startup_s: duration of the j-th start.
        life_s: ready time of the j-th started replica until it crashes.
        speed: true iteration time over the profile's.
    """

    def __init__(
        self,
        clock: Clock,
        spec: PoolSpec,
        base: int,
        gateway: Gateway,
        startup_s: FloatArray,
        life_s: FloatArray,
        speed: float,
    ) -> None:
        self.clock = clock
        self.spec = spec
        self.base = base
        self.gateway = gateway
        self.books = PoolBooks()
        self.target = spec.initial
        self.cap = spec.batch_limit
        self.slots: list[Replica | None] = [None] * spec.max_replicas
        self.token_time_table_s = spec.hardware.token_time_table_s(spec.token_budget)
        self.mean_residence_s = 0.0  # dispatch to last token
        self._num_residences = 0
        self._startup_s, self._life_s, self._speed = startup_s, life_s, speed
        self._booked_to_s = 0.0
        for _ in range(spec.initial):
            self._start(State.READY)

    def replicas(self, *states: State) -> list[Replica]:
        """The replicas in one of these states (all, when none is named), lowest slot first."""
        return [r for r in self.slots if r is not None and (not states or r.state in states)]

    @property
    def ready(self) -> list[Replica]:
        """Replicas that take requests."""
        return self.replicas(State.READY)

    @property
    def in_flight(self) -> list[Request]:
        """Requests on its replicas."""
        return [request for replica in self.replicas() for request in replica.in_flight]

    def reconcile(self) -> None:
        """Bring ready + starting to the target: reclaim before starting, cancel before draining."""
        self.book_time()
        while (missing := self.target - len(self.replicas(State.READY, State.STARTING))) != 0:
            if missing > 0:
                if draining := self.replicas(State.DRAINING):
                    draining[0].state = State.READY
                    self.books.reclaimed += 1
                else:
                    self._start()
            elif starting := self.replicas(State.STARTING):
                self._leave(max(starting, key=lambda r: (r.asked_s, r.slot)))
                self.books.cancelled_starts += 1
            else:
                self._drain(min(self.ready, key=lambda r: (r.num_interactive, len(r.in_flight), -r.slot)))

    def book_time(self) -> None:
        """Integrate replica-seconds up to now; call before the number of replicas changes."""
        elapsed_s = self.clock.now - self._booked_to_s
        self.books.replica_s += elapsed_s * len(self.replicas())
        self.books.ready_s += elapsed_s * len(self.ready)
        self._booked_to_s = self.clock.now

    def book_residence(self, residence_s: float) -> None:
        """Move the mean residence by one finished request."""
        self._num_residences += 1
        step = (residence_s - self.mean_residence_s) / min(self._num_residences, _RESIDENCE_MEMORY)
        self.mean_residence_s += step

    def on_ready(self, replica: Replica) -> None:
        """A start is over."""
        self.book_time()
        replica.state = State.READY

    def on_drained(self, replica: Replica) -> None:
        """A draining replica has nothing left to do."""
        self.book_time()
        self._leave(replica)

    def on_crash(self, replica: Replica) -> None:
        """A replica dies; its requests fail or go back to the gateway, and a new replica starts in its place."""
        self.book_time()
        self._leave(replica)
        self.books.crashes += 1
        lost = replica.scheduler.running + replica.scheduler.waiting
        for request in reversed(lost):  # each goes in front of the younger ones
            replica.scheduler.remove(request)
            self.gateway.lose(replica, request)
        self.reconcile()

    def _start(self, state: State = State.STARTING) -> None:
        """Start a replica in the lowest free slot with the pool's next draw; those of time 0 are ready at once."""
        draw = self.books.starts % len(self._startup_s)
        self.books.starts += 1
        startup_s = float(self._startup_s[draw]) if state is State.STARTING else 0.0
        place = self.slots.index(None)
        self.slots[place] = Replica(
            self.clock, self, self.base + place, state, startup_s, float(self._life_s[draw]), self._speed
        )

    def _drain(self, replica: Replica) -> None:
        """Send it no more requests; it leaves when its last one ends, which may be now."""
        replica.state = State.DRAINING
        if not replica.in_flight:
            self._leave(replica)

    def _leave(self, replica: Replica) -> None:
        replica.state = State.GONE
        self.slots[replica.slot - self.base] = None
