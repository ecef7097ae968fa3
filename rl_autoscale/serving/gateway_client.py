"""The controller's side of the gateway's control routes (`gateway_api`)."""

from __future__ import annotations

from typing import Protocol

from pydantic import BaseModel, ValidationError

from rl_autoscale.serving.gateway_api import GatewayDecision, GatewaySnapshot, ReplicaList
from rl_autoscale.serving.http_client import Http, HttpError, send
from rl_autoscale.serving.protocols import BackendError


class GatewayPort(Protocol):
    """What the live fleet needs of a gateway; calls are bounded in time and raise only `BackendError`."""

    def snapshot(self) -> GatewaySnapshot:
        """Counters and gauges."""
        ...

    def put_replicas(self, replicas: ReplicaList) -> None:
        """Say where to send requests."""
        ...

    def put_decision(self, decision: GatewayDecision) -> None:
        """Say how many at once, and whom to refuse."""
        ...


class HttpGateway:
    """A gateway reached over HTTP.

    Args:
        url: its base address.
        http: see `http_client.Http`.
        token: sent as a bearer token when given.
        timeout_s: of each call.
    """

    def __init__(self, url: str, http: Http = send, *, token: str | None = None, timeout_s: float = 2.0) -> None:
        self._url = url.rstrip("/")
        self._http = http
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout_s = timeout_s

    def snapshot(self) -> GatewaySnapshot:
        """GET /control/snapshot."""
        body = self._call("GET", "/control/snapshot")
        try:
            return GatewaySnapshot.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            raise BackendError(
                f"{self._url}/control/snapshot: not a gateway's snapshot ({first['loc']}: {first['msg']})",
                retryable=False,
            ) from None

    def put_replicas(self, replicas: ReplicaList) -> None:
        """PUT /control/replicas."""
        self._call("PUT", "/control/replicas", replicas)

    def put_decision(self, decision: GatewayDecision) -> None:
        """PUT /control/decision."""
        self._call("PUT", "/control/decision", decision)

    def _call(self, method: str, path: str, body: BaseModel | None = None) -> bytes:
        content = body.model_dump_json().encode() if body is not None else None
        try:
            answer = self._http(
                method, self._url + path, body=content, headers=self._headers, timeout_s=self._timeout_s
            )
        except HttpError as error:
            raise BackendError(f"gateway: {error}", retryable=True) from None
        if answer.status // 100 != 2:
            retryable = answer.status in (408, 409, 429) or answer.status >= 500
            raise BackendError(f"gateway: {method} {path}: status {answer.status}", retryable=retryable)
        return answer.body
