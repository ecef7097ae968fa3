"""A real Ray Serve: run by ``make test-ray``, in a network namespace of its own, for Ray listens on every address."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3

from rl_autoscale.serving.backends.rayserve import RayServeBackend, RayServeConfig
from rl_autoscale.serving.protocols import BackendError, PoolObservation

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]

DASHBOARD_PORT, HTTP_PORT = 18265, 18000
DASHBOARD = f"http://127.0.0.1:{DASHBOARD_PORT}"
LONGEST_S = 120.0


class RealClock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()

    def sleep(self, duration_s: float) -> None:
        time.sleep(duration_s)


@pytest.fixture(scope="module")
def ray_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster for this module; gives its token."""
    if importlib.util.find_spec("ray") is None:  # Ray reads its token settings when it is imported: not yet
        pytest.skip("needs the 'ray' extra, in an environment of its own: make test-ray")
    if [name for _, name in socket.if_nameindex() if name != "lo"]:
        pytest.skip("Ray listens on every address: run it where there is only loopback, as make test-ray does")
    token = secrets.token_hex(32)
    repository = Path(__file__).resolve().parents[3]
    os.environ |= {
        "RAY_AUTH_TOKEN": token,
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(repository), str(repository / "tests")]),
    }
    import ray
    from ray import serve

    ray.init(
        num_cpus=2,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=DASHBOARD_PORT,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    serve.start(http_options={"host": "127.0.0.1", "port": HTTP_PORT})
    yield token
    serve.shutdown()
    ray.shutdown()


def deploy(token: str, deployment: dict[str, Any], **application: Any) -> None:
    app = {"name": "llm", "route_prefix": "/", "import_path": "serving.ray_app:build", **application}
    config = {"applications": [{**app, "deployments": [{"name": "Engine", **deployment}]}]}
    headers = {"Authorization": f"Bearer {token}"}
    answer = urllib3.request("PUT", f"{DASHBOARD}/api/serve/applications/", json=config, headers=headers)
    assert answer.status == 200, answer.data


@pytest.fixture
def backend(ray_serve: str) -> Iterator[RayServeBackend]:
    config = RayServeConfig(application="llm", deployment="Engine", dashboard_url=DASHBOARD, timeout_s=20.0)
    backend = RayServeBackend("chat", config, RealClock())
    yield backend
    backend.close()


def until(backend: RayServeBackend, holds: Callable[[PoolObservation], bool]) -> PoolObservation:
    deadline = time.monotonic() + LONGEST_S
    seen: object = None
    while time.monotonic() < deadline:
        try:
            seen = backend.observe()
            if holds(seen):
                return seen
        except BackendError as error:
            seen = error
        time.sleep(0.2)
    raise AssertionError(f"did not come true in {LONGEST_S:g} s: {seen}")


def ready(observation: PoolObservation) -> set[str]:
    return {replica.replica_id for replica in observation.replicas if replica.phase == "ready"}


def test_scales_from_outside_and_keeps_what_runs(ray_serve: str, backend: RayServeBackend) -> None:
    deploy(ray_serve, {"num_replicas": 1}, external_scaler_enabled=True)
    first = ready(until(backend, lambda seen: len(ready(seen)) == 1))
    backend.set_target(3)
    grown = until(backend, lambda seen: len(ready(seen)) == 3)
    assert grown.asked_for == 3
    assert first < ready(grown)
    backend.set_target(1)
    left = until(backend, lambda seen: len(seen.replicas) == 1)
    assert ready(left) < ready(grown)
    assert backend.foreign_changes == 0

    other = RayServeBackend("chat", backend._config, RealClock())
    other.set_target(2)
    other.close()
    with pytest.raises(BackendError, match="by somebody else") as foreign:
        backend.set_target(1)
    assert foreign.value.retryable
    backend.set_target(1)
    with pytest.raises(BackendError, match="400") as negative:
        backend.set_target(-1)
    assert not negative.value.retryable


def test_serves_own_scaling_is_not_fought(ray_serve: str, backend: RayServeBackend) -> None:
    deploy(ray_serve, {"num_replicas": 1})
    until(backend, lambda seen: len(ready(seen)) == 1)
    with pytest.raises(BackendError, match="external_scaler_enabled") as refused:
        backend.set_target(2)
    assert not refused.value.retryable


def test_a_wrong_token_is_told(ray_serve: str, backend: RayServeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(BackendError, match=r"40[13]") as refused:
        backend.observe()
    assert not refused.value.retryable


def test_our_policy_decides_inside_serve(ray_serve: str, backend: RayServeBackend, tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        "pools: [{name: engine, profile: llama-3.1-8b_a100_tp1, min_replicas: 1, max_replicas: 3}]\n"
        "classes: [{name: chat, ttft_slo_s: 1.0, tpot_slo_s: 0.1}]\n"
        "control_interval_s: 1.0\n",
        encoding="utf-8",
    )
    knobs = {"target": 3.0, "sync_period_s": 1.0, "down_stabilisation_s": 2.0}
    policy = {
        "policy_function": "rl_autoscale.serving.backends.rayserve_policy:FleetPolicy",
        "policy_kwargs": {"fleet": str(fleet), "policy": "hpa", "knobs": knobs},
    }
    autoscaling = {
        "min_replicas": 1,
        "max_replicas": 4,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "metrics_interval_s": 1,
        "look_back_period_s": 2,
        "policy": policy,
    }
    deploy(ray_serve, {"autoscaling_config": autoscaling})
    until(backend, lambda seen: len(ready(seen)) == 1)

    stop = threading.Event()

    def client() -> None:
        with urllib3.PoolManager(retries=False) as http:
            while not stop.is_set():
                http.request("GET", f"http://127.0.0.1:{HTTP_PORT}/", timeout=60)

    clients = [threading.Thread(target=client) for _ in range(8)]
    for thread in clients:
        thread.start()
    try:
        busy = until(backend, lambda seen: len(ready(seen)) == 3)  # 8 in flight at 3 each; the fleet allows 3
        assert busy.asked_for == 3
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    until(backend, lambda seen: len(seen.replicas) == 1)
