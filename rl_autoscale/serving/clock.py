"""The real clock."""

from __future__ import annotations

import time


class SystemClock:
    """`serving.protocols.Clock` of this machine."""

    def monotonic_s(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def sleep(self, duration_s: float) -> None:
        """Wait; not at all for a duration that has passed already."""
        time.sleep(max(duration_s, 0.0))
