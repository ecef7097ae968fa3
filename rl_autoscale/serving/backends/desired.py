"""The replicas we want, published for somebody else to act on: KEDA, or a HorizontalPodAutoscaler.

Publishing has one rule: silence is not zero. A figure older than ``hold_s``, withdrawn or never given is *stale*, and
whoever reads it must answer with an error or with nothing at all, on which every such reader keeps its replicas.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

from rl_autoscale.serving.protocols import BackendError, Clock, PoolObservation

DEFAULT_HOLD_S = 60.0
"""Six control intervals: longer than a restart of the controller, shorter than a wave of traffic."""


@dataclass(frozen=True, slots=True)
class Desired:
    """What was published last.

    Attributes:
        num_replicas: the figure, fresh or not; None when there was never one.
        age_s: how old it is; infinite when there was never one.
        fresh: whether it may be acted on.
        serial: grows whenever the figure or its freshness was set.
    """

    num_replicas: int | None
    age_s: float
    fresh: bool
    serial: int


class DesiredReplicas:
    """The figure of one pool; written by the controller's thread, read by servers' threads.

    Args:
        pool: the pool's name.
        clock: measures the age.
        hold_s: how long a figure may be acted on.
    """

    def __init__(self, pool: str, clock: Clock, *, hold_s: float = DEFAULT_HOLD_S) -> None:
        self.pool = pool
        self.hold_s = hold_s
        self._clock = clock
        self._changed = threading.Condition()
        self._num_replicas: int | None = None
        self._published_at_s = float("-inf")
        self._withdrawn = False
        self._serial = 0

    def publish(self, num_replicas: int) -> None:
        """Say what is wanted from now on; saying it again keeps it fresh."""
        with self._changed:
            self._num_replicas = num_replicas
            self._published_at_s = self._clock.monotonic_s()
            self._withdrawn = False
            self._serial += 1
            self._changed.notify_all()

    def withdraw(self) -> None:
        """Make it stale at once: nobody decides any more."""
        with self._changed:
            self._withdrawn = True
            self._serial += 1
            self._changed.notify_all()

    def read(self) -> Desired:
        """What stands now."""
        with self._changed:
            age_s = self._clock.monotonic_s() - self._published_at_s
            fresh = not self._withdrawn and age_s <= self.hold_s
            return Desired(self._num_replicas, age_s, fresh, self._serial)

    def wait_for_change(self, serial: int, timeout_s: float) -> Desired:
        """Wait until something newer than ``serial`` was said, or the time is over; then read."""
        with self._changed:
            self._changed.wait_for(lambda: self._serial != serial, timeout_s)
        return self.read()


class Observer(Protocol):
    """Whoever sees the replicas that another autoscaler starts and stops, for example `KubernetesObserver`."""

    def observe(self) -> PoolObservation:
        """Read targets and replicas; raises BackendError."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class PublishingBackend:
    """A back end that says what it wants and leaves the acting to others; see `serving.protocols.Backend`.

    ``observe().asked_for`` is what the other autoscaler has made of it, which may lag or differ.

    Args:
        desired: where the figure goes; a server that shows it reads from there.
        observer: sees the replicas.
    """

    def __init__(self, desired: DesiredReplicas, observer: Observer) -> None:
        self._desired = desired
        self._observer = observer

    @property
    def pool(self) -> str:
        """The pool's name."""
        return self._desired.pool

    def observe(self) -> PoolObservation:
        """What the observer sees."""
        return self._observer.observe()

    def set_target(self, num_replicas: int) -> None:
        """Publish the figure; raises BackendError (not retryable) when it is negative."""
        if num_replicas < 0:
            raise BackendError(f"target of pool {self.pool} is {num_replicas}; must be at least 0", retryable=False)
        self._desired.publish(num_replicas)

    def close(self) -> None:
        """Withdraw the figure, so that nobody acts on it any more. Replicas stay."""
        self._desired.withdraw()
        self._observer.close()
