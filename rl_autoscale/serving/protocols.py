"""The seams of the live fleet: what a back end can see and do, and what a source of telemetry answers.

Everything outside the process is behind one of these, so that the controller is tested with a fake clock and fake
back ends, and one conformance suite runs over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Phase = Literal["starting", "ready", "draining", "failed"]


class Clock(Protocol):
    """Time and waiting, so that tests need neither."""

    def monotonic_s(self) -> float:
        """Seconds that never go back; ages and intervals are measured with it."""
        ...

    def wall_s(self) -> float:
        """Seconds since 1970, for logs only: a clock jump must change nothing that decides."""
        ...

    def sleep(self, duration_s: float) -> None:
        """Wait."""
        ...


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica as its back end sees it.

    Attributes:
        replica_id: unique over the life of the fleet: a restarted replica has a new one.
        pool: the pool's name.
        url: base address of the server (``http://host:port``); None as long as there is none.
        phase: ``failed`` is a replica that crashed or never became ready; it serves nothing.
        phase_age_s: how long it has been in this phase.
        reason: why it is not ready, in the back end's own words; empty when ready.
    """

    replica_id: str
    pool: str
    url: str | None
    phase: Phase
    phase_age_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PoolObservation:
    """What a back end says about a pool.

    Attributes:
        asked_for: the target in force, as the back end stores it; None when it cannot be read.
        replicas: all that exist, draining and failed ones included.
        age_s: how old this is.
    """

    asked_for: int | None
    replicas: tuple[Replica, ...]
    age_s: float = 0.0


class BackendError(Exception):
    """A back end could not do what was asked.

    Attributes:
        retryable: whether the same call may succeed later (timeouts, 409, 429, 5xx).
    """

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class Backend(Protocol):
    """Starts and stops the replicas of one pool. Calls are bounded in time and raise only `BackendError`."""

    @property
    def pool(self) -> str:
        """The pool's name."""
        ...

    def observe(self) -> PoolObservation:
        """Read targets and replicas; changes nothing."""
        ...

    def set_target(self, num_replicas: int) -> None:
        """Ask for this many replicas that are ready or starting; asking twice is harmless.

        Which replicas leave is the back end's choice; it prefers starting ones, then the youngest. Replicas that
        leave finish their work first (drain), as long as the back end allows.
        """
        ...

    def close(self) -> None:
        """Let go of connections and locks. Replicas stay."""
        ...
