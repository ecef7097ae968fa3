"""The controller as a whole: its file, its pages, its metrics and log, and one run beside a real server process."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from pathlib import Path

import pytest
import yaml
from live_world import FakeClock, world_spec

from rl_autoscale.agents.export import export_policy
from rl_autoscale.cli import root
from rl_autoscale.envs.schema import Schema
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.serving.assemble import assemble
from rl_autoscale.serving.clock import SystemClock
from rl_autoscale.serving.config import ControlConfig, read_mode
from rl_autoscale.serving.controller_metrics import ControllerMetrics
from rl_autoscale.serving.decision_log import DecisionLog
from rl_autoscale.serving.http_client import send
from rl_autoscale.serving.modes import ModeSwitch
from rl_autoscale.serving.status_server import History, StatusServer, describe

SERVER = """
import http.server, sys
TTFT = "vllm:time_to_first_token_seconds"
SERIES = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:prompt_tokens_total", TTFT + "_sum"]
SERIES += [TTFT + "_count", TTFT + '_bucket{le="1.0"}', TTFT + '_bucket{le="+Inf"}']
PAGE = "".join(name + " 0\\n" for name in SERIES).encode()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(PAGE)
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def settings(folder: Path, **changes):
    (folder / "server.py").write_text(SERVER)
    spec = world_spec(pool={"initial_replicas": 1}, control_interval_s=0.2, telemetry_age_s=0.05)
    return {
        "fleet": spec.model_dump(mode="json", exclude_none=True),
        "backends": {
            "gpu": {
                "local": {
                    "command": [sys.executable, "-S", str(folder / "server.py"), "{port}"],
                    "state_dir": str(folder / "state"),
                    "ports": [18300, 18399],
                    "poll_s": 0.02,
                }
            }
        },
        "status": {"port": 0},
        "decision_log": str(folder / "decisions.jsonl"),
        **changes,
    }


def write(folder: Path, **changes) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **changes)))
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        root.main(arguments)
    return int(leaving.value.code or 0)


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backends": {}}, "differing: gpu"),
        ({"backends": {"gpu": {}}}, "exactly one of local"),
        ({"gateway": {"url": "http://g", "key": "secret"}}, "a secret is named, not written"),
        ({"mode": "on"}, "mode"),
        ({"telemetry": {"engine": "vlm"}}, "did you mean 'vllm'"),
        ({"telemetry": {"stale_after_s": 0.1}}, "must exceed the control interval"),
        ({"safety": {"down_cooldown": 3}}, "did you mean 'down_cooldown_s'"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(tmp_path, change, message):
    with pytest.raises(SpecError, match=re.escape(message)):
        ControlConfig.from_dict(settings(tmp_path, **change))


@pytest.mark.parametrize("name", ["key", "kye"])
def test_a_secret_that_was_written_out_is_not_repeated(tmp_path, name):
    with pytest.raises(SpecError) as told:
        ControlConfig.from_dict(settings(tmp_path, gateway={"url": "http://g", name: "s3cr3t-hunter2"}))
    assert "s3cr3t" not in str(told.value)


def test_the_default_mode_is_shadow_and_the_file_may_be_asked_again(tmp_path):
    assert ControlConfig.from_file(write(tmp_path)).mode == "shadow"
    assert read_mode(write(tmp_path, mode="paused")) == "paused"


def test_the_manifests_configurations_are_valid(repository, tmp_path):
    deploy = repository / "deploy"
    for place in ("kubernetes/config", "keda", "prometheus"):
        data = yaml.safe_load((deploy / place / "controller.yaml").read_text())
        (tmp_path / "fleet.yaml").write_text((deploy / "kubernetes/config/fleet.yaml").read_text())
        (tmp_path / "controller.yaml").write_text(yaml.safe_dump(data))
        config = ControlConfig.from_file(tmp_path / "controller.yaml")
        assert config.mode == "shadow"
        assert (config.backends["chat"].observed is None) == (place == "kubernetes/config")
        assert config.status.host == "0.0.0.0"


def test_check_validates_and_starts_nothing(tmp_path, capsys):
    assert run("control", "--config", str(write(tmp_path)), "--check") == 0
    assert json.loads(capsys.readouterr().out)["policy"] == "headroom"
    assert not (tmp_path / "state").exists()


def test_the_help_teaches(capsys):
    assert run("control", "--help") == 0
    shown = capsys.readouterr().out
    for word in ("SHADOW", "--mode active", "touch KILL_FILE", "--port={port}"):
        assert word in shown


# -- policies that cannot be used --------------------------------------------------------------------------------------


def corrupt(folder: Path) -> str:
    (folder / "policy.json").write_text("{")
    return "not a policy card"


def of_another_schema(folder: Path) -> str:
    pytest.importorskip("onnx")
    import numpy as np

    two = world_spec(classes=[{"name": n, "ttft_slo_s": 1.0, "tpot_slo_s": 0.1} for n in ("a", "b")])
    schema = Schema.of(two)
    layers = [
        (np.zeros((len(schema.actions), len(schema.features)), np.float32), np.zeros(len(schema.actions), np.float32))
    ]
    export_policy(layers, schema, folder, refuse=True, training={})
    return "trained for schema"


@pytest.mark.parametrize("spoil", [corrupt, of_another_schema])
def test_a_policy_that_cannot_be_used_leaves_the_rule_in_charge_and_check_refuses_it(tmp_path, spoil, capsys):
    folder = tmp_path / "policy"
    folder.mkdir()
    message = spoil(folder)
    config = write(tmp_path, policy={"name": str(folder)}, status=None)
    assert run("control", "--config", str(config), "--check") == 2
    assert message in capsys.readouterr().err
    assembly = assemble(ControlConfig.from_file(config), SystemClock())
    try:
        record = assembly.controller.step()
        assert any(f"no policy: {folder}" in reason for reason in record.reasons)
        assert record.source in ("rule", "hold")
    finally:
        assembly.fleet._backends["gpu"].kill_all()
        assembly.close()


# -- start -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shadow", "paused", "killed"])
def test_a_controller_that_may_not_act_starts_no_replica(tmp_path, mode):
    changes = {"mode": "active", "kill_file": str(tmp_path)} if mode == "killed" else {"mode": mode}
    assembly = assemble(ControlConfig.from_file(write(tmp_path, **changes)), SystemClock())
    backend = assembly.fleet._backends["gpu"]
    try:
        assembly.controller.step()
        assert backend.observe().replicas == ()
        assert not (tmp_path / "state" / "logs").exists()
    finally:
        backend.kill_all()
        assembly.close()


def test_a_status_port_that_is_taken_is_told_and_starts_nothing(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = write(tmp_path, mode="active", status={"port": port})
        assert run("control", "--config", str(config), "--steps", "1") == 2
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use); end what listens" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_a_start_that_fails_closes_what_it_had_built(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    config = write(tmp_path, status={"port": port}, gateway={"url": "http://g", "key": "env:NO_SUCH_KEY"})
    with pytest.raises(SpecError, match="NO_SUCH_KEY"):
        assemble(ControlConfig.from_file(config), SystemClock())
    assert not [thread for thread in threading.enumerate() if thread.name in ("status", "local-gpu")]
    assemble(ControlConfig.from_file(write(tmp_path, status={"port": port})), SystemClock()).close()


# -- one real run ------------------------------------------------------------------------------------------------------


def test_a_run_beside_a_real_server_logs_every_step_and_serves_its_pages(tmp_path):
    changes = {"mode": "active", "policy": {"name": "static", "knobs": {"replicas": 2}}}
    assembly = assemble(ControlConfig.from_file(write(tmp_path, **changes)), SystemClock())
    try:
        records = []
        assembly.controller.add_listener(records.append)
        backend = assembly.fleet._backends["gpu"]
        while backend.observe().asked_for != 2:  # a busy machine starts servers slowly
            assert len(records) < 300
            assembly.controller.step()
            assembly.fleet.advance()
        assembly.controller.step()
        address = f"http://127.0.0.1:{assembly.status.port}"
        pages = {
            page: send("GET", address + page, timeout_s=5.0) for page in ("/", "/status.json", "/metrics", "/healthz")
        }
        assert {page: answer.status for page, answer in pages.items()} == dict.fromkeys(pages, 200)
        assert b"<svg" in pages["/"].body
        assert len(json.loads(pages["/status.json"].body)["steps"]) == len(records)
        lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(records) + 1))
        assert max(line["pools"]["gpu"]["raw"] for line in lines) == 2
        assert "gpu.running" in lines[-1]["ages_s"]
    finally:
        assembly.fleet._backends["gpu"].kill_all()
        assembly.close()


# -- pages, metrics, log -----------------------------------------------------------------------------------------------


@pytest.fixture
def record(stage):
    return stage(gateway=True).steps(6)


@pytest.fixture
def server(record):
    clock, modes, history, metrics = FakeClock(), ModeSwitch("active"), History(3), ControllerMetrics()
    metrics(record)
    for step in range(5):
        history.add({**describe(record), "step": step + 1}, clock.now_s)
    server = StatusServer("127.0.0.1", 0, history, metrics, modes, clock, 10.0)
    server.clock, server.modes = clock, modes
    yield server
    server.close()


def ask(server, method, path, **headers):
    answer = send(method, f"http://127.0.0.1:{server.port}{path}", headers=headers, timeout_s=5.0)
    return answer.status, answer.body


def test_the_page_gets_only_what_is_new_and_never_more_than_its_history(server):
    steps = [s["step"] for s in json.loads(ask(server, "GET", "/status.json?after=0")[1])["steps"]]
    assert steps == [3, 4, 5]
    assert [s["step"] for s in json.loads(ask(server, "GET", "/status.json?after=4")[1])["steps"]] == [5]
    assert ask(server, "GET", "/status.json?after=x")[0] == 200


def test_missing_values_are_null_for_the_page(server):
    assert b"NaN" not in ask(server, "GET", "/status.json")[1]
    assert b"Infinity" not in ask(server, "GET", "/status.json")[1]


def test_pausing_needs_the_header_that_no_foreign_page_can_send(server):
    assert ask(server, "POST", "/pause")[0] == 403
    assert server.modes.current()[0] == "active"
    assert ask(server, "POST", "/pause", **{"X-RL-Autoscale": "1"})[0] == 200
    assert server.modes.current()[0] == "paused"
    assert ask(server, "POST", "/resume", **{"X-RL-Autoscale": "1"})[0] == 200
    assert server.modes.current()[0] == "active"


def test_health_fails_when_steps_stop(server):
    assert ask(server, "GET", "/healthz")[0] == 200
    server.clock.now_s += 51.0
    assert ask(server, "GET", "/healthz")[0] == 503
    assert ask(server, "GET", "/nothing")[0] == 404


def series(page: bytes) -> dict[str, float]:
    lines = [line for line in page.decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_say_what_the_record_says(record):
    metrics = ControllerMetrics()
    metrics(record)
    page = series(metrics.page())
    assert page['rl_autoscale_mode{mode="active"}'] == 1.0
    assert page['rl_autoscale_pool_ready{pool="gpu"}'] == 4.0
    assert page['rl_autoscale_class_arrivals_per_s{class="chat"}'] == pytest.approx(4.0, rel=0.05)
    assert page['rl_autoscale_class_slo_attainment{class="chat"}'] == 1.0
    assert page['rl_autoscale_steps_total{mode="active",source="policy"}'] == 1.0


def test_missing_telemetry_is_nan_in_the_metrics(stage):
    show = stage()
    show.world.fault = "down"
    metrics = ControllerMetrics()
    metrics(show.steps(6))
    assert str(series(metrics.page())['rl_autoscale_pool_running{pool="gpu"}']) == "nan"


def test_the_dashboard_and_the_docs_name_only_metrics_that_exist_and_the_docs_name_all(repository, record):
    metrics = ControllerMetrics()
    metrics(record)
    exist = {re.split(r"[{ ]", line)[0] for line in metrics.page().decode().splitlines() if line[0] != "#"}
    exist -= {name for name in exist if name.endswith("_created")}
    dashboard = (repository / "deploy" / "grafana" / "controller.json").read_text()
    json.loads(dashboard)
    named = set(re.findall(r"rl_autoscale_\w+", dashboard))
    assert len(named) > 15
    assert named <= exist
    documented = set(re.findall(r"`(rl_autoscale_\w+)", (repository / "docs" / "metrics.md").read_text()))
    base = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in exist}
    assert {re.sub(r"_total$", "", name) for name in documented if "desired" not in name} == base


def test_a_full_log_moves_on_and_a_full_disk_stops_nothing(tmp_path):
    log = DecisionLog(tmp_path / "d.jsonl", max_bytes=100, keep=2)
    for step in range(12):
        log.write({"step": step, "value": float("nan"), "text": "x" * 20})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "d.jsonl.1", "d.jsonl.2"]
    assert json.loads((tmp_path / "d.jsonl").read_text().splitlines()[-1]) == {
        "step": 11,
        "value": None,
        "text": "x" * 20,
    }
    blocked = DecisionLog(tmp_path / "d.jsonl" / "below" / "a.jsonl")
    blocked.write({})
    assert blocked.num_failed == 1
