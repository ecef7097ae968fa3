"""Scripted replicas, a gateway in front of them and plain clients, all in one event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from rl_autoscale.serving.gateway.config import GatewayConfig
from rl_autoscale.serving.gateway.server import Gateway

PROFILE = "llama-3.1-8b_a100_tp1"
FLEET = {
    "pools": [{"name": "pool", "profile": PROFILE, "max_num_seqs": 2}],
    "classes": [
        {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1},
        {"name": "bulk", "kind": "batch", "ttft_slo_s": 60, "tpot_slo_s": 1, "priority": 5},
    ],
}
BODY = {"prompt": "hello", "stream": True, "max_tokens": 3}
PATIENCE_S = 20.0


def run(test: Awaitable[None]) -> None:
    """Run a test's coroutine; hangs become failures."""

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test

    asyncio.run(bounded())


def token(text: str = " w", finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    said = {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}
    return b"data: " + json.dumps(said, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
ANSWER = token(" a") + token(" b") + token(" c", "length")
BUSY = b'data: {"error":{"message":"engine is currently busy","code":503}}\n\n'


class ScriptedReplica:
    """Answers as it is told.

    Args:
        script: given the request and a way to write stream bytes; what it returns is sent instead of a stream.
    """

    def __init__(self, script: Callable[..., Awaitable[web.StreamResponse | None]]) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_disconnects = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})

        async def write(data: bytes) -> None:
            if not response.prepared:
                await response.prepare(request)
            await response.write(data)

        try:
            instead = await self.script(request, write)
        except (asyncio.CancelledError, ConnectionError):
            self.num_disconnects += 1
            raise
        if instead is not None:
            return instead
        if not response.prepared:
            await response.prepare(request)
        return response

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/completions", self.handle)
        app.router.add_post("/v1/chat/completions", self.handle)
        async with listening(app) as url:
            yield url


@asynccontextmanager
async def listening(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class Stand:
    """A gateway and how tests talk to it."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self.session = session
        self.url = f"http://127.0.0.1:{gateway.port}"
        self.control_url = f"http://127.0.0.1:{gateway.control_port}"

    async def post(self, body: Any = None, path: str = "/v1/completions", **more: Any) -> tuple[int, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(BODY if body is None else body).encode()
        async with self.session.post(self.url + path, data=data, **more) as response:
            return response.status, await response.read()

    def count(self, outcome: str, service_class: str = "chat") -> int:
        book = self.gateway.snapshot().classes[service_class]
        ends = book.finished + book.refused + book.dropped + book.cancelled + book.failed
        assert book.arrivals == ends + book.queue_length + book.in_flight
        return getattr(book, outcome)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that other tasks bring about."""
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def gateway_for(*urls: str, **settings: Any) -> AsyncIterator[Stand]:
    """A gateway in front of replicas named r0, r1, ..."""
    replicas = [
        {"replica_id": f"r{number}", "pool": "pool", "url": url, "phase": "ready"} for number, url in enumerate(urls)
    ]
    data = {"fleet": FLEET, "port": 0, "control_port": 0, "replicas": replicas, **settings}
    async with Gateway(GatewayConfig.from_dict(data)) as gateway, aiohttp.ClientSession() as session:
        yield Stand(gateway, session)


@asynccontextmanager
async def stand(
    *scripts: Callable[..., Awaitable[Any]], **settings: Any
) -> AsyncIterator[tuple[Stand, list[ScriptedReplica]]]:
    """A gateway in front of one scripted replica per script."""
    replicas = [ScriptedReplica(script) for script in scripts]
    async with asyncio.timeout(PATIENCE_S):
        contexts = [replica.serve() for replica in replicas]
        urls = [await context.__aenter__() for context in contexts]
        try:
            async with gateway_for(*urls, **settings) as stand_:
                yield stand_, replicas
        finally:
            for context in contexts:
                await context.__aexit__(None, None, None)
