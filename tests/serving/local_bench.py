"""The local back end on make-believe processes, servers and clock."""

from __future__ import annotations

from live_world import FakeClock

from rl_autoscale.serving.backends.local import LocalBackend, LocalConfig
from rl_autoscale.serving.backends.processes import ProcessId
from rl_autoscale.serving.http_client import HttpAnswer, HttpError
from rl_autoscale.serving.metric_names import engine_names


class FakeProcesses:
    """Processes that run until told otherwise; ``stubborn`` ones ignore SIGTERM."""

    def __init__(self):
        self.commands, self.codes, self.log = {}, {}, []
        self.stubborn = False

    def start(self, command, env, log):
        pid = 100 + len(self.commands)
        self.commands[pid], self.codes[pid] = list(command), None
        return ProcessId(pid, str(pid))

    def exit_code(self, process):
        return self.codes.get(process.pid, -1)

    def terminate(self, process):
        self.log.append(("term", process.pid))
        if not self.stubborn:
            self.codes[process.pid] = 0

    def kill(self, process):
        self.log.append(("kill", process.pid))
        self.codes[process.pid] = -9 if self.codes[process.pid] is None else self.codes[process.pid]


class FakeServers:
    """Health and metrics of all ports; tests say what they answer."""

    def __init__(self):
        self.healthy, self.in_flight = True, "0"

    def __call__(self, method, url, *, body=None, headers=None, timeout_s):
        if url.endswith("/health"):
            return HttpAnswer(200 if self.healthy else 503, b"")
        if self.in_flight is None:
            raise HttpError("refused")
        return HttpAnswer(200, f"vllm:num_requests_running {self.in_flight}\n".encode())


class Bench:
    """A back end on make-believe everything."""

    def __init__(self, folder, **changes):
        self.clock, self.processes, self.servers = FakeClock(), FakeProcesses(), FakeServers()
        settings = {"command": ["serve", "{port}", '{"a": 1}'], "state_dir": folder, "backoff_s": 2.0} | changes
        self.config = LocalConfig.from_dict(settings)
        self.backend = self.make()

    def make(self, **changes):
        return LocalBackend(
            "gpu",
            self.config,
            engine_names("vllm"),
            self.clock,
            processes=self.processes,
            http=self.servers,
            port_is_free=lambda port: port != 8101,
            **{"supervise": False, **changes},
        )

    def step(self, seconds=1.0):
        self.clock.advance(seconds)
        self.backend.step()

    @property
    def phases(self):
        return [replica.phase for replica in self.backend.observe().replicas]
