"""The whole live path on real vLLM servers: local back end, telemetry, a rule, controller and gateway; minutes long.

    make test-vllm

vLLM has an interpreter of its own (``RL_AUTOSCALE_VLLM_PYTHON``); gateway and controller run in this one. The model is
a tiny random Llama made on the spot. Asserted are counts, orders and names, never latencies: a machine without GPU
gives its servers and this test the same few cores.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from live_world import world_spec
from prometheus_client.parser import text_string_to_metric_families
from streaming_clients import Client, running_gateway, until
from tiny_vllm import (
    ENV,
    MAX_NUM_SEQS,
    MODEL_NAME,
    READY_LOG,
    VOCABULARY,
    has_vllm,
    make_model,
    serve_command,
    vllm_python,
)

from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.serving.assemble import Assembly, assemble
from rl_autoscale.serving.clock import SystemClock
from rl_autoscale.serving.config import ControlConfig
from rl_autoscale.serving.emulator.engine import Engine
from rl_autoscale.serving.emulator.metrics import EngineMetrics
from rl_autoscale.serving.gateway_client import HttpGateway
from rl_autoscale.serving.http_client import send
from rl_autoscale.serving.metric_names import engine_names
from rl_autoscale.serving.samples import parse_exposition

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(
        not has_vllm(vllm_python()),
        reason=f"no vLLM at {vllm_python()}: run `make test-vllm`, or set RL_AUTOSCALE_VLLM_PYTHON",
    ),
]
PUBLIC, CONTROL = 18880, 18881
START_LIMIT_S = 600.0
PROMPT = [3 + token % (VOCABULARY - 3) for token in range(64)]
FEW, MANY, TARGET = 2, 24, 6  # clients, clients, and requests in flight per replica that the HPA aims at


@dataclass
class Stage:
    """A controller with its gateway and everything needed to look at them."""

    assembly: Assembly
    log: Path
    clients: list[Client] = field(default_factory=list)
    stop_all: list[threading.Event] = field(default_factory=list)

    @property
    def pools(self):
        return self.assembly.fleet.observe().pools

    @property
    def gateway(self):
        return HttpGateway(f"http://127.0.0.1:{CONTROL}", token=None, timeout_s=10.0).snapshot()

    def step(self) -> None:
        self.assembly.controller.step()
        self.assembly.fleet.advance()

    def until(self, condition: Callable[[], bool], limit_s: float = START_LIMIT_S) -> None:
        until(condition, limit_s, self.step)

    def replicas(self, phase: str = "ready"):
        observed = self.assembly.fleet._backends["gpu"].observe()
        return [replica for replica in observed.replicas if replica.phase == phase]

    def add_clients(self, count: int) -> threading.Event:
        """Start clients; the event that stops them."""
        stop = threading.Event()
        clients = [Client(PUBLIC, MODEL_NAME, PROMPT, stop) for _ in range(count)]
        self.clients += clients
        self.stop_all.append(stop)
        for client in clients:
            client.start()
        return stop

    def join_clients(self) -> None:
        for stop in self.stop_all:
            stop.set()
        for client in self.clients:
            client.join(120.0)

    @property
    def lost(self) -> list[tuple[int, str]]:
        return [outcome for client in self.clients for outcome in client.other]

    def targets(self) -> list[int]:
        """Every target of the decision log, repeats left out."""
        records = [json.loads(line) for line in self.log.read_text().splitlines()]
        targets = [record["pools"]["gpu"]["final"] for record in records]
        return [target for i, target in enumerate(targets) if i == 0 or target != targets[i - 1]]


def write_files(folder: Path) -> None:
    pool = {"initial_replicas": 1, "max_replicas": 3, "max_num_seqs": MAX_NUM_SEQS, "startup": [{"mean_s": 60.0}]}
    spec = world_spec(pool=pool, control_interval_s=4.0, telemetry_age_s=1.0)
    (folder / "fleet.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_none=True)))
    gateway = {"fleet": "fleet.yaml", "port": PUBLIC, "control_port": CONTROL}
    (folder / "gateway.yaml").write_text(yaml.safe_dump(gateway))
    local = {
        "command": serve_command(vllm_python(), folder / "model"),
        "env": ENV,
        "state_dir": str(folder / "state"),
        "ports": [18900, 18949],
        "ready_log": READY_LOG,
        "startup_timeout_s": START_LIMIT_S,
    }
    control = {
        "fleet": "fleet.yaml",
        "mode": "active",
        "policy": {"name": "hpa", "knobs": {"target": TARGET, "sync_period_s": 4.0, "down_stabilisation_s": 20.0}},
        "gateway": {"url": f"http://127.0.0.1:{CONTROL}", "timeout_s": 10.0},
        "telemetry": {"timeout_s": 10.0},
        "safety": {"down_cooldown_s": 0.0},
        "status": {"port": 0},
        "decision_log": str(folder / "decisions.jsonl"),
        "backends": {"gpu": {"local": local}},
    }
    (folder / "control.yaml").write_text(yaml.safe_dump(control))


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Iterator[Stage]:
    """One replica, ready; what the tests below do to it they do in their order."""
    folder = tmp_path_factory.mktemp("vllm")
    make_model(vllm_python(), folder / "model")
    write_files(folder)
    with running_gateway(folder / "gateway.yaml", CONTROL):
        assembly = assemble(ControlConfig.from_file(folder / "control.yaml"), SystemClock())
        stage = Stage(assembly, folder / "decisions.jsonl")
        try:
            stage.until(lambda: stage.pools.ready[0] == 1)
            yield stage
        finally:
            stage.join_clients()
            assembly.fleet._backends["gpu"].kill_all()
            assembly.close()


def page(stage: Stage) -> str:
    return send("GET", stage.replicas()[0].url + "/metrics", timeout_s=10.0).body.decode()


def test_every_field_of_our_map_is_on_the_page(stage):
    stop = stage.add_clients(1)
    until(lambda: stage.clients[0].whole > 0, 120.0, lambda: time.sleep(0.2))
    stop.set()
    stage.clients[0].join(60.0)
    names = engine_names("vllm").with_all
    sample = parse_exposition(page(stage), names, 0.0)
    found = {*sample.gauges, *sample.counters, *sample.histograms}
    assert found == set(names.fields)
    assert sample.counters["finished"] == stage.clients[0].whole


def test_the_emulator_speaks_as_the_real_server(stage):
    """Names, types, labels and buckets of every series that the emulator shows."""
    pool = PoolSpec.from_dict({"name": "gpu", "profile": "llama-3.1-8b_a100_tp1"})
    emulated = shapes(EngineMetrics(Engine(pool), MODEL_NAME, 2048).page().decode())
    real = shapes(page(stage))
    for name, shape in emulated.items():
        assert real.get(name) == shape, name


def shapes(text: str) -> dict[str, tuple]:
    """Family -> type, label names, and edges if it is a histogram."""
    found = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("vllm:") or family.name.endswith(("_created", "cache_config_info")):
            continue
        labels = {name for sample in family.samples for name in sample.labels}
        edges = {float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels}
        found[family.name] = family.type, labels, edges
    return found


def test_one_to_three_to_one_under_load_without_a_lost_stream(stage):
    stage.add_clients(FEW)
    for _ in range(5):
        stage.step()
    assert stage.targets() == [1]
    assert stage.pools.generation_tokens_per_s[0] > 0

    many = stage.add_clients(MANY)
    stage.until(lambda: stage.pools.ready[0] == 3)
    stage.until(lambda: all(stage.gateway.in_flight_by_replica.get(r.replica_id, 0) > 0 for r in stage.replicas()), 60)
    assert stage.assembly.fleet.report.coverage["gpu"] == 1.0

    many.set()
    stage.until(lambda: stage.pools.ready[0] == 1 and stage.pools.draining[0] == 0)
    assert not stage.replicas("failed")
    for _ in range(3):
        stage.step()
    stage.join_clients()
    assert stage.lost == []
    books = stage.gateway.classes["chat"]
    whole = sum(client.whole for client in stage.clients)
    assert (books.arrivals, books.finished) == (whole, whole)
    assert stage.targets() in ([1, 3, 1], [1, 2, 3, 1], [1, 3, 2, 1], [1, 2, 3, 2, 1])
