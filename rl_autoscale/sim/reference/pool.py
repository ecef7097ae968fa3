"""Replicas of one pool: started, reclaimed, cancelled, drained, replaced after a crash."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.state import FloatArray
from rl_autoscale.sim.layout import COLD, LIFE, SPOT, WAKE
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
        draws: what chance decides about the j-th start, see `episode.draw_replica_times`.
        speed: true iteration time over the profile's.
    """

    def __init__(
        self,
        clock: Clock,
        spec: PoolSpec,
        base: int,
        gateway: Gateway,
        draws: FloatArray,
        speed: float,
    ) -> None:
        self.clock = clock
        self.spec = spec
        self.base = base
        self.gateway = gateway
        self.books = PoolBooks()
        self.target = spec.initial
        self.cap = spec.batch_limit
        self.slots: list[Replica | None] = [None] * slots_of(spec)
        self.asleep: set[int] = set()  # places in `slots` whose replica sleeps
        self.token_time_table_s = spec.hardware.token_time_table_s(spec.token_budget)
        self.mean_residence_s = 0.0  # dispatch to last token
        self.busy_since_s = 0.0  # since when any has been in flight, while any is
        self.gaps_s: list[float] = []  # between every two tokens of a request, the later one from here
        self.num_residences = 0
        self._draws, self._speed = draws, speed
        self._booked_to_s = 0.0
        for _ in range(spec.initial):
            self._start(at_once=True)

    def replicas(self, *states: State) -> list[Replica]:
        """The replicas in one of these states (all, when none is named), lowest slot first."""
        return [r for r in self.slots if r is not None and (not states or r.state in states)]

    @property
    def ready(self) -> list[Replica]:
        """Replicas that take requests."""
        return self.replicas(State.READY)

    def next_with_room(self, replica: Replica) -> Replica | None:
        """The next replica in the order of slots, and round again, that has room; None if no other has any."""
        place = replica.slot - self.base
        others = [other for other in self.slots[place + 1 :] + self.slots[:place] if other is not None]
        return next((other for other in others if other.has_room), None)

    @property
    def in_flight(self) -> list[Request]:
        """Requests on its replicas."""
        return [request for replica in self.replicas() for request in replica.in_flight]

    @property
    def mean_start_s(self) -> float:
        """How long a start takes by the spec, with sleepers or without."""
        quick = self.asleep or any(replica.waking for replica in self.replicas(State.STARTING))
        return self.spec.wake_mean_s if quick else self.spec.startup_mean_s

    def reconcile(self) -> None:
        """Bring ready + starting to the target: reclaim before waking before starting, cancel before draining."""
        self.book_time()
        while (missing := self.target - len(self.replicas(State.READY, State.STARTING))) != 0:
            if missing > 0:
                if draining := [replica for replica in self.replicas(State.DRAINING) if not replica.doomed]:
                    draining[0].state = State.READY
                    self.books.reclaimed += 1
                elif not self._start():
                    return
            elif starting := self.replicas(State.STARTING):
                newest = max(starting, key=lambda r: (r.asked_s, r.slot))
                self._leave(newest, may_sleep=newest.waking)
                self.books.cancelled_starts += 1
            else:
                self._drain(min(self.ready, key=lambda r: (r.num_interactive, len(r.in_flight), -r.slot)))

    def book_time(self) -> None:
        """Integrate replica-seconds up to now; call before the number of replicas changes."""
        elapsed_s = self.clock.now - self._booked_to_s
        self.books.replica_s += elapsed_s * len(self.replicas())
        self.books.ready_s += elapsed_s * len(self.ready)
        self.books.sleep_s += elapsed_s * len(self.asleep)
        self._booked_to_s = self.clock.now

    def book_residence(self, residence_s: float) -> None:
        """Move the mean residence by one finished request."""
        self.num_residences += 1
        step = (residence_s - self.mean_residence_s) / min(self.num_residences, _RESIDENCE_MEMORY)
        self.mean_residence_s += step

    def on_ready(self, replica: Replica) -> None:
        """A start is over."""
        self.book_time()
        replica.state = State.READY
        replica.waking = False

    def on_drained(self, replica: Replica) -> None:
        """A draining replica has nothing left to do."""
        self.book_time()
        self._leave(replica, may_sleep=True)

    def on_notice(self, replica: Replica) -> None:
        """It will be taken away: it gets no more requests, and another one starts in its place."""
        self.book_time()
        self.books.notices += 1
        replica.doomed = True
        if replica.state is State.READY:
            self._drain(replica)
        self.reconcile()

    def on_crash(self, replica: Replica) -> None:
        """It is gone with all that ran on it: streams fail or go back to the gateway, and a new replica starts."""
        self.book_time()
        self._leave(replica, may_sleep=False)
        if replica.doomed:
            self.books.taken_away += 1
        else:
            self.books.crashes += 1
        scheduler = replica.scheduler
        lost = replica.held + scheduler.parked + scheduler.running + scheduler.waiting
        for request in reversed(lost):  # each goes in front of the younger ones
            scheduler.remove(request)
            self.gateway.lose(replica, request)
        self.gateway.forget(replica)
        self.reconcile()

    def _start(self, *, at_once: bool = False) -> bool:
        """Wake the first sleeper, or start a replica in the lowest free slot; False when all slots are taken.

        Args:
            at_once: whether it is ready now, as at time 0.
        """
        waking = bool(self.asleep)
        place = min(self.asleep) if waking else next((k for k, r in enumerate(self.slots) if r is None), None)
        if place is None:
            return False
        column = self.books.starts % self._draws.shape[1]
        startup_s = 0.0 if at_once else float(self._draws[COLD, column])
        if waking:
            self.asleep.remove(place)
            startup_s = float(self._draws[WAKE, self.books.wakes % self._draws.shape[1]])
            self.books.wakes += 1
        self.books.starts += 1
        life_s, spot_life_s = float(self._draws[LIFE, column]), float(self._draws[SPOT, column])
        state = State.READY if at_once else State.STARTING
        replica = Replica(self.clock, self, self.base + place, state, startup_s, life_s, spot_life_s, self._speed)
        replica.waking = waking
        self.slots[place] = replica
        return True

    def _drain(self, replica: Replica) -> None:
        """Send it no more requests; it leaves when its last one ends, which may be now."""
        replica.state = State.DRAINING
        if not replica.in_flight:
            self._leave(replica, may_sleep=True)

    def _leave(self, replica: Replica, *, may_sleep: bool) -> None:
        """It serves no longer: it goes to sleep where the spec lets it, else its slot is free."""
        replica.state = State.GONE
        place = replica.slot - self.base
        self.slots[place] = None
        sleep = self.spec.sleep
        if may_sleep and not replica.doomed and sleep is not None and len(self.asleep) < sleep.max_sleeping:
            self.asleep.add(place)


def slots_of(spec: PoolSpec) -> int:
    """Places for a pool's replicas: twice as many as may serve, for those that drain and are to be taken away."""
    return 2 * spec.max_replicas
