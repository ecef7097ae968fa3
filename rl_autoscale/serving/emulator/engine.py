"""One serving engine, stepped iteration by iteration in whatever time the caller keeps.

The scheduler and the latency model are the simulator's. An iteration begins when the caller says so and ends
``duration_s`` later; requests that come meanwhile are seen by the next one, as in vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.sim.reference.books import PoolBooks
from rl_autoscale.sim.reference.request import Request
from rl_autoscale.sim.reference.scheduler import Iteration, Scheduler


@dataclass(frozen=True, slots=True)
class Step:
    """An iteration that has ended.

    Attributes:
        tokens: new tokens computed, prompt and output.
        yielded: requests that got an output token, in the engine's order.
        finished: those of them that have all their tokens and have left.
    """

    tokens: int
    yielded: tuple[Request, ...]
    finished: frozenset[Request]


class Engine:
    """A scheduler, its KV blocks and the iteration in progress.

    Args:
        pool: engine settings and latency profile.

    Attributes:
        books: the scheduler counts its look-ups in the prefix cache there.
        cached_tokens: of requests without a token so far: what the cache held when they were first scheduled.
    """

    def __init__(self, pool: PoolSpec) -> None:
        self.pool = pool
        self.num_preemptions = 0
        self.books = PoolBooks()
        self.cached_tokens: dict[Request, int] = {}
        self._scheduler = Scheduler(pool, self.books)
        self._iteration: Iteration | None = None

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences waiting for a place in the batch."""
        return len(self._scheduler.waiting)

    @property
    def kv_usage(self) -> float:
        """Fraction of KV blocks in use."""
        return self._scheduler.kv.num_used / self.pool.num_kv_blocks

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the longest request that fits."""
        return self.pool.num_kv_blocks * BLOCK_SIZE_TOKENS

    @property
    def busy(self) -> bool:
        """Whether an iteration is in progress."""
        return self._iteration is not None

    def add(self, request: Request) -> None:
        """A request arrives; it is seen when the next iteration begins."""
        self._scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Take a request out, wherever it is; harmless for one that has left."""
        self.cached_tokens.pop(request, None)
        if request in self._scheduler.running or request in self._scheduler.waiting:
            self._scheduler.remove(request)

    def begin(self, now_s: float) -> float | None:
        """Begin the next iteration; call when none is in progress.

        Returns:
            Its duration in seconds; None with nothing to run.
        """
        assert self._iteration is None, "an iteration is in progress"
        self._iteration = self._scheduler.schedule(now_s)
        if self._iteration is None:
            return None
        self.num_preemptions += self._iteration.num_preempted
        for request, _ in self._iteration.chunks:
            if not request.has_begun:
                self.cached_tokens.setdefault(request, request.computed_tokens)
        return self._iteration.duration_s(self.pool.hardware)

    def end(self) -> Step:
        """End the iteration in progress: hand out its tokens and let finished requests go."""
        iteration, self._iteration = self._iteration, None
        assert iteration is not None, "no iteration is in progress"
        present = set(self._scheduler.running)  # what was aborted meanwhile is not
        yielded = tuple(request for request in self._scheduler.complete(iteration) if request in present)
        finished = frozenset(request for request in yielded if request.generated_tokens >= request.output_tokens)
        for request in finished:
            self._scheduler.remove(request)
        tokens = len(iteration.decodes) + sum(chunk for _, chunk in iteration.chunks)
        return Step(tokens, yielded, finished)
