"""A running gateway: two listeners, a heartbeat, and a shutdown that cuts no stream."""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web

from rl_autoscale.fleet import admission
from rl_autoscale.serving.gateway.config import GatewayConfig, is_loopback, read_secret
from rl_autoscale.serving.gateway.control import Handler, control_app
from rl_autoscale.serving.gateway.core import GatewayCore
from rl_autoscale.serving.gateway.exposition import exposition
from rl_autoscale.serving.gateway.guard import Guard
from rl_autoscale.serving.gateway.proxy import Proxy
from rl_autoscale.serving.gateway_api import GatewayDecision, GatewaySnapshot, ReplicaList

log = logging.getLogger(__name__)

_HEARTBEAT_S = 0.05
_DRAIN_LOOK_S = 0.1
_COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
_BACKLOG = 2048
_LINGER_S = 1.0
"""How long the rest of a body is read and thrown away, so that its sender sees the refusal and not a reset."""


class Gateway:
    """Listens while it is entered (``async with``).

    Args:
        config: what to serve.
    """

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.core = GatewayCore(
            config.fleet, random.random, max_sent=config.limits.tries, max_evictions=config.limits.evictions
        )
        self.port = 0
        self.control_port = 0
        self._guard = Guard(config)
        self._control_key = None if config.control_key is None else read_secret(config.control_key)
        self._replica_key = None if config.replica_key is None else read_secret(config.replica_key)
        self._started_wall_s = time.time()
        self._runners: list[web.AppRunner] = []

    async def __aenter__(self) -> Self:
        self._clock = time.monotonic  # not the loop's time, which uvloop keeps in whole milliseconds
        self._started_s = self._clock()
        _warm_up(self.config)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0)
        self._session = aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        )
        self.proxy = Proxy(self.config, self.core, self._guard, self._session, self._clock, self._replica_key)
        self.core.set_replicas(self.config.replicas, self._clock())
        self.port = await self._listen(self._public_app(), self.config.host, self.config.port, _tls(self.config))
        control = control_app(
            key=self._control_key,
            snapshot=self.snapshot,
            set_replicas=self._set_replicas,
            decide=self._decide,
            exposition=self._exposition,
        )
        self.control_port = await self._listen(control, self.config.control_host, self.config.control_port, None)
        if not self.config.api_keys and not is_loopback(self.config.host):
            log.warning("no api_keys: whoever reaches %s:%d is served", self.config.host, self.port)
        self._heart = asyncio.create_task(self._beat())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heart.cancel()
        for runner in self._runners:
            await runner.cleanup()
        await self._session.close()

    async def drain(self) -> int:
        """Take nothing new and wait for what is open.

        Returns:
            Requests that were still open when patience ended.
        """
        self.proxy.closing = True
        deadline_s = self._clock() + self.config.limits.drain_s
        while self.proxy.num_open and self._clock() < deadline_s:
            await asyncio.sleep(_DRAIN_LOOK_S)
        return self.proxy.num_open

    def snapshot(self) -> GatewaySnapshot:
        """What the controller reads."""
        now_s = self._clock()
        return self.core.snapshot(now_s, started_at_s=self._started_wall_s, uptime_s=now_s - self._started_s)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _public_app(self) -> web.Application:
        app = web.Application(client_max_size=self.config.limits.body_bytes)
        for prefix in ("", *self.config.class_routes):
            for path in _COMPLETIONS:
                app.router.add_post(prefix + path, self._completion_handler(path, prefix))
            app.router.add_get(prefix + "/v1/models", self.proxy.models)
        app.router.add_get("/health", self._health)
        return app

    def _completion_handler(self, path: str, prefix: str) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            return await self.proxy.complete(request, path, prefix)

        return handle

    async def _health(self, _: web.Request) -> web.StreamResponse:
        """200 while it takes requests; a gateway without a replica holds them, so that is healthy too."""
        return web.Response(status=503 if self.proxy.closing else 200)

    def _set_replicas(self, replicas: ReplicaList) -> None:
        self.core.set_replicas(replicas.replicas, self._clock())

    def _decide(self, decision: GatewayDecision) -> None:
        self.core.decide(decision, self._clock())

    def _exposition(self) -> bytes:
        return exposition(self.snapshot(), self.proxy.turned_away, self.proxy.estimator.bytes_per_token)

    async def _listen(self, app: web.Application, host: str, port: int, tls: ssl.SSLContext | None) -> int:
        limits = self.config.limits
        runner = web.AppRunner(
            app,
            handler_cancellation=True,  # a client that goes away cancels its handler, and with it the request upstream
            access_log=None,
            max_line_size=limits.header_bytes,
            max_field_size=limits.header_bytes,
            keepalive_timeout=limits.idle_connection_s,
            lingering_time=_LINGER_S,
            shutdown_timeout=1.0,
        )
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, host, port, backlog=_BACKLOG, ssl_context=tls).start()
        return int(runner.addresses[0][1])

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            self.proxy.tick()


def _tls(config: GatewayConfig) -> ssl.SSLContext | None:
    if config.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(config.tls.certificate, config.tls.private_key)
    return context


def _warm_up(config: GatewayConfig) -> None:
    """Compile the estimate now, not while the first request waits."""
    core = GatewayCore(config.fleet, random.random)
    for pool in core.pools:
        pool.prefill_time_s(1, 1, 0, 0)
        pool.residual_iteration_s(0, 0)
    admission.wait_ahead_s(0.0, 0.0, 0.0, 0.0)
    admission.corrected_clearing_s(0.0, 0.0, 0.0)
    admission.estimate_queue_wait_s(0, 0, 0.0)
    admission.moved_mean(0.0, 1, 1)
    admission.selective_ttft_s(0.0, 0.0, 1, 1.0, 0.0, 0.0)
