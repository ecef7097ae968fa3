"""The external scaler against Serve's REST API, as a small stand-in speaks it (see test_rayserve_live for the real)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rl_autoscale.serving.backends.rayserve import RayServeBackend, RayServeConfig
from rl_autoscale.serving.protocols import BackendError

from .conftest import FakeClock

TOKEN = "not-a-secret"


class Dashboard:
    """Status and scale routes with Serve's status codes; replicas follow the target at once."""

    def __init__(self) -> None:
        self.target = 1
        self.states = ["RUNNING"]
        self.external_scaler = True
        self.message = ""
        self.started_s = time.time()
        self.posts = 0
        self.answer: tuple[int, dict[str, str]] | None = None
        self.lose_reply = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.route(self, None)

            def do_POST(self) -> None:
                outer.route(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False

    def route(self, handler: Any, body: dict[str, Any] | None) -> None:
        if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(handler, 401, "Unauthorized")
        if self.answer is not None:
            return self.send(handler, self.answer[0], "as the test asked", self.answer[1])
        if body is None:
            return self.send(handler, 200, json.dumps(self.status()))
        if not handler.path.endswith("/api/v1/applications/llm/deployments/Engine/scale"):
            return self.send(handler, 404, "not found")
        if not self.external_scaler:
            return self.send(handler, 412, "external scaler is disabled")
        if body["target_num_replicas"] < 0:
            return self.send(handler, 400, "negative")
        self.posts += 1
        self.target = body["target_num_replicas"]
        if self.lose_reply:
            handler.close_connection = True
            return None
        return self.send(handler, 200, json.dumps({"message": "received"}))

    def status(self) -> dict[str, Any]:
        replicas = [
            {"replica_id": f"r{index}", "state": state, "start_time_s": self.started_s}
            for index, state in enumerate(self.states)
        ]
        engine = {"target_num_replicas": self.target, "message": self.message, "replicas": replicas}
        return {"applications": {"llm": {"status": "RUNNING", "deployments": {"Engine": engine}}}}

    def send(self, handler: Any, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        handler.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(text))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text.encode())


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    dashboard = Dashboard()
    thread = threading.Thread(target=dashboard.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield dashboard
    dashboard.server.shutdown()
    dashboard.server.server_close()
    thread.join()


@pytest.fixture
def backend(dashboard: Dashboard, clock: FakeClock) -> Iterator[RayServeBackend]:
    url = f"http://127.0.0.1:{dashboard.server.server_port}"
    backend = RayServeBackend("chat", RayServeConfig(application="llm", deployment="Engine", dashboard_url=url), clock)
    yield backend
    backend.close()


def refused(backend: RayServeBackend, replicas: int) -> BackendError:
    with pytest.raises(BackendError) as error:
        backend.set_target(replicas)
    return error.value


def test_scales_and_asks_once(backend: RayServeBackend, dashboard: Dashboard) -> None:
    backend.set_target(3)
    backend.set_target(3)
    assert (dashboard.target, dashboard.posts) == (3, 1)
    assert backend.observe().asked_for == 3


def test_states_become_phases(backend: RayServeBackend, dashboard: Dashboard) -> None:
    dashboard.states = ["RUNNING", "STARTING", "STOPPING", "STOPPED", "PENDING_MIGRATION"]
    dashboard.message = "no GPU left"
    replicas = backend.observe().replicas
    assert [(replica.replica_id, replica.phase) for replica in replicas] == [
        ("r0", "ready"),
        ("r1", "starting"),
        ("r2", "draining"),
        ("r4", "ready"),
    ]
    assert replicas[1].reason == "STARTING: no GPU left"


def test_a_start_without_end_has_failed(backend: RayServeBackend, dashboard: Dashboard) -> None:
    dashboard.states = ["STARTING"]
    dashboard.started_s = time.time() - 2000.0
    (replica,) = backend.observe().replicas
    assert replica.phase == "failed"
    assert "not ready after 1800 s" in replica.reason


def test_somebody_elses_scale_is_not_overwritten_unseen(backend: RayServeBackend, dashboard: Dashboard) -> None:
    backend.set_target(2)
    dashboard.target = 6
    assert refused(backend, 3).retryable
    assert dashboard.target == 6
    backend.set_target(3)
    assert (dashboard.target, backend.foreign_changes) == (3, 1)


def test_a_lost_reply_is_no_foreign_change(backend: RayServeBackend, dashboard: Dashboard) -> None:
    backend.observe()
    dashboard.lose_reply = True
    assert refused(backend, 2).retryable
    dashboard.lose_reply = False
    backend.set_target(3)
    assert backend.foreign_changes == 0


def test_serves_own_autoscaler_is_not_fought(backend: RayServeBackend, dashboard: Dashboard) -> None:
    dashboard.external_scaler = False
    error = refused(backend, 3)
    assert "external_scaler_enabled: true" in str(error)
    assert not error.retryable


@pytest.mark.parametrize(("status", "retryable"), [(500, True), (503, True), (429, True), (400, False), (403, False)])
def test_a_refusal_says_whether_to_try_again(
    backend: RayServeBackend, dashboard: Dashboard, status: int, retryable: bool
) -> None:
    dashboard.answer = (status, {"Retry-After": "9"})
    error = refused(backend, 3)
    assert str(status) in str(error)
    assert error.retryable is retryable


def test_a_missing_token_is_told(
    backend: RayServeBackend, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    error = refused(backend, 3)
    assert "set RAY_AUTH_TOKEN or token_file" in str(error)
    assert not error.retryable


def test_a_deployment_that_is_not_there(dashboard: Dashboard, clock: FakeClock) -> None:
    url = f"http://127.0.0.1:{dashboard.server.server_port}"
    config = RayServeConfig(application="llm", deployment="Typo", dashboard_url=url)
    backend = RayServeBackend("chat", config, clock)
    with pytest.raises(BackendError, match="llm/Typo is not there"):
        backend.observe()
    backend.close()


def test_a_dashboard_that_is_not_there_is_retryable(clock: FakeClock) -> None:
    backend = RayServeBackend("chat", RayServeConfig(deployment="E", dashboard_url="http://127.0.0.1:9"), clock)
    with pytest.raises(BackendError) as error:
        backend.observe()
    assert error.value.retryable
    backend.close()
