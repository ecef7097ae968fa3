"""Calls with a time limit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class OutOfTimeError(Exception):
    """No answer within the limit."""


class Caller(Protocol):
    """Runs a function under a time limit; injected, so that tests need no slow functions."""

    def __call__(self, function: Callable[[], Any], limit_s: float) -> Any:
        """Return its result or raise what it raised; raise OutOfTimeError when it takes too long."""
        ...


class ThreadCaller:
    """Runs functions in one thread of its own, which a process does not wait for when it ends.

    Python cannot stop a thread: after a call ran out of time, further calls fail at once until it has come back.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[tuple[bool, Any]]]]
        self._jobs = queue.SimpleQueue()
        self._busy = threading.Event()
        threading.Thread(target=self._work, name="policy", daemon=True).start()

    def __call__(self, function: Callable[[], Result], limit_s: float) -> Result:
        """Run it; see `Caller`."""
        if self._busy.is_set():
            raise OutOfTimeError("the previous call has still not come back")
        answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._busy.set()
        self._jobs.put((function, answer))
        try:
            worked, value = answer.get(timeout=limit_s)
        except queue.Empty:
            raise OutOfTimeError(f"no answer within {limit_s:g} s") from None
        if worked:
            return value  # type: ignore[no-any-return]
        raise value

    def _work(self) -> None:
        while True:
            function, answer = self._jobs.get()
            try:
                outcome = (True, function())
            except Exception as error:  # handed to the caller, whatever it is
                outcome = (False, error)
            self._busy.clear()
            answer.put(outcome)
