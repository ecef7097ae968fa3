"""The engine in real time, or accelerated: requests come in, tokens go out when they are due.

Times here are *engine seconds*: real seconds times the speed-up. An iteration that began when the one before ended
is due its duration after that one was due, not after it was handed out, so a late wake-up delays its tokens and
nothing after them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from rl_autoscale.serving.emulator.engine import Engine, Step
from rl_autoscale.sim.reference.request import Request


@dataclass(slots=True, eq=False)
class Job:
    """A request in the engine and the tokens that nobody has fetched yet.

    Attributes:
        request: its engine side; times are engine seconds.
        max_tokens: that the client allowed.
        cut_short: whether it ends because of that, not by itself.
        aborted: whether the engine gave it up.
        last_token_s: when its newest token came.
        cached_tokens: of its prompt, that the prefix cache held; known from the first token on.
    """

    request: Request
    max_tokens: int
    cut_short: bool
    aborted: bool = False
    last_token_s: float = 0.0
    cached_tokens: int = 0
    _unfetched: int = 0
    _waiter: asyncio.Future[None] | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        """Whether all its tokens are computed."""
        return self.request.generated_tokens >= self.request.output_tokens

    async def new_tokens(self) -> int:
        """Wait for tokens; several when the caller was slow, as vLLM's output collector merges them.

        Returns:
            How many, >= 1; 0 when the engine has given the request up.
        """
        if not self._unfetched and not self.aborted:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        count, self._unfetched = self._unfetched, 0
        return count

    def deliver(self, now_s: float) -> None:
        """One more token."""
        self.last_token_s = now_s
        self._unfetched += 1
        self._wake()

    def give_up(self) -> None:
        """No more tokens will come."""
        self.aborted = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Observer(Protocol):
    """Hears what the engine does; the metrics page."""

    def on_step(self, step: Step, duration_s: float) -> None:
        """An iteration has ended."""
        ...

    def on_token(self, job: Job, gap_s: float | None, now_s: float) -> None:
        """A request got a token: its first (no gap), or one so long after the last."""
        ...

    def on_finish(self, job: Job, now_s: float) -> None:
        """A request has all its tokens."""
        ...


class EngineLoop:
    """Steps an engine.

    Args:
        engine: what runs.
        observer: hears of it.
        clock: monotonic real seconds.
        speed: engine seconds per real second.
    """

    def __init__(self, engine: Engine, observer: Observer, clock: Callable[[], float], speed: float = 1.0) -> None:
        self.engine = engine
        self._observer = observer
        self._clock = clock
        self._speed = speed
        self._jobs: dict[Request, Job] = {}
        self._work = asyncio.Event()
        self._work_since_s = 0.0  # an idle engine begins when the request came, not when the loop noticed

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._jobs)

    def now_s(self) -> float:
        """Engine seconds."""
        return self._clock() * self._speed

    def submit(self, job: Job) -> None:
        """Give the engine a request; its arrival is now."""
        request = job.request
        request.arrival_s = self.now_s()
        self._jobs[request] = job
        self.engine.add(request)
        if not self._work.is_set():
            self._work_since_s = request.arrival_s
            self._work.set()

    def abort(self, job: Job) -> None:
        """Take a request back; harmless when it has ended."""
        if self._jobs.pop(job.request, None) is not None:
            self.engine.abort(job.request)
            job.give_up()

    def abort_all(self) -> None:
        """Take all requests back."""
        for job in list(self._jobs.values()):
            self.abort(job)

    async def run(self) -> None:
        """Step for ever; cancel to stop."""
        due_s = self.now_s()
        while True:
            self._work.clear()
            duration_s = self.engine.begin(due_s)
            if duration_s is None:
                await self._work.wait()
                due_s = self._work_since_s
                continue
            due_s += duration_s
            await asyncio.sleep(max(due_s / self._speed - self._clock(), 0.0))
            self._hand_out(self.engine.end(), duration_s, due_s)

    def _hand_out(self, step: Step, duration_s: float, now_s: float) -> None:
        self._observer.on_step(step, duration_s)
        for request in step.yielded:
            job = self._jobs[request]
            gap_s = now_s - job.last_token_s if request.has_begun else None
            if gap_s is None:
                request.first_token_s = now_s
                job.cached_tokens = self.engine.cached_tokens.pop(request, 0)
            job.deliver(now_s)
            self._observer.on_token(job, gap_s, now_s)
            if request in step.finished:
                del self._jobs[request]
                self._observer.on_finish(job, now_s)
