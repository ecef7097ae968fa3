"""The real clock."""

from __future__ import annotations

import threading
import time


class SystemClock:
    """`serving.protocols.Clock` of this machine; `wake` ends every wait, now and from then on."""

    def __init__(self) -> None:
        self._awake = threading.Event()

    def monotonic_s(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def sleep(self, duration_s: float) -> None:
        """Wait; not at all for a duration that has passed already."""
        self._awake.wait(max(duration_s, 0.0))

    def wake(self) -> None:
        """For signal handlers of a process that is to end."""
        self._awake.set()
