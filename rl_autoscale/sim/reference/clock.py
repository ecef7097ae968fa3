"""SimPy's clock with a stated order of simultaneous events.

At equal times: replicas first, lowest slot first, and of one replica its crash before its iteration's end; then
transfers, lowest slot first; then post-processing workers; then looks at the balance of pools; then arrivals in their
order; then the control tick.
"""

from __future__ import annotations

from collections.abc import Callable

import simpy
from simpy.events import EventPriority

# SimPy uses priorities 0 and 1 for what it does itself (starting and ending processes).
_FIRST_REPLICA = 2
_FIRST_LINK = 1 << 38
_FIRST_WORKER = 1 << 39
_FIRST_POOL = _FIRST_WORKER + (1 << 38)
ARRIVAL = 1 << 40
TICK = ARRIVAL + 1


def crash_rank(slot: int) -> int:
    """Rank of the crash of the replica in a slot."""
    return _FIRST_REPLICA + 2 * slot


def replica_rank(slot: int) -> int:
    """Rank of every other event of the replica in a slot."""
    return _FIRST_REPLICA + 2 * slot + 1


def link_rank(slot: int) -> int:
    """Rank of the end of a transfer from the replica in a slot."""
    return _FIRST_LINK + slot


def worker_rank(worker: int) -> int:
    """Rank of the end of a post-processing worker's request."""
    return _FIRST_WORKER + worker


def balance_rank(pool: int) -> int:
    """Rank of a look at the balance of a pool."""
    return _FIRST_POOL + pool


class Clock(simpy.Environment):
    """A SimPy environment whose events carry a rank; seconds since the episode's start."""

    def wait(self, delay_s: float, rank: int) -> simpy.Event:
        """An event that happens after a delay (>= 0), among its contemporaries in the order of rank."""
        event = simpy.Event(self)
        self.trigger(event, rank, delay_s)
        return event

    def trigger(self, event: simpy.Event, rank: int, delay_s: float = 0.0) -> None:
        """Let a pending event happen after a delay."""
        event._ok = True
        event._value = None
        self.schedule(event, EventPriority(rank), delay_s)

    def call_after(self, delay_s: float, rank: int, action: Callable[[], None]) -> None:
        """Do something after a delay, in the order of rank."""
        event = self.wait(delay_s, rank)
        assert event.callbacks is not None  # it has not happened yet
        event.callbacks.append(lambda _: action())

    def run_through(self, until_s: float) -> None:
        """Handle every event at or before a time (>= now)."""
        self.run(until=self.wait(until_s - self.now, TICK))
