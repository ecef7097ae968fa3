"""A real Prometheus on the gauge: ``PROMETHEUS=/path/to/prometheus make test ARGS="-m live -k prometheus_live"``."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
from prometheus_client import CollectorRegistry, start_http_server

from rl_autoscale.serving.backends.desired import DesiredReplicas
from rl_autoscale.serving.backends.prometheus import DESIRED, DesiredReplicasCollector

from .conftest import FakeClock

pytestmark = pytest.mark.live

Query = Callable[[], list[Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def desired(clock: FakeClock) -> DesiredReplicas:
    return DesiredReplicas("chat", clock, hold_s=60.0)


@pytest.fixture
def query(desired: DesiredReplicas, tmp_path: Path) -> Iterator[Query]:
    """Asks a Prometheus that scrapes the gauge every second."""
    binary = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
    if not binary:
        pytest.skip("no Prometheus: set PROMETHEUS to its binary")
    registry = CollectorRegistry()
    registry.register(DesiredReplicasCollector([desired]))
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    port = free_port()
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "scrape_configs: [{job_name: controller, scrape_interval: 1s, scrape_timeout: 1s, "
        f"static_configs: [{{targets: ['127.0.0.1:{server.server_port}']}}]}}]\n",
        encoding="utf-8",
    )
    options = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data"]
    process = subprocess.Popen([binary, *options, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL)
    http = urllib3.PoolManager(retries=False)

    def ask() -> list[Any]:
        try:
            answer = http.request("GET", f"http://127.0.0.1:{port}/api/v1/query", fields={"query": DESIRED})
        except urllib3.exceptions.HTTPError:
            return ["not up yet"]
        return answer.json()["data"]["result"] if answer.status == 200 else ["not ready yet"]

    yield ask
    process.terminate()
    process.wait(30)
    http.clear()
    server.shutdown()
    server.server_close()
    thread.join()


def until(query: Query, holds: Callable[[list[Any]], bool]) -> list[Any]:
    deadline = time.monotonic() + 60.0
    while not holds(result := query()):
        assert time.monotonic() < deadline, result
        time.sleep(0.1)
    return result


def test_a_stale_figure_ends_its_series(query: Query, desired: DesiredReplicas, clock: FakeClock) -> None:
    until(query, lambda result: result == [])
    desired.publish(7)
    (sample,) = until(query, lambda result: len(result) == 1)
    assert sample["metric"]["pool"] == "chat"
    assert sample["value"][1] == "7"
    clock.sleep(61)
    until(query, lambda result: result == [])
    desired.publish(0)
    (sample,) = until(query, lambda result: len(result) == 1)
    assert sample["value"][1] == "0"
