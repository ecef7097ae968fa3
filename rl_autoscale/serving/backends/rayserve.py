"""Ray Serve with an external scaler: our controller decides, Serve starts and drains (REST API of Ray 2.60).

The application must be deployed with ``external_scaler_enabled: true`` and no ``autoscaling_config``: Serve then
refuses to scale by itself, and refuses us where it does. To let Serve decide with our policy inside, see
`rayserve_policy`.

Replicas have no address of their own: requests go through Serve's proxy, so every ``url`` is None. Serve has no lease;
who scales by hand or runs a second controller is seen (`foreign_changes`), not prevented.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import Field, PositiveFloat

from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import MissingExtraError
from rl_autoscale.serving.backends.http_failure import HttpFailure, date_s, retry_after_s
from rl_autoscale.serving.backends.replica_view import PhaseAges, ReplicaView, TargetMemory, to_replicas
from rl_autoscale.serving.protocols import BackendError, Clock, Phase, PoolObservation

try:
    import urllib3
except ImportError:  # pragma: no cover - depends on what is installed
    raise MissingExtraError("the Ray Serve back end", "ray") from None

logger = logging.getLogger(__name__)

Json = dict[str, Any]

PHASES: dict[str, Phase] = {
    "STARTING": "starting",
    "UPDATING": "starting",
    "RECOVERING": "starting",
    "RUNNING": "ready",
    "PENDING_MIGRATION": "ready",  # serves until its successor on another node does
    "STOPPING": "draining",
}
"""Serve's replica states; STOPPED ones are gone."""


class RayServeConfig(Config):
    """Where a pool's replicas live."""

    application: str = Field(default="default", min_length=1)
    deployment: str = Field(min_length=1)
    dashboard_url: str = Field(default="http://127.0.0.1:8265", pattern="^https?://")
    token_file: Path | None = Field(default=None, description="default the environment's RAY_AUTH_TOKEN, if set")
    ready_deadline_s: PositiveFloat = Field(default=1800.0, description="a replica that starts for longer has failed")
    timeout_s: PositiveFloat = Field(default=5.0, description="longest a single request may take")

    def token(self) -> str | None:
        """The bearer token, read anew each time so that it may be rotated; None for none."""
        if self.token_file is None:
            return os.environ.get("RAY_AUTH_TOKEN")
        try:
            return self.token_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise BackendError(f"no Ray token: {error}", retryable=False) from None


class RayServeBackend:
    """Scales one deployment; see `serving.protocols.Backend`.

    Serve keeps the replicas there are and stops the ones that it can stop best: those that start first. A replica that
    leaves finishes its requests within ``graceful_shutdown_timeout_s``.

    Args:
        pool: the pool's name.
        config: where it lives.
        clock: measures ages.
    """

    def __init__(self, pool: str, config: RayServeConfig, clock: Clock) -> None:
        self._pool = pool
        self._config = config
        self._clock = clock
        self._ages = PhaseAges()
        self._memory = TargetMemory()
        self._http = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(total=config.timeout_s))

    @property
    def pool(self) -> str:
        """The pool's name."""
        return self._pool

    @property
    def foreign_changes(self) -> int:
        """How often somebody else was seen to have changed the target."""
        return self._memory.foreign_changes

    def observe(self) -> PoolObservation:
        """One read of Serve's status."""
        deployment, server_wall_s = self._deployment()
        target = int(deployment["target_num_replicas"])
        self._notice(target)
        views = [view for replica in deployment["replicas"] if (view := _read_replica(replica, deployment))]
        replicas = to_replicas(
            views,
            self._ages.update(views, now_s=self._clock.monotonic_s(), server_wall_s=server_wall_s),
            pool=self._pool,
            scheme="http",
            port=0,
            ready_deadline_s=self._config.ready_deadline_s,
        )
        return PoolObservation(asked_for=target, replicas=replicas)

    def set_target(self, num_replicas: int) -> None:
        """Ask Serve; raises BackendError, once and retryable, when somebody else scaled since the last look."""
        target = int(self._deployment()[0]["target_num_replicas"])
        if self._notice(target):
            raise BackendError(f"{self._name} was scaled to {target} by somebody else; observe again", retryable=True)
        if target != num_replicas:
            self._memory.attempt(num_replicas)
            application, deployment = quote(self._config.application, safe=""), quote(self._config.deployment, safe="")
            path = f"/api/v1/applications/{application}/deployments/{deployment}/scale"
            self._request("POST", path, {"target_num_replicas": num_replicas})
        self._memory.wrote(num_replicas)

    def close(self) -> None:
        """Close the connections. Replicas stay."""
        self._http.clear()

    @property
    def _name(self) -> str:
        return f"Ray Serve deployment {self._config.application}/{self._config.deployment}"

    def _notice(self, target: int) -> bool:
        foreign = self._memory.notice(target)
        if foreign:
            logger.warning("%s was scaled to %s by somebody else", self._name, target)
        return foreign

    def _deployment(self) -> tuple[Json, float | None]:
        """The deployment's status, and Ray's clock when it answered."""
        status, server_wall_s = self._request("GET", "/api/serve/applications/")
        application = status.get("applications", {}).get(self._config.application) or {}
        deployment = (application.get("deployments") or {}).get(self._config.deployment)
        if deployment is None:
            state = application.get("status", "not deployed")
            raise BackendError(
                f"{self._name} is not there (application: {state})", retryable=state in ("DEPLOYING", "NOT_STARTED")
            )
        return deployment, server_wall_s

    def _request(self, method: str, path: str, body: Json | None = None) -> tuple[Json, float | None]:
        what = f"{method} {self._config.dashboard_url}{path}"
        token = self._config.token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = self._http.request(
                method, self._config.dashboard_url.rstrip("/") + path, json=body, headers=headers
            )
            text = answer.data.decode("utf-8", errors="replace")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise HttpFailure(f"{what}: {type(error).__name__}: {error}", status=None) from None
        if answer.status != 200:
            hint = _HINTS.get(answer.status, "")
            wait_s = retry_after_s(answer.headers)
            raise HttpFailure(f"{what}: {answer.status} {text[:300]}{hint}", status=answer.status, retry_after_s=wait_s)
        try:
            return json.loads(text), date_s(answer.headers.get("Date"))
        except ValueError:
            raise HttpFailure(f"{what}: the answer is not JSON", status=None) from None


_HINTS = {
    401: "; set RAY_AUTH_TOKEN or token_file",
    403: "; the token is not this cluster's",
    412: "; deploy the application with external_scaler_enabled: true and without autoscaling_config",
}


def _read_replica(replica: Json, deployment: Json) -> ReplicaView | None:
    phase = PHASES.get(replica["state"])
    if phase is None:
        return None
    began = replica.get("start_time_s") if phase == "starting" else None
    message = deployment.get("message") or ""
    reason = "" if phase == "ready" else f"{replica['state']}{': ' + message if message else ''}"
    return ReplicaView(replica["replica_id"], None, phase, began, reason)
