"""Tokens of streams under way go on a few at a time, so that a new request does not wait for all of them.

An engine's tokens come as its batch does, hundreds at once. An event loop would pass every one of them on before it
looks for anything new, and again at each step of a request that has come in between: tens of milliseconds until its
first token. Here the tokens wait their turn, in the order in which they came, and between two turns the loop looks
for what is new: a token waits for those before it, as ever, and for the few steps of whoever came in between.
"""

from __future__ import annotations

import asyncio
from collections import deque

WIDTH = 8
"""Tokens per turn; one costs some 60 µs, so a turn takes half a millisecond."""


class Turnstile:
    """Lets so many pass in each turn of the event loop."""

    def __init__(self, width: int = WIDTH) -> None:
        self._width = width
        self._left = width
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turning = False

    async def turn(self) -> None:
        """Pass, now or in a later turn."""
        loop = asyncio.get_running_loop()
        if not self._turning:
            self._turning = True
            loop.call_soon(self._next, loop)
        if self._left > 0 and not self._waiting:
            self._left -= 1
            return
        place = loop.create_future()
        self._waiting.append(place)
        await place

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        """A new turn: call those who wait."""
        self._left = self._width
        self._turning = bool(self._waiting)
        while self._waiting and self._left > 0:
            place = self._waiting.popleft()
            if not place.done():  # else whoever waited was cancelled
                place.set_result(None)
                self._left -= 1
        if self._turning:
            loop.call_soon(self._next, loop)
