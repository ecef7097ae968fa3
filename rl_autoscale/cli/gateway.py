"""``rl-autoscale gateway``: an OpenAI-compatible proxy with class queues, batch caps, routing and early refusal."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rl_autoscale.fleet.errors import MissingExtraError, SpecError

if TYPE_CHECKING:
    from rl_autoscale.serving.gateway.server import Gateway


def command(
    config: Annotated[Path | None, typer.Option(help="The gateway's YAML; see docs/gateway.md.")] = None,
    replica: Annotated[
        list[str] | None, typer.Option(help="Instead of --config: a server's URL; may be repeated.")
    ] = None,
    profile: Annotated[str, typer.Option(help="With --replica: latency profile of the servers.")] = "",
    host: Annotated[str | None, typer.Option(help="Listen here instead of where the config says.")] = None,
    port: Annotated[int | None, typer.Option(help="Listen here instead of where the config says.")] = None,
    control_port: Annotated[int | None, typer.Option(help="Control listener's port.")] = None,
) -> None:
    """Serve requests through class queues to replicas; SIGTERM drains.

    Metrics and the controller's routes are on the control listener, by default 127.0.0.1:8081.

    Examples:
        rl-autoscale gateway --config gateway.yaml

        rl-autoscale gateway --replica http://127.0.0.1:8001 --profile llama-3.1-8b_h100_tp1
    """
    try:
        from rl_autoscale.serving.gateway.config import GatewayConfig
        from rl_autoscale.serving.gateway.server import Gateway
        from rl_autoscale.serving.running import run, serve_until_signal
    except ImportError as error:
        raise MissingExtraError(f"the gateway ({error.name})", "serve") from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if (config is None) == (not replica):
        raise SpecError("give either --config FILE or --replica URL (with --profile NAME)")
    chosen = GatewayConfig.from_file(config) if config else GatewayConfig.from_dict(_plain(replica or [], profile))
    given = {"host": host, "port": port, "control_port": control_port}
    changed = {name: value for name, value in given.items() if value is not None}
    chosen = GatewayConfig.from_dict({**dict(chosen), **changed}, where="gateway")
    run(serve_until_signal(Gateway(chosen), _say_where, Gateway.drain))


def _plain(urls: list[str], profile: str) -> dict[str, Any]:
    """One pool, one class, nothing refused."""
    if not profile:
        raise SpecError("--replica needs --profile NAME; `rl-autoscale profile ls` lists them")
    pool = {"name": "pool", "profile": profile}
    default = {"name": "default", "ttft_slo_s": 2.0, "tpot_slo_s": 0.1}
    replicas = [
        {"replica_id": url, "pool": "pool", "url": url.rstrip("/"), "phase": "ready"} for url in dict.fromkeys(urls)
    ]
    return {"fleet": {"pools": [pool], "classes": [default]}, "replicas": replicas}


def _say_where(gateway: Gateway) -> None:
    scheme = "https" if gateway.config.tls else "http"
    typer.echo(
        f"gateway on {scheme}://{gateway.config.host}:{gateway.port}, "
        f"control and metrics on http://{gateway.config.control_host}:{gateway.control_port}",
        err=True,
    )
