"""The emulator's engine in virtual time: nothing waits, nothing depends on the machine, no sockets."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable

from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.spec import ServiceClass
from rl_autoscale.serving.calibration.server import Look, read_page
from rl_autoscale.serving.emulator.engine import Engine
from rl_autoscale.serving.emulator.loop import EngineLoop, Job
from rl_autoscale.serving.emulator.metrics import EngineMetrics
from rl_autoscale.sim.reference.request import Request

CLASS = ServiceClass(name="c", ttft_slo_s=1, tpot_slo_s=1)
MAX_MODEL_LEN = 8192


class VirtualSelector(selectors.SelectSelector):
    """Passes the time that it was asked to wait."""

    now_s = 0.0

    def select(self, timeout=None):
        self.now_s += timeout or 0.0
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.virtual = VirtualSelector()
        super().__init__(self.virtual)

    def time(self) -> float:
        return self.virtual.now_s


def in_virtual_time(test: Callable[[], Awaitable]):
    """Run a coroutine function in a loop whose time passes only in waiting."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(test())


class VirtualServer:
    """The emulator's clockwork and metrics page without its web server; `calibration.server.CalibratedServer`."""

    def __init__(self, pool: PoolSpec, speed: float = 1.0) -> None:
        engine = Engine(pool)
        self.metrics = EngineMetrics(engine, "m", MAX_MODEL_LEN)
        self.loop = EngineLoop(engine, self.metrics, asyncio.get_running_loop().time, speed)
        self.stepping = asyncio.create_task(self.loop.run())
        self.num_sent = 0

    async def look(self) -> Look:
        return read_page(self.metrics.page().decode(), "here")

    async def stream(self, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
        self.num_sent += 1
        job = Job(Request(self.num_sent, 0, CLASS, 0.0, len(prompt), max_tokens), max_tokens, True)
        async for new in self.play(job):
            yield new

    async def play(self, job: Job) -> AsyncIterator[int]:
        """Submit a job and give its tokens as they come; closing early takes it back."""
        self.loop.submit(job)
        try:
            fetched = 0
            while fetched < job.max_tokens:
                new = await job.new_tokens()
                fetched += new
                yield new
        finally:
            self.loop.abort(job)

    def stop(self) -> None:
        self.stepping.cancel()
