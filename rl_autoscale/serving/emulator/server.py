"""The emulated vLLM server: routes, streams, start-up and drain.

Where vLLM surprises, so does this: ``/health`` says 200 while it drains, and a stream begun then is an empty 200.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from aiohttp import web
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.rng import stream
from rl_autoscale.serving.emulator.answers import DONE, Answer, error
from rl_autoscale.serving.emulator.engine import Engine
from rl_autoscale.serving.emulator.loop import EngineLoop, Job
from rl_autoscale.serving.emulator.metrics import EngineMetrics
from rl_autoscale.serving.emulator.requests import JobMaker, OutputLengths
from rl_autoscale.serving.gateway.completion import BadRequestError, Completion, parse_completion

_BACKLOG = 2048
_DRAIN_LOOK_S = 0.05
VLLM_VERSION = "0.33.0"
"""The version whose behaviour is emulated; what ``/version`` says."""


class EmulatorConfig(Config):
    """One emulated replica."""

    engine: PoolSpec
    model: str = Field(default="emulated", description="served model name")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    speed: PositiveFloat = Field(default=1.0, description="engine seconds per real second")
    startup_s: NonNegativeFloat = Field(default=0.0, description="engine seconds before it listens")
    drain_s: NonNegativeFloat = Field(
        default=0.0, description="engine seconds for requests to end after SIGTERM; vLLM: 0"
    )
    max_model_len: PositiveInt | None = Field(default=None, description="default: what the KV cache holds")
    max_queued: PositiveInt | None = Field(default=None, description="vLLM's --max-num-queued-reqs")
    mean_output_tokens: PositiveFloat = 200.0
    output_cv: NonNegativeFloat = 1.0
    seed: int = 0


class Emulator:
    """Listens while it is entered (``async with``); entering takes the start-up time.

    Args:
        config: what to play.
    """

    def __init__(self, config: EmulatorConfig) -> None:
        self.config = config
        self.port = 0
        self.engine = Engine(config.engine)
        longest = self.engine.capacity_tokens
        self._max_model_len = min(config.max_model_len or longest, longest)
        self.metrics = EngineMetrics(self.engine, config.model, self._max_model_len)
        lengths = OutputLengths(config.mean_output_tokens, config.output_cv)
        self._maker = JobMaker(
            self._max_model_len, lengths, stream(config.seed, "lengths"), caching=config.engine.prefix_caching
        )
        self.draining = False

    async def __aenter__(self) -> Self:
        await asyncio.sleep(self.config.startup_s / self.config.speed)
        self.loop = EngineLoop(self.engine, self.metrics, time.monotonic, self.config.speed)
        self._stepping = asyncio.create_task(self.loop.run())
        self._runner = web.AppRunner(self._app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.config.host, self.config.port, backlog=_BACKLOG).start()
        self.port = int(self._runner.addresses[0][1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.abort_all()
        await self._runner.cleanup()
        self._stepping.cancel()
        with suppress(asyncio.CancelledError):
            await self._stepping

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.config.host}:{self.port}"

    async def drain(self) -> None:
        """What SIGTERM does: new requests get nothing, running ones may end within ``drain_s``, then are aborted."""
        self.draining = True
        deadline_s = self.loop.now_s() + self.config.drain_s
        while self.loop.num_open and self.loop.now_s() < deadline_s:
            await asyncio.sleep(_DRAIN_LOOK_S)
        self.loop.abort_all()

    # -- routes ----------------------------------------------------------------------------------------------------

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ping", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics_page)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    async def _health(self, _: web.Request) -> web.StreamResponse:
        return web.Response()

    async def _version(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"version": VLLM_VERSION})

    async def _metrics_page(self, _: web.Request) -> web.StreamResponse:
        return web.Response(
            body=self.metrics.page(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _models(self, _: web.Request) -> web.StreamResponse:
        model = {"id": self.config.model, "object": "model", "owned_by": "vllm", "max_model_len": self._max_model_len}
        return web.json_response({"object": "list", "data": [model]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            completion = parse_completion(request.path, await request.read())
            job = self._maker.make(completion)
        except BadRequestError as wrong:
            return web.json_response(error(400, str(wrong)), status=400)
        if completion.body.get("model", self.config.model) != self.config.model:
            return web.json_response(error(404, f"The model `{completion.body['model']}` does not exist."), status=404)
        if self.draining:
            return await _empty_stream(request) if completion.streams else _busy()
        if self.config.max_queued is not None and self.loop.num_open >= self.config.max_queued:
            self.metrics.on_rejection()
            return _busy()
        self.loop.submit(job)
        try:
            return await self._answer(request, completion, job)
        finally:
            self.loop.abort(job)  # the client went away; harmless after the last token

    async def _answer(self, request: web.Request, completion: Completion, job: Job) -> web.StreamResponse:
        answer = Answer(
            job.request.index,
            self.config.model,
            is_chat="messages" in completion.body,
            created_s=int(time.time()),
            prompt_tokens=job.request.prompt_tokens,
        )
        if completion.streams:
            return await self._stream(request, answer, job, completion.wants_usage)
        while not job.finished and not job.aborted:
            await job.new_tokens()
        reason = _finish_reason(job)
        return web.json_response(answer.whole(job.request.generated_tokens, reason or "abort"))

    async def _stream(self, request: web.Request, answer: Answer, job: Job, with_usage: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        sent, finish_reason, opening = 0, None, answer.opening()
        while finish_reason is None:
            count = await job.new_tokens()
            sent += count
            if job.aborted:
                finish_reason = "abort"
            elif sent == job.request.output_tokens:
                finish_reason = _finish_reason(job)
            await response.write(opening + answer.tokens(count, finish_reason))
            opening = b""
        await response.write((answer.usage(sent) if with_usage else b"") + DONE)
        return response


def _finish_reason(job: Job) -> str | None:
    if job.aborted:
        return "abort"
    return "length" if job.cut_short else "stop"


async def _empty_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    await response.write(DONE)
    return response


def _busy() -> web.StreamResponse:
    return web.json_response(error(503, "The engine is currently busy."), status=503)
