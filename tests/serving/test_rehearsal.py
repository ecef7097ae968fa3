"""Dress rehearsal: controller, local back end, gateway and emulated replicas as real processes, under streaming load.

python -m pytest -m live tests/serving/test_rehearsal.py
"""

from __future__ import annotations

import threading

import pytest
from rehearsal_files import write_files
from streaming_clients import Client, running_gateway, until

from rl_autoscale.serving.assemble import assemble
from rl_autoscale.serving.clock import SystemClock
from rl_autoscale.serving.config import ControlConfig

pytestmark = pytest.mark.live
PUBLIC, CONTROL = 18480, 18481


def test_one_to_three_to_one_under_load_without_a_lost_stream(tmp_path):
    write_files(tmp_path, PUBLIC)
    stop = threading.Event()
    clients = [Client(PUBLIC, "emulated", "x" * 400, stop) for _ in range(6)]
    with running_gateway(tmp_path / "gateway.yaml", CONTROL):
        assembly = assemble(ControlConfig.from_file(tmp_path / "control.yaml"), SystemClock())
        controller, fleet = assembly.controller, assembly.fleet

        def step() -> None:
            controller.step()
            fleet.advance()

        def ready() -> float:
            return float(fleet.observe().pools.ready[0])

        try:
            until(lambda: ready() == 1, 120.0, step)
            for client in clients:
                client.start()
            for _ in range(4):
                step()
            controller._policy.replicas = 3
            until(lambda: ready() == 3, 180.0, step)
            for _ in range(4):
                step()
            assert fleet.observe().classes.arrivals_per_s[0] > 0
            assert fleet.report.coverage["gpu"] == 1.0
            assert fleet.observe().pools.generation_tokens_per_s[0] > 0
            controller._policy.replicas = 1
            until(lambda: ready() == 1 and fleet.observe().pools.draining[0] == 0, 180.0, step)
            stop.set()
            for client in clients:
                client.join(60.0)
            assert sum(client.whole for client in clients) > 20
            assert [outcome for client in clients for outcome in client.other] == []
        finally:
            stop.set()
            fleet._backends["gpu"].kill_all()
            assembly.close()
