"""A fleet of make-believe servers on a make-believe clock, for everything that is tested above real processes.

`World` holds the traffic, `FakeBackend` the replicas; `World.http` answers as vLLM's metrics pages, `FakeGateway` as
the gateway. Requests take one second to their first token and two more to their last, whatever the load: what is tested
here is who reads and decides what, not queueing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import ScalingDecision
from rl_autoscale.serving.gateway_api import (
    ClassSnapshot,
    GatewayDecision,
    GatewaySnapshot,
    HistogramSnapshot,
    PoolSnapshot,
    ReplicaList,
)
from rl_autoscale.serving.http_client import HttpAnswer, HttpError
from rl_autoscale.serving.live_fleet import LiveFleet
from rl_autoscale.serving.metric_names import engine_names
from rl_autoscale.serving.protocols import BackendError, PoolObservation, Replica
from rl_autoscale.serving.sources import DirectSource
from rl_autoscale.serving.telemetry import Limits

PROMPT_TOKENS, OUTPUT_TOKENS = 1000, 41
FIRST_TOKEN_S, LAST_TOKEN_S = 1.0, 3.0
EDGES_S = (0.5, 1.0, 2.5)


class FakeClock:
    """Time passes only in `sleep` and `advance`."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.wall_offset_s = 1.7e9
        self.listeners = []

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s + self.wall_offset_s

    def sleep(self, duration_s: float) -> None:
        self.advance(duration_s)

    def advance(self, duration_s: float) -> None:
        left_s = duration_s
        while left_s > 1e-9:
            step_s = min(left_s, 1.0)
            self.now_s += step_s
            left_s -= step_s
            for listener in self.listeners:
                listener(step_s)


@dataclass
class Engine:
    """The books of one make-believe vLLM."""

    in_flight: deque = field(default_factory=deque)  # arrival times
    first_tokens: int = 0
    finished: int = 0
    steps: int = 0
    kv_usage: float = 0.2

    def text(self, now_s: float) -> str:
        """Its metrics page."""
        running = len(self.in_flight)
        lines = [
            f"vllm:num_requests_running {running}.0",
            "vllm:num_requests_waiting 0.0",
            f"vllm:kv_cache_usage_perc {self.kv_usage if running else 0.0}",
            "vllm:num_preemptions_total 0.0",
            f"vllm:prompt_tokens_total {self.first_tokens * PROMPT_TOKENS}.0",
            f"vllm:generation_tokens_total {self.finished * OUTPUT_TOKENS}.0",
            f'vllm:request_success_total{{finished_reason="stop"}} {self.finished}.0',
        ]
        lines += _histogram_lines("vllm:time_to_first_token_seconds", self.first_tokens, FIRST_TOKEN_S)
        lines += _histogram_lines("vllm:inter_token_latency_seconds", self.finished * (OUTPUT_TOKENS - 1), 0.05)
        lines += _histogram_lines("vllm:request_time_per_output_token_seconds", self.finished, 0.05)
        lines += _histogram_lines("vllm:request_generation_tokens", self.finished, OUTPUT_TOKENS)
        lines += _histogram_lines("vllm:iteration_tokens_total", self.steps, 1.0)
        return "# HELP x y\n" + "\n".join(lines) + "\n"


def _histogram_lines(name: str, count: int, value: float) -> list[str]:
    lines = [f'{name}_bucket{{le="{edge}"}} {count if value <= edge else 0}.0' for edge in EDGES_S]
    return [*lines, f'{name}_bucket{{le="+Inf"}} {count}.0', f"{name}_sum {count * value}", f"{name}_count {count}.0"]


class FakeBackend:
    """Replicas that become ready after ``startup_s``; every fault is an attribute."""

    def __init__(self, clock: FakeClock, pool: str, initial: int, startup_s: float = 25.0) -> None:
        self.clock = clock
        self.pool = pool
        self.startup_s = startup_s
        self.target = self.seen_target = initial
        self.next_id = 0
        self.replicas: list[Replica] = []
        self.born_s: dict[str, float] = {}
        self.calls: list[int] = []
        self.read_error: BackendError | None = None
        self.write_error: BackendError | None = None
        self.crash_loop = False
        for _ in range(initial):
            self._start("ready")

    def _start(self, phase: str) -> None:
        name = f"{self.pool}-{self.next_id}"
        self.next_id += 1
        self.born_s[name] = self.clock.now_s
        self.replicas.append(Replica(name, self.pool, f"http://{name}:8000", phase, 0.0))

    def _phase(self, name: str, phase: str, reason: str = "") -> None:
        self.born_s[name] = self.clock.now_s
        self.replicas = [
            Replica(item.replica_id, item.pool, item.url, phase, 0.0, reason) if item.replica_id == name else item
            for item in self.replicas
        ]

    def pass_time(self) -> None:
        for item in list(self.replicas):
            if item.phase == "starting" and self.clock.now_s - self.born_s[item.replica_id] >= self.startup_s - 1e-6:
                self._phase(item.replica_id, "failed" if self.crash_loop else "ready", "exit code 1")
        self._reconcile()

    def _reconcile(self) -> None:
        active = [item for item in self.replicas if item.phase in ("starting", "ready")]
        for _ in range(self.target - len(active)):
            self._start("starting")
        for item in sorted(active, key=lambda item: item.phase == "ready")[: max(len(active) - self.target, 0)]:
            if item.phase == "starting":
                self.replicas.remove(item)
            else:
                self._phase(item.replica_id, "draining")

    def retire(self, name: str) -> None:
        self.replicas = [item for item in self.replicas if item.replica_id != name]

    def observe(self) -> PoolObservation:
        if self.read_error:
            raise self.read_error
        now_s = self.clock.now_s
        self.seen_target = self.target
        aged = [
            Replica(r.replica_id, r.pool, r.url, r.phase, now_s - self.born_s[r.replica_id], r.reason)
            for r in self.replicas
        ]
        return PoolObservation(self.target, tuple(aged))

    def set_target(self, num_replicas: int) -> None:
        if self.write_error:
            raise self.write_error
        if self.target != self.seen_target:
            raise BackendError("somebody changed it since it was read", retryable=True)
        self.seen_target = num_replicas
        if num_replicas != self.target:
            self.calls.append(num_replicas)
        self.target = num_replicas
        self._reconcile()

    def close(self) -> None:
        pass


class World:
    """Traffic, engines and the network between them and the controller.

    Attributes:
        rate_per_s: arrivals, spread evenly over ready replicas.
        fault: what every metrics page does: None, "down", "empty", "nan", "frozen" or "partial".
        faulty: replicas the fault is limited to; None for all.
    """

    def __init__(
        self, spec: FleetSpec, *, rate_per_s: float = 2.0, startup_s: float = 25.0, age_s: float = 0.0
    ) -> None:
        self.spec = spec
        self.clock = FakeClock()
        self.rate_per_s = rate_per_s
        self.backends = {pool.name: FakeBackend(self.clock, pool.name, pool.initial, startup_s) for pool in spec.pools}
        self.engines: dict[str, Engine] = {}
        self.pages: dict[str, str] = {}
        self.fault: str | None = None
        self.faulty: set[str] | None = None
        self.scraped: list[str] = []
        self._owed = 0.0
        self._turn = 0
        self.clock.listeners.append(self.pass_time)
        self.gateway = FakeGateway(self)

    def engine(self, name: str) -> Engine:
        return self.engines.setdefault(name, Engine())

    def pass_time(self, step_s: float) -> None:
        for backend in self.backends.values():
            backend.pass_time()
        ready = [r for backend in self.backends.values() for r in backend.replicas if r.phase == "ready"]
        self._owed += self.rate_per_s * step_s
        while self._owed >= 1.0 - 1e-9:
            self._owed -= 1.0
            self.gateway.arrivals += 1
            if ready:
                self._turn += 1
                self.engine(ready[self._turn % len(ready)].replica_id).in_flight.append([self.clock.now_s, False])
            else:
                self.gateway.failed += 1
        for backend in self.backends.values():
            for replica in list(backend.replicas):
                engine = self.engine(replica.replica_id)
                self._serve(engine)
                if replica.phase == "draining" and not engine.in_flight:
                    backend.retire(replica.replica_id)

    def _serve(self, engine: Engine) -> None:
        engine.steps += bool(engine.in_flight)
        for request in engine.in_flight:
            if not request[1] and self.clock.now_s - request[0] >= FIRST_TOKEN_S - 1e-9:
                request[1] = True
                engine.first_tokens += 1
                self.gateway.first_tokens += 1
        while engine.in_flight and self.clock.now_s - engine.in_flight[0][0] >= LAST_TOKEN_S - 1e-9:
            engine.in_flight.popleft()
            engine.finished += 1
            self.gateway.finished += 1

    def http(self, method: str, url: str, *, body=None, headers=None, timeout_s: float) -> HttpAnswer:
        name = urlsplit(url).hostname
        self.scraped.append(name)
        text = self.engine(name).text(self.clock.now_s)
        fault = self.fault if self.faulty is None or name in self.faulty else None
        if fault == "down":
            raise HttpError("connection refused")
        if fault == "empty":
            text = "\n"
        if fault == "nan":
            text = "\n".join(line.rsplit(" ", 1)[0] + " NaN" for line in text.splitlines() if line[0] != "#")
        if fault == "partial":
            text = "\n".join(line for line in text.splitlines() if "running" not in line)
        if fault == "frozen":
            text = self.pages.get(name, text)
        else:
            self.pages[name] = text
        return HttpAnswer(200, text.encode())

    def fleet(self, *, gateway: bool = False, stale_after_s: float = 30.0) -> LiveFleet:
        """A live fleet on this world."""
        names = engine_names("vllm")
        source = DirectSource(names, self.clock, self.http, timeout_s=5.0)
        limits = Limits(stale_after_s=stale_after_s, min_coverage=0.5)
        return LiveFleet(
            self.spec,
            self.backends,
            source,
            names,
            self.clock,
            limits,
            gateway=self.gateway if gateway else None,
        )


class FakeGateway:
    """One class, no queue: the gateway's words without its work."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.started_s = world.clock.now_s
        self.arrivals = self.first_tokens = self.finished = self.failed = 0
        self.replicas: ReplicaList | None = None
        self.decision: GatewayDecision | None = None
        self.error: BackendError | None = None
        self.refuses_lists = False

    def restart(self) -> None:
        self.started_s = self.world.clock.now_s
        self.arrivals = self.first_tokens = self.finished = self.failed = 0

    def snapshot(self) -> GatewaySnapshot:
        if self.error:
            raise self.error
        in_flight = {name: len(engine.in_flight) for name, engine in self.world.engines.items()}
        total = sum(in_flight.values())
        item = ClassSnapshot(
            arrivals=self.arrivals,
            arrived_prompt_tokens=self.arrivals * PROMPT_TOKENS,
            first_tokens=self.first_tokens,
            late_first_tokens=0,
            finished=self.finished,
            met=self.finished,
            slow_answers=0,
            finished_output_tokens=self.finished * OUTPUT_TOKENS,
            refused=0,
            dropped=0,
            cancelled=0,
            failed=self.failed,
            queue_length=0,
            queued_prompt_tokens=0,
            oldest_wait_s=0.0,
            in_flight=total,
            admission=None,
            ttft=_histogram(self.first_tokens, FIRST_TOKEN_S),
            tpot=_histogram(self.finished, 0.05),
        )
        pool = PoolSnapshot(
            in_flight=total,
            in_flight_interactive=total,
            busy_interactive=sum(count > 0 for count in in_flight.values()),
            pending_prompt_tokens=0,
            batch_cap=256,
            evictions=0,
        )
        return GatewaySnapshot(
            started_at_s=self.started_s,
            uptime_s=self.world.clock.now_s - self.started_s,
            pools={name: pool for name in self.world.spec.pool_names},
            classes={name: item for name in self.world.spec.class_names},
            in_flight_by_replica=in_flight,
        )

    def put_replicas(self, replicas: ReplicaList) -> None:
        if self.error or self.refuses_lists:
            raise self.error or BackendError("status 500", retryable=True)
        self.replicas = replicas

    def put_decision(self, decision: GatewayDecision) -> None:
        if self.error:
            raise self.error
        self.decision = decision


def _histogram(count: int, value: float) -> HistogramSnapshot:
    counts = tuple(count if value <= edge else 0 for edge in EDGES_S)
    return HistogramSnapshot(bounds_s=EDGES_S, counts=counts, count=count, sum_s=count * value)


def world_spec(**changes) -> FleetSpec:
    """One pool of one to ten replicas, one class; start-ups of 25 s."""
    pool = {
        "name": "gpu",
        "profile": "llama-3.1-8b_a100_tp1",
        "min_replicas": 1,
        "max_replicas": 10,
        "initial_replicas": 2,
        "startup": [{"mean_s": 25.0, "cv": 0.0}],
    }
    chat = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
    pool |= changes.pop("pool", {})
    return FleetSpec.from_dict({"pools": [pool], "classes": [chat], **changes})


def decide(fleet, target: int) -> ScalingDecision:
    """A decision for the one pool of a fleet."""
    spec = fleet.spec
    return ScalingDecision(np.array([target]), spec.batch_limits, np.full(len(spec.classes), np.inf))
