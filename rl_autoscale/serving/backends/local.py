"""The local back end: replicas are server processes on this machine.

A replica's life: *starting* (process runs, health does not answer yet), *ready*, *draining* (the gateway has been told
to send nothing more; when the engine's own count of requests is zero, or patience ends, SIGTERM, then SIGKILL), gone.
A process that ends by itself or never becomes ready is *failed*; it is replaced, after a pause that doubles with every
failure in a row.

Processes and the target survive the controller: both are in ``state_dir``, and the next controller takes them over.
One controller at a time holds the folder's lock. While the folder cannot be written (a full disk), nothing is started
or told to leave: what nobody remembers would run for ever.

Traps of real engines that shape this file: health answers 200 while an engine drains, so draining is our word and not
theirs; an engine that drains answers new streams with nothing, so ``settle_s`` passes between leaving the routing list
and SIGTERM; a stranger on the port also answers 200, so ports are tried before use and our process must be alive (and,
with ``ready_log``, must have said so) when health answers.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rl_autoscale.fleet.config import Config
from rl_autoscale.serving.backends.local_state import Member, Memory, StateFolder
from rl_autoscale.serving.backends.processes import OsProcesses, Processes
from rl_autoscale.serving.http_client import Http, HttpError, send
from rl_autoscale.serving.metric_names import EngineNames
from rl_autoscale.serving.protocols import BackendError, Clock, PoolObservation, Replica
from rl_autoscale.serving.samples import parse_exposition

_PROBE_TIMEOUT_S = 2.0
_LOG_TAIL_BYTES = 4096
_READY_LOG_BYTES = 2**20


class LocalConfig(Config):
    """One pool of local processes."""

    command: tuple[str, ...] = Field(
        min_length=1, description="program and arguments; {port}, {replica_id} and {pool} are filled in"
    )
    env: dict[str, str] = Field(default_factory=dict, description="added to this process's environment")
    state_dir: Path = Field(description="where processes, target and logs are remembered; one per pool")
    ports: tuple[PositiveInt, PositiveInt] = Field(default=(8100, 8199), description="first and last port to use")
    ready_path: str = "/health"
    ready_log: str | None = Field(default=None, description="regular expression the process's own log must show")
    startup_timeout_s: PositiveFloat = Field(default=600.0, description="then it is killed and counts as failed")
    settle_s: NonNegativeFloat = Field(default=3.0, description="from leaving the routing list to SIGTERM, at least")
    drain_grace_s: NonNegativeFloat = Field(default=120.0, description="then SIGTERM even with requests in flight")
    term_grace_s: PositiveFloat = Field(default=30.0, description="then SIGKILL")
    backoff_s: PositiveFloat = Field(default=2.0, description="pause after a failure; doubles with each in a row")
    max_backoff_s: PositiveFloat = 300.0
    keep_failed_s: PositiveFloat = Field(default=300.0, description="how long a failed replica stays in the list")
    poll_s: PositiveFloat = 0.5

    @model_validator(mode="after")
    def _check(self) -> LocalConfig:
        if not any("{port}" in word for word in self.command):
            raise ValueError("command names no {port}; every replica needs its own")
        first, last = self.ports
        if not first <= last <= 65535:
            raise ValueError(f"ports={[first, last]} must be [first, last] with first <= last <= 65535")
        if self.ready_log is not None:
            try:
                re.compile(self.ready_log)
            except re.error as error:
                raise ValueError(f"ready_log is not a regular expression: {error}") from None
        return self


class LocalBackend:
    """`Backend` of processes on this machine.

    Args:
        pool: its name.
        config: see `LocalConfig`.
        names: of the engine; its metrics page says how many requests are in flight.
        clock: for ages and patience.
        initial: replicas asked for when no earlier controller left a target; 0 for one that may not act.
        processes: the operating system.
        http: see `http_client.Http`.
        port_is_free: asked before a port is used.
        supervise: run `step` in a thread every ``poll_s``; off in tests.

    Raises:
        BackendError: another controller holds the state folder, or it cannot be used.
    """

    def __init__(
        self,
        pool: str,
        config: LocalConfig,
        names: EngineNames,
        clock: Clock,
        *,
        initial: int = 0,
        processes: Processes | None = None,
        http: Http = send,
        port_is_free: Callable[[int], bool] | None = None,
        supervise: bool = True,
    ) -> None:
        self._pool = pool
        self._config = config
        self._names = names
        self._clock = clock
        self._processes = processes or OsProcesses()
        self._http = http
        self._port_is_free = port_is_free or _port_is_free
        self._members: list[Member] = []
        self._failures_in_row = 0
        self._not_before_s = clock.monotonic_s()
        self._mutex = threading.RLock()
        self._stop = threading.Event()
        self._folder = StateFolder(config.state_dir)
        self._target = initial
        self._next_id = 0
        try:
            self._recall()
            if self._members:
                self.step()  # what serves already must not look as if it were starting
            self._reconcile()
        except BackendError:
            self._folder.close()
            raise
        self._thread: threading.Thread | None = None
        if supervise:
            self._thread = threading.Thread(target=self._supervise, name=f"local-{pool}", daemon=True)
            self._thread.start()

    @property
    def pool(self) -> str:
        """The pool's name."""
        return self._pool

    def observe(self) -> PoolObservation:
        """The target and all processes."""
        with self._mutex:
            now_s = self._clock.monotonic_s()
            replicas = tuple(
                Replica(item.replica_id, self._pool, item.url, item.phase, now_s - item.since_s, item.reason)
                for item in self._members
            )
            return PoolObservation(self._target, replicas)

    def set_target(self, num_replicas: int) -> None:
        """Start or drain at once; further steps are the supervisor's. What cannot be remembered changes nothing."""
        with self._mutex:
            before, self._target = self._target, num_replicas
            try:
                self._remember()
            except BackendError:
                self._target = before
                raise
            self._reconcile()

    def close(self) -> None:
        """Stop supervising and release the folder; processes go on."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * _PROBE_TIMEOUT_S)
        with self._mutex, contextlib.closing(self._folder), contextlib.suppress(BackendError):
            self._remember()  # where it fails, what was remembered last stays

    def kill_all(self) -> None:
        """End every process now, without drain: for tests and for taking a machine down."""
        with self._mutex:
            self._target = 0
            for item in self._members:
                self._processes.kill(item.process)
            self._members.clear()
            self._remember()

    # -- one pass ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """See who ended, who became ready, who has finished draining; then start or drain what is due.

        Servers are asked without holding the lock, so a slow one delays no decision.
        """
        with self._mutex:
            starting = [item for item in self._members if item.phase == "starting"]
            draining = [item for item in self._members if item.phase == "draining" and item.stopping_since_s is None]
        healthy = {item.replica_id for item in starting if self._is_healthy(item)}
        in_flight = {item.replica_id: self._in_flight(item) for item in draining}
        with self._mutex:
            for item in list(self._members):
                self._update(item, item.replica_id in healthy, in_flight)
            self._remember()  # first: where it fails, nothing is started or told to leave
            self._reconcile()
            self._remember()

    def _update(self, item: Member, healthy: bool, in_flight: dict[str, float | None]) -> None:
        now_s = self._clock.monotonic_s()
        age_s = now_s - item.since_s
        if item.phase == "failed":
            if age_s > self._config.keep_failed_s:
                self._members.remove(item)
            return
        code = self._processes.exit_code(item.process)
        if code is not None:
            self._ended(item, code)
        elif item.phase == "starting" and healthy:
            item.phase, item.since_s, item.reason = "ready", now_s, ""
        elif item.phase == "starting" and age_s > self._config.startup_timeout_s:
            self._processes.kill(item.process)
            self._fail(item, f"not ready after {age_s:.0f} s; killed")
        elif item.phase == "ready" and age_s > self._config.max_backoff_s:
            self._failures_in_row = 0
        elif item.phase == "draining":
            self._drain(item, in_flight.get(item.replica_id))

    def _drain(self, item: Member, in_flight: float | None) -> None:
        """SIGTERM when empty or out of patience, SIGKILL when that did not help."""
        now_s, config = self._clock.monotonic_s(), self._config
        if item.stopping_since_s is not None:
            if now_s - item.stopping_since_s > config.term_grace_s:
                self._processes.kill(item.process)
            return
        age_s = now_s - item.since_s
        item.reason = (
            "draining: requests in flight unknown" if in_flight is None else f"draining: {in_flight:g} in flight"
        )
        if (in_flight == 0 and age_s >= config.settle_s) or age_s >= config.drain_grace_s:
            self._processes.terminate(item.process)
            item.stopping_since_s = now_s

    def _ended(self, item: Member, code: int) -> None:
        self._processes.kill(item.process)  # helpers it may have left behind
        if item.phase == "draining":
            self._members.remove(item)
        else:
            self._fail(item, f"exit code {code}: {self._last_words(item)}")

    def _fail(self, item: Member, reason: str) -> None:
        now_s = self._clock.monotonic_s()
        item.phase, item.since_s, item.reason = "failed", now_s, reason
        self._failures_in_row += 1
        pause_s = min(self._config.backoff_s * 2.0 ** (self._failures_in_row - 1), self._config.max_backoff_s)
        self._not_before_s = max(self._not_before_s, now_s + pause_s)

    def _reconcile(self) -> None:
        active = [item for item in self._members if item.phase in ("starting", "ready")]
        surplus = len(active) - self._target
        for item in sorted(active, key=_leaves_first)[: max(surplus, 0)]:
            self._retire(item)
        if surplus < 0 and self._clock.monotonic_s() >= self._not_before_s:
            for _ in range(-surplus):
                self._start()

    def _retire(self, item: Member) -> None:
        """A starting replica has no work and ends at once; a ready one drains."""
        if item.phase == "starting":
            self._processes.kill(item.process)
            self._members.remove(item)
        else:
            item.phase, item.since_s = "draining", self._clock.monotonic_s()

    def _start(self) -> None:
        taken = {item.port for item in self._members if item.phase != "failed"}
        first, last = self._config.ports
        port = next((p for p in range(first, last + 1) if p not in taken and self._port_is_free(p)), None)
        if port is None:
            raise BackendError(f"no free port in {first}..{last} for pool '{self._pool}'", retryable=True)
        replica_id = f"{self._pool}-{self._next_id}"
        self._next_id += 1
        words = {"{port}": str(port), "{replica_id}": replica_id, "{pool}": self._pool}
        command = [_fill(word, words) for word in self._config.command]
        process = self._processes.start(command, self._config.env, self._folder.log_path(replica_id))
        self._members.append(Member(replica_id, port, process, "starting", self._clock.monotonic_s(), "starting"))
        try:
            self._remember()  # before anything else can happen: a process nobody remembers runs for ever
        except BackendError:
            self._processes.kill(process)
            self._members.pop()
            raise

    # -- asking servers ----------------------------------------------------------------------------------------------

    def _is_healthy(self, item: Member) -> bool:
        try:
            answer = self._http("GET", item.url + self._config.ready_path, timeout_s=_PROBE_TIMEOUT_S)
        except HttpError:
            return False
        if answer.status != 200 or self._processes.exit_code(item.process) is not None:
            return False
        pattern = self._config.ready_log
        said = "" if pattern is None else self._folder.log_text(item.replica_id, _READY_LOG_BYTES)
        return pattern is None or re.search(pattern, said) is not None

    def _in_flight(self, item: Member) -> float | None:
        """Requests inside the engine by its own count; None if it does not say."""
        try:
            answer = self._http("GET", item.url + self._names.metrics_path, timeout_s=_PROBE_TIMEOUT_S)
            sample = parse_exposition(answer.body.decode("utf-8", errors="replace"), self._names, 0.0)
        except (HttpError, ValueError):
            return None
        if answer.status != 200 or "running" not in sample.gauges:
            return None
        return sample.gauges["running"] + sample.gauges.get("waiting", 0.0)

    def _last_words(self, item: Member) -> str:
        lines = self._folder.log_text(item.replica_id, _LOG_TAIL_BYTES).strip().splitlines()
        return lines[-1][:200] if lines else "no output"

    # -- memory ------------------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        """Write down target and processes, if any were ever asked for: else the next controller begins with its own."""
        if self._target == self._next_id == 0:
            return
        kept = [item for item in self._members if item.phase != "failed"]
        self._folder.write(Memory(self._target, self._next_id, tuple(kept)))

    def _recall(self) -> None:
        """Take over what an earlier controller left: replicas that still run count as starting until they answer."""
        memory = self._folder.read(self._clock.monotonic_s())
        if memory is None:
            return
        self._target, self._next_id = memory.target, memory.next_id
        self._members = [item for item in memory.members if self._processes.exit_code(item.process) is None]

    def _supervise(self) -> None:
        while not self._stop.wait(self._config.poll_s):
            # No free port, no such program, a full disk, no file handles left: tried again at the next pass.
            with contextlib.suppress(BackendError, OSError):
                self.step()


def _leaves_first(item: Member) -> tuple[bool, float]:
    """Starting replicas before ready ones, the youngest of each first."""
    return (item.phase == "ready", -item.since_s)


def _fill(word: str, values: dict[str, str]) -> str:
    """Only our own placeholders are replaced: JSON arguments keep their braces."""
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
