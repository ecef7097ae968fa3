"""The preStop hook as it runs in a pod: a process that ends when the engine is empty."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest


class Engine:
    """Serves one exposition after the other, the last one for ever; None is an answer of 500."""

    def __init__(self, *expositions: str | None) -> None:
        self.left = list(expositions)
        self.asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.asked += 1
                text = outer.left[0] if len(outer.left) == 1 else outer.left.pop(0)
                self.send_response(500 if text is None else 200)
                self.end_headers()
                self.wfile.write((text or "").encode())

        self.server = HTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def drain(repository: Path) -> Iterator[object]:
    engines: list[Engine] = []

    def run(engine: Engine | None, longest_s: float = 20.0) -> subprocess.CompletedProcess[str]:
        url = "http://127.0.0.1:9/metrics"
        if engine is not None:
            engines.append(engine)
            threading.Thread(target=engine.server.serve_forever, kwargs={"poll_interval": 0.01}).start()
            url = f"http://127.0.0.1:{engine.server.server_port}/metrics"
        settings = {"DRAIN_METRICS_URL": url, "DRAIN_LINGER_S": "0", "DRAIN_POLL_S": "0.01"}
        return subprocess.run(
            [sys.executable, "-S", str(repository / "deploy" / "kubernetes" / "drain.py")],
            env={**settings, "DRAIN_LONGEST_S": str(longest_s)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    yield run
    for engine in engines:
        engine.server.shutdown()
        engine.server.server_close()


def exposition(running: float, waiting: float, separator: str = ":") -> str:
    labels = '{engine="0",model_name="m"}'
    by_reason = '{engine="0",reason="capacity"}'
    return (
        f"# TYPE vllm{separator}num_requests_running gauge\n"
        f"vllm{separator}num_requests_running{labels} {running}\n"
        f"vllm{separator}num_requests_waiting{labels} {waiting}\n"
        f"vllm{separator}num_requests_waiting_by_reason{by_reason} 7.0\n"
    )


def test_waits_until_nothing_runs_or_waits(drain) -> None:
    engine = Engine(exposition(2.0, 1.0), exposition(0.0, 1.0), exposition(1.0, 0.0), exposition(0.0, 0.0))
    assert drain(engine).returncode == 0
    assert engine.asked == 4


def test_renamed_metrics_are_found(drain) -> None:
    engine = Engine(exposition(1.0, 0.0, "_"), exposition(0.0, 0.0, "_"))
    assert drain(engine).returncode == 0
    assert engine.asked == 2


def test_unreadable_metrics_are_not_an_empty_engine(drain) -> None:
    engine = Engine("", None, exposition(0.0, 0.0))
    done = drain(engine)
    assert done.returncode == 0
    assert engine.asked == 3
    assert "no vllm:num_requests_*" in done.stderr


def test_gives_up_when_the_time_is_over(drain) -> None:
    assert drain(Engine(exposition(1.0, 0.0)), longest_s=0.3).returncode == 1


def test_a_server_that_is_gone_needs_no_waiting(drain) -> None:
    assert drain(None).returncode == 0
