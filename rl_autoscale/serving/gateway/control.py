"""The controller's routes and the Prometheus page, on a listener of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiohttp import web
from pydantic import ValidationError

from rl_autoscale.fleet.config import Config, describe_validation_error
from rl_autoscale.fleet.errors import UnknownNameError
from rl_autoscale.serving.gateway.guard import bearer_token, same_secret
from rl_autoscale.serving.gateway_api import GatewayDecision, GatewaySnapshot, ReplicaList

Body = TypeVar("Body", bound=Config)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_MAX_BODY_BYTES = 4 << 20


def control_app(
    *,
    key: str | None,
    snapshot: Callable[[], GatewaySnapshot],
    set_replicas: Callable[[ReplicaList], None],
    decide: Callable[[GatewayDecision], None],
    exposition: Callable[[], bytes],
) -> web.Application:
    """Build the control listener's application.

    Args:
        key: asked for on ``/control``; None asks for nothing. ``/metrics`` never asks: it only reads.
        snapshot: gives the counters.
        set_replicas: takes all replicas.
        decide: takes caps and admission levels.
        exposition: gives the Prometheus text.
    """
    digest = None if key is None else hashlib.sha256(key.encode()).digest()

    @web.middleware
    async def checked(request: web.Request, handler: Handler) -> web.StreamResponse:
        guarded = request.path.startswith("/control")
        if guarded and digest is not None and not same_secret(bearer_token(request.headers), digest):
            return _refusal(401, "wrong control key; send Authorization: Bearer KEY")
        return await handler(request)

    async def get_snapshot(_: web.Request) -> web.StreamResponse:
        return web.json_response(text=snapshot().model_dump_json())

    async def put_replicas(request: web.Request) -> web.StreamResponse:
        return await _take(request, ReplicaList, set_replicas)

    async def put_decision(request: web.Request) -> web.StreamResponse:
        return await _take(request, GatewayDecision, decide)

    async def get_metrics(_: web.Request) -> web.StreamResponse:
        return web.Response(body=exposition(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[checked])
    app.router.add_get("/control/snapshot", get_snapshot)
    app.router.add_put("/control/replicas", put_replicas)
    app.router.add_put("/control/decision", put_decision)
    app.router.add_get("/metrics", get_metrics)
    return app


async def _take(request: web.Request, kind: type[Body], use: Callable[[Body], None]) -> web.StreamResponse:
    try:
        use(kind.model_validate_json(await request.read()))
    except ValidationError as error:
        return _refusal(422, describe_validation_error(error, kind.__name__))
    except UnknownNameError as error:
        return _refusal(422, str(error))
    return web.Response(status=204)


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)
