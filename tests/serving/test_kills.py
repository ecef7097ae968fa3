"""kill -9 of the gateway and of the controller while streams run: real processes, no GPU.

python -m pytest -m live tests/serving/test_kills.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rehearsal_files import write_files
from streaming_clients import COMMAND, Client, running_gateway, until

from rl_autoscale.serving.assemble import Assembly, assemble
from rl_autoscale.serving.clock import SystemClock
from rl_autoscale.serving.config import ControlConfig
from rl_autoscale.serving.gateway_client import HttpGateway
from rl_autoscale.serving.http_client import send
from rl_autoscale.serving.metric_names import engine_names
from rl_autoscale.serving.samples import ReplicaSample, parse_exposition

pytestmark = pytest.mark.live
PORT = 18600
NUM_CLIENTS, TOKENS = 6, 300
VLLM = engine_names("vllm")


def start_clients(stop: threading.Event, count: int = NUM_CLIENTS) -> list[Client]:
    clients = [Client(PORT, "emulated", "x" * 400, stop, TOKENS) for _ in range(count)]
    for client in clients:
        client.start()
    return clients


def join(clients: list[Client], stop: threading.Event) -> None:
    stop.set()
    for client in clients:
        client.join(120.0)


def books():
    return HttpGateway(f"http://127.0.0.1:{PORT + 1}", timeout_s=10.0).snapshot()


class Watched:
    """A controller in this process, and all that it has seen."""

    def __init__(self, assembly: Assembly) -> None:
        self.assembly = assembly
        self.records = []
        assembly.controller.add_listener(self.records.append)

    def step(self) -> None:
        self.assembly.controller.step()
        self.assembly.fleet.advance()

    def pages(self) -> list[ReplicaSample]:
        """What every replica says of itself."""
        replicas = self.assembly.fleet._backends["gpu"].observe().replicas
        texts = [send("GET", item.url + "/metrics", timeout_s=10.0).body.decode() for item in replicas]
        return [parse_exposition(text, VLLM, 0.0) for text in texts]

    def total(self, counter: str) -> float:
        return sum(page.counters.get(counter, 0.0) for page in self.pages())

    def idle(self) -> bool:
        return all(page.gauges["running"] + page.gauges["waiting"] == 0 for page in self.pages())


@contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    assembly = assemble(ControlConfig.from_file(folder / "control.yaml"), SystemClock())
    try:
        yield Watched(assembly)
    finally:
        assembly.fleet._backends["gpu"].kill_all()
        assembly.close()


def test_a_killed_gateway_breaks_its_streams_frees_the_replicas_and_finds_them_again(tmp_path):
    eager = {"name": "static", "knobs": {"replicas": 1}}  # would let a replica go as soon as it may
    write_files(tmp_path, PORT, replicas=2, fallback=eager)
    config, stop = tmp_path / "gateway.yaml", threading.Event()
    with running_gateway(config, PORT + 1) as gateway, watched(tmp_path) as control:
        until(lambda: len(books().in_flight_by_replica) == 2, 180.0, control.step)
        clients = start_clients(stop)
        until(lambda: all(client.whole for client in clients), 180.0, control.step)
        until(lambda: books().classes["chat"].in_flight == NUM_CLIENTS, 60.0, lambda: time.sleep(0.01))
        stop.set()
        gateway.kill()
        join(clients, stop)
        whole, broken = sum(client.whole for client in clients), [end for client in clients for end in client.other]
        assert {status for status, _ in broken} == {0}, "a stream that is cut must not look complete"
        assert len(broken) == NUM_CLIENTS
        until(control.idle, 30.0, lambda: time.sleep(0.1))
        assert control.total("generation_tokens") < (whole + NUM_CLIENTS) * TOKENS, "replicas went on for nobody"
        assert control.total("finished") == whole

        for _ in range(8):  # longer than any telemetry is good for
            control.step()
        assert {record.source for record in control.records[-3:]} <= {"hold", "rule"}
        assert [int(record.final.target_replicas[0]) for record in control.records[-8:]] == [2] * 8

        with running_gateway(config, PORT + 1):
            assert books().in_flight_by_replica == {}
            until(lambda: len(books().in_flight_by_replica) == 2, 60.0, control.step)
            stop = threading.Event()
            clients = start_clients(stop)
            until(lambda: all(client.whole for client in clients), 180.0, control.step)
            join(clients, stop)
            again = sum(client.whole for client in clients)
            assert [end for client in clients for end in client.other] == []
            book = books().classes["chat"]
            assert (book.arrivals, book.finished, book.failed, book.cancelled) == (again, again, 0, 0)
            for _ in range(3):
                control.step()
        seen = [record.state for record in control.records if record.state.classes.age_s[0] < 2.0]
        arrived = np.nansum([state.classes.arrivals_per_s[0] * state.window_s for state in seen])
        assert again <= arrived + 1e-6
        assert arrived <= whole + NUM_CLIENTS + again + 1e-6, "a request was counted twice"


@contextmanager
def controller_process(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*COMMAND, "control", "--config", str(folder / "control.yaml")])
    try:
        yield process
    finally:
        process.kill()
        process.wait(30.0)


def remembered(folder: Path) -> dict:
    path = folder / "state" / "state.json"
    return json.loads(path.read_text()) if path.exists() else {"members": []}


def pids(folder: Path) -> list[int]:
    return [member["pid"] for member in remembered(folder)["members"]]


def test_a_controller_killed_in_mid_scale_leaves_replicas_that_the_next_one_takes_over(tmp_path):
    def wait(condition, limit_s=180.0):
        until(condition, limit_s, lambda: time.sleep(0.05))

    def ready() -> int:
        return len(books().in_flight_by_replica)

    stop, slow = threading.Event(), ("--startup-s", "8")
    clients: list[Client] = []
    write_files(tmp_path, PORT, engine=slow)
    with running_gateway(tmp_path / "gateway.yaml", PORT + 1):
        try:
            with controller_process(tmp_path):
                wait(lambda: ready() == 1)
            clients = start_clients(stop, 2)
            write_files(tmp_path, PORT, replicas=3, engine=slow)
            with controller_process(tmp_path) as doomed:
                wait(lambda: len(pids(tmp_path)) == 3)
                doomed.send_signal(signal.SIGKILL)
                doomed.wait(30.0)
            left = pids(tmp_path)
            assert ready() == 1, "the kill was to be in the middle of the scale-up"
            with controller_process(tmp_path):
                wait(lambda: ready() == 3)
                wait(lambda: sum(client.whole for client in clients) > 4)
                join(clients, stop)
            assert pids(tmp_path) == left
            assert remembered(tmp_path)["next_id"] == 3
            assert [end for client in clients for end in client.other] == []
        finally:
            join(clients, stop)
            for pid in pids(tmp_path):
                os.killpg(pid, signal.SIGKILL)
