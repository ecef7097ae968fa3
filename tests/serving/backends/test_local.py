"""The local back end: its rules on make-believe processes, and the whole of it on real ones."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time

import pytest
from serving.local_bench import Bench

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.serving.backends.local import LocalBackend, LocalConfig
from rl_autoscale.serving.backends.processes import OsProcesses, ProcessId, start_moment
from rl_autoscale.serving.clock import SystemClock
from rl_autoscale.serving.http_client import send
from rl_autoscale.serving.metric_names import engine_names
from rl_autoscale.serving.protocols import BackendError

VLLM = engine_names("vllm")

# A server in the words of vLLM: /health, /metrics with the number of requests in the file beside it.
SERVER = """
import http.server, pathlib, sys
port, requests = int(sys.argv[1]), pathlib.Path(sys.argv[2])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        count = requests.read_text() if requests.exists() else "0"
        body = f"vllm:num_requests_running {count}\\nvllm:num_requests_waiting 0\\n".encode()
        self.send_response(200); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
print("startup complete", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_target_starts_processes_on_free_ports_with_the_command_filled_in(bench):
    bench.backend.set_target(2)
    assert list(bench.processes.commands.values()) == [["serve", "8100", '{"a": 1}'], ["serve", "8102", '{"a": 1}']]
    assert bench.phases == ["starting", "starting"]
    bench.step()
    assert bench.phases == ["ready", "ready"]
    assert bench.backend.observe().asked_for == 2


def test_asking_twice_starts_nothing_twice(bench):
    bench.backend.set_target(2)
    bench.backend.set_target(2)
    assert len(bench.processes.commands) == 2


def test_a_stranger_that_answers_health_does_not_make_a_dead_process_ready(bench):
    bench.backend.set_target(1)
    bench.processes.codes[100] = 1
    bench.step()
    assert bench.phases == ["failed"]
    assert "exit code 1" in bench.backend.observe().replicas[0].reason


def test_health_is_not_enough_when_the_log_must_speak(tmp_path):
    bench = Bench(tmp_path, ready_log="startup complete")
    bench.backend.set_target(1)
    bench.step()
    assert bench.phases == ["starting"]
    (tmp_path / "logs").mkdir(exist_ok=True)
    (tmp_path / "logs" / "gpu-0.log").write_text("INFO: Application startup complete.\n")
    bench.step()
    assert bench.phases == ["ready"]
    bench.backend.close()


def test_starting_replicas_leave_first_then_the_youngest(bench):
    bench.backend.set_target(1)
    bench.step()
    bench.backend.set_target(2)
    bench.step()
    bench.backend.set_target(3)
    bench.backend.set_target(1)
    assert [(r.replica_id, r.phase) for r in bench.backend.observe().replicas] == [
        ("gpu-0", "ready"),
        ("gpu-1", "draining"),
    ]
    assert ("kill", 102) in bench.processes.log


def test_a_drain_waits_for_the_last_request_and_for_routing_to_settle(bench):
    bench.backend.set_target(1)
    bench.step()
    bench.servers.in_flight = "2"
    bench.backend.set_target(0)
    bench.step(60.0)
    assert bench.processes.log == []
    assert "2 in flight" in bench.backend.observe().replicas[0].reason
    bench.servers.in_flight = "0"
    bench.step()
    assert bench.processes.log == [("term", 100)]
    bench.step()
    assert bench.phases == []


def test_an_empty_replica_still_waits_until_routing_has_settled(bench):
    bench.backend.set_target(1)
    bench.step()
    bench.backend.set_target(0)
    bench.step(2.0)
    assert bench.processes.log == []
    bench.step(1.5)
    assert bench.processes.log == [("term", 100)]


@pytest.mark.parametrize("in_flight", ["3", None])
def test_patience_with_a_drain_ends(bench, in_flight):
    bench.backend.set_target(1)
    bench.step()
    bench.servers.in_flight, bench.processes.stubborn = in_flight, True
    bench.backend.set_target(0)
    bench.step(119.0)
    assert bench.processes.log == []
    bench.step(2.0)
    assert bench.processes.log == [("term", 100)]
    bench.step(29.0)
    assert bench.processes.log == [("term", 100)]
    bench.step(2.0)
    assert ("kill", 100) in bench.processes.log


def test_a_replica_that_never_becomes_ready_is_killed_and_told_of(bench):
    bench.servers.healthy = False
    bench.backend.set_target(1)
    bench.step(599.0)
    assert bench.phases == ["starting"]
    bench.step(2.0)
    assert bench.phases == ["failed"]
    assert "not ready after 601 s" in bench.backend.observe().replicas[0].reason


def test_a_crash_loop_slows_down(bench):
    bench.backend.set_target(1)
    starts = []
    for second in range(70):
        pid = 99 + len(bench.processes.commands)
        bench.processes.codes[pid] = 1
        before = len(bench.processes.commands)
        bench.step(1.0)
        if len(bench.processes.commands) > before:
            starts.append(second)
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert len(starts) == 5
    assert all(later >= 2 * earlier - 2 for earlier, later in itertools.pairwise(gaps))


def test_a_new_controller_takes_over_processes_and_target(bench):
    bench.backend.set_target(2)
    bench.step()
    bench.backend.close()
    bench.processes.codes[101] = 0  # one ended while nobody looked
    bench.backend = bench.make(initial=7)
    observation = bench.backend.observe()
    assert observation.asked_for == 2
    assert [(r.replica_id, r.phase) for r in observation.replicas] == [("gpu-0", "ready"), ("gpu-2", "starting")]
    assert len(bench.processes.commands) == 3


def test_a_controller_that_may_not_act_leaves_the_initial_count_to_the_first_that_may(bench):
    for initial in (0, 0, 2):
        bench.backend.close()
        bench.backend = bench.make(initial=initial)
        bench.step()
    assert (bench.backend.observe().asked_for, bench.phases) == (2, ["ready", "ready"])
    bench.backend.set_target(0)
    bench.backend.close()
    bench.backend = bench.make(initial=2)
    assert bench.backend.observe().asked_for == 0


def test_two_controllers_cannot_hold_one_pool(bench):
    with pytest.raises(BackendError, match="another controller"):
        bench.make()


def test_a_damaged_memory_is_refused_and_nothing_is_started(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(BackendError, match="damaged"):
        Bench(tmp_path)


def test_a_command_without_a_port_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"names no \{port\}"):
        LocalConfig.from_dict({"command": ["serve"], "state_dir": tmp_path})


# -- real processes ----------------------------------------------------------------------------------------------------


def until(backend, condition, limit_s=30.0):
    """Step until something is so; fails after a generous limit, since the machine may be busy."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, backend.observe()
        backend.step()
        time.sleep(0.01)


def real(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    config = LocalConfig.from_dict(
        {
            "command": [sys.executable, "-S", str(script), "{port}", str(tmp_path / "requests")],
            "state_dir": tmp_path / "state",
            "ports": [18200, 18299],
            "ready_log": "startup complete",
            "settle_s": 0.0,
            "backoff_s": 0.01,
        }
    )
    return LocalBackend("gpu", config, VLLM, SystemClock(), supervise=False)


def phases(backend):
    return [replica.phase for replica in backend.observe().replicas]


def test_real_processes_start_crash_are_replaced_drain_and_survive_their_controller(tmp_path):
    backend = real(tmp_path)
    try:
        backend.set_target(2)
        until(backend, lambda: phases(backend) == ["ready", "ready"])
        first = backend.observe().replicas[0]
        assert send("GET", first.url + "/metrics", timeout_s=5.0).status == 200

        state = json.loads((tmp_path / "state" / "state.json").read_text())
        os.kill(state["members"][0]["pid"], signal.SIGKILL)
        until(backend, lambda: phases(backend) == ["failed", "ready", "ready"])
        assert "exit code -9" in backend.observe().replicas[0].reason

        backend.close()
        backend = real(tmp_path)
        until(backend, lambda: phases(backend) == ["ready", "ready"])

        (tmp_path / "requests").write_text("1")
        backend.set_target(1)
        backend.step()
        assert phases(backend).count("draining") == 1
        (tmp_path / "requests").write_text("0")
        until(backend, lambda: phases(backend) == ["ready"])
    finally:
        backend.kill_all()
        backend.close()


def test_a_program_that_does_not_exist_is_told_at_once(tmp_path):
    with pytest.raises(BackendError, match="cannot start 'no-such-program'"):
        OsProcesses().start(["no-such-program"], {}, tmp_path / "log")


def test_a_process_id_that_was_given_away_is_not_ours(tmp_path):
    processes = OsProcesses()
    assert start_moment(os.getpid()) is not None
    assert processes.exit_code(ProcessId(os.getpid(), "long ago")) == -1
    processes.terminate(ProcessId(os.getpid(), "long ago"))


def test_a_child_that_got_the_id_of_an_earlier_one_runs(tmp_path, monkeypatch):
    processes = OsProcesses()
    monkeypatch.setattr(os, "posix_spawnp", lambda *_, **__: 4242)
    monkeypatch.setattr(os, "waitpid", lambda pid, _: (pid, 0))
    assert processes.exit_code(processes.start(["serve"], {}, tmp_path / "log")) == 0
    monkeypatch.setattr(os, "waitpid", lambda *_: (0, 0))
    assert processes.exit_code(processes.start(["serve"], {}, tmp_path / "log")) is None
