"""Episodes, one or thousands: which policy meets which traffic, spread over processes.

Every episode is a function of its job alone, so it does not matter which process runs it. Workers are spawned, not
forked (Numba's and ONNX Runtime's threads do not survive a fork), and keep the traffic of the last few (scenario,
seed) pairs: jobs of one pair are handed out together. The simulator is compiled once per installation and cached on
disk; `EpisodePool` compiles it before it spawns, so that the workers do not all compile it.
"""

from __future__ import annotations

import inspect
import signal
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np

from rl_autoscale.agents.base import RegisteredPolicy
from rl_autoscale.agents.registry import make_policy, policy_class
from rl_autoscale.envs.scenario import Scenario
from rl_autoscale.fleet.errors import RlAutoscaleError, SpecError
from rl_autoscale.fleet.protocols import Policy, run_control_loop
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.sim.result import EpisodeResult
from rl_autoscale.workload.spec import TraceSource
from rl_autoscale.workload.store import TraceStore
from rl_autoscale.workload.trace import Workload

Split = Literal["train", "validation", "history", "test"]
Engine = Literal["compiled", "reference"]

JOBS_PER_BATCH = 6
_WORKLOADS_KEPT = 8
_WORKLOAD_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "class_index")


@dataclass(frozen=True, slots=True)
class EpisodeJob:
    """One episode to run.

    Attributes:
        identity: the caller's name for it.
        scenario: name of one of the pool's scenarios.
        split: whose traffic; training and validation also draw capacity error and start-up scale.
        seed: of traffic, start-ups and routing.
        policy: registered name.
        knobs: keyword arguments of the policy.
        span_s: cut the traffic to this length; None: all of it.
        engine: the compiled simulator, or the SimPy one that specifies it: the same numbers, thousands of times slower.
    """

    identity: str
    scenario: str
    split: Split
    seed: int
    policy: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    span_s: float | None = None
    engine: Engine = "compiled"


@dataclass(frozen=True, slots=True)
class EpisodeOutcome:
    """What came of a job: `EpisodeResult.summary()` and how long it took."""

    job: EpisodeJob
    metrics: dict[str, float]
    wall_s: float


def policy_for(name: str, knobs: Mapping[str, Any], workload: Workload) -> RegisteredPolicy:
    """Make a policy; one that needs the true future (the oracle) is given the workload's columns.

    Whole numbers become ints where the policy's default is one.
    """
    chosen = policy_class(name)
    given = {knob: _typed(chosen, knob, value) for knob, value in knobs.items()}
    for column in chosen.required_knob_names():
        if column in _WORKLOAD_COLUMNS:
            given[column] = getattr(workload, column)
    return make_policy(name, **given)


def check_policy(name: str, knobs: Mapping[str, Any]) -> None:
    """Refuse an unknown policy, knob or value now rather than in the middle of a benchmark."""
    one = np.ones(1)
    nothing = Workload(one, one.astype(np.int32), one.astype(np.int32), np.zeros(1, dtype=np.int16), ("none",), 2.0)
    policy_for(name, knobs, nothing)


def run_episode(
    scenario: Scenario,
    workload: Workload,
    policy: Policy,
    *,
    seed: int,
    speed: float = 1.0,
    startup_scale: float = 1.0,
    engine: Engine = "compiled",
) -> EpisodeResult:
    """One policy through one workload, with the scenario's shield.

    Args:
        scenario: gives fleet and shield.
        workload: the traffic.
        policy: who decides.
        seed: of start-ups, crashes and routing.
        speed: true iteration time over the profile's.
        startup_scale: true start-up time over the fleet's.
        engine: which simulator.
    """
    simulator = ReferenceFleet if engine == "reference" else SimFleet
    fleet = simulator(scenario.fleet, workload, seed=seed, speed=speed, startup_scale=startup_scale)
    run_control_loop(fleet, policy, scenario.shield)
    return fleet.result()


class EpisodeRunner:
    """Runs jobs in this process; keeps the workloads it built last."""

    def __init__(self, scenarios: Mapping[str, Scenario], store: TraceSource) -> None:
        self._scenarios = scenarios
        self._store = store
        self._workloads: OrderedDict[tuple[str, Split, int, float | None], Workload] = OrderedDict()

    def scenario(self, name: str) -> Scenario:
        """One of the scenarios."""
        return self._scenarios[name]

    def workload(self, job: EpisodeJob) -> Workload:
        """The traffic of a job."""
        key = (job.scenario, job.split, job.seed, job.span_s)
        if key not in self._workloads:
            scenario = self._scenarios[job.scenario]
            builds = {
                "train": scenario.build_train,
                "validation": scenario.build_validation,
                "history": scenario.build_history,
                "test": scenario.build_test,
            }
            self._workloads[key] = builds[job.split](job.seed, self._store, span_s=job.span_s).workload
            while len(self._workloads) > _WORKLOADS_KEPT:
                self._workloads.popitem(last=False)
        self._workloads.move_to_end(key)
        return self._workloads[key]

    def result(self, job: EpisodeJob) -> EpisodeResult:
        """Run one job and return everything, the timeline included."""
        scenario, workload = self._scenarios[job.scenario], self.workload(job)
        policy = policy_for(job.policy, job.knobs, workload)
        speed, startup_scale = (
            (1.0, 1.0)
            if job.split in ("history", "test")
            else scenario.draw_randomisation(job.seed, validation=job.split == "validation")
        )
        return run_episode(
            scenario, workload, policy, seed=job.seed, speed=speed, startup_scale=startup_scale, engine=job.engine
        )

    def outcome(self, job: EpisodeJob) -> EpisodeOutcome:
        """Run one job and return its scalars."""
        started_s = time.perf_counter()
        metrics = self.result(job).summary()
        return EpisodeOutcome(job, metrics, time.perf_counter() - started_s)


class Workers(Protocol):
    """Who runs batches of jobs at the same time: processes of this machine, or a cluster (ray_workers.py)."""

    def run(self, batches: Sequence[list[EpisodeJob]]) -> Iterator[list[EpisodeOutcome]]:
        """Run batches; each comes as it is done, in any order. Raises RlAutoscaleError: what a job raised."""
        ...

    def close(self) -> None:
        """Let go of them."""
        ...


class EpisodePool:
    """Runs jobs here or on workers; a context manager.

    A script that uses more than one process needs the usual ``if __name__ == "__main__":`` guard.

    Args:
        scenarios: by name; jobs refer to them.
        trace_folders: where to look for traces first. Nothing is downloaded here: fetch first.
        num_processes: 1 runs everything here.
        workers: run everything there instead; closed with the pool.
    """

    def __init__(
        self,
        scenarios: Mapping[str, Scenario],
        trace_folders: Sequence[Path] = (),
        num_processes: int = 1,
        workers: Workers | None = None,
    ) -> None:
        self._runner = EpisodeRunner(scenarios, TraceStore(trace_folders, download=False))
        self._local = workers is None
        self._alone = workers is None and num_processes == 1
        self._workers = workers or ProcessWorkers(scenarios, trace_folders, num_processes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()

    def run(self, jobs: Sequence[EpisodeJob]) -> Iterator[EpisodeOutcome]:
        """Run jobs; outcomes come as they are done, in any order.

        Raises:
            RlAutoscaleError: what a job raised; the rest is given up.
        """
        if self._alone or (self._local and len(jobs) == 1):
            for job in jobs:
                yield self._runner.outcome(job)
            return
        for outcomes in self._workers.run(batches(jobs)):
            yield from outcomes


class ProcessWorkers:
    """Processes of this machine, started with the first batch.

    Args:
        scenarios: by name; jobs refer to them.
        trace_folders: where to look for traces first.
        num_processes: how many.
    """

    def __init__(self, scenarios: Mapping[str, Scenario], trace_folders: Sequence[Path], num_processes: int) -> None:
        self._scenarios = dict(scenarios)
        self._folders = tuple(trace_folders)
        self._num_processes = num_processes
        self._executor: ProcessPoolExecutor | None = None

    def run(self, batches: Sequence[list[EpisodeJob]]) -> Iterator[list[EpisodeOutcome]]:
        """See `Workers`."""
        futures = [self._start().submit(_run_batch, batch) for batch in batches]
        try:
            for future in as_completed(futures):
                yield _outcomes(future)
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """See `Workers`."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _start(self) -> ProcessPoolExecutor:
        if self._executor is None:
            compile_simulator(next(iter(self._scenarios.values())))
            self._executor = ProcessPoolExecutor(
                self._num_processes,
                mp_context=get_context("spawn"),
                initializer=_initialise_worker,
                initargs=(self._scenarios, self._folders),
            )
        return self._executor


def batches(jobs: Sequence[EpisodeJob]) -> list[list[EpisodeJob]]:
    """Jobs in their order, cut so that a batch has one workload and at most `JOBS_PER_BATCH` jobs."""
    cut: list[list[EpisodeJob]] = []
    for job in jobs:
        last = cut[-1][0] if cut else None
        same = last is not None and (last.scenario, last.split, last.seed) == (job.scenario, job.split, job.seed)
        if not same or len(cut[-1]) == JOBS_PER_BATCH:
            cut.append([])
        cut[-1].append(job)
    return cut


def trace_names(scenario: Scenario) -> list[str]:
    """Names of the traces that a scenario's traffic is made of, training and test, each once."""
    workloads = [source.workload for source in scenario.train] + [scenario.test]
    return list(dict.fromkeys(item.trace for one in workloads for item in one.streams if item.trace is not None))


def compile_simulator(scenario: Scenario) -> None:
    """Compile the simulator, or load it from Numba's cache: a first run after installation takes a minute."""
    one = np.ones(1, dtype=np.int32)
    workload = Workload(np.zeros(1), one, one, np.zeros(1, dtype=np.int16), scenario.fleet.class_names, 1.0)
    SimFleet(scenario.fleet, workload).advance()


_worker: EpisodeRunner | None = None


def _initialise_worker(scenarios: dict[str, Scenario], folders: tuple[Path, ...]) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and shuts the pool down
    _worker = EpisodeRunner(scenarios, TraceStore(folders, download=False))


def _run_batch(jobs: list[EpisodeJob]) -> list[EpisodeOutcome] | str:
    """In a worker. Our own errors travel as text: some of them cannot be unpickled from their message."""
    assert _worker is not None
    return run_batch(_worker, jobs)


def run_batch(runner: EpisodeRunner, jobs: Sequence[EpisodeJob]) -> list[EpisodeOutcome] | str:
    """Outcomes of jobs, or the message of what one of them raised."""
    try:
        return [runner.outcome(job) for job in jobs]
    except RlAutoscaleError as error:
        return str(error)


def _outcomes(future: Future[list[EpisodeOutcome] | str]) -> list[EpisodeOutcome]:
    try:
        done = future.result()
    except BrokenProcessPool:
        raise SpecError(
            "a worker process died, most likely for want of memory; use fewer with --jobs (finished episodes are kept)"
        ) from None
    if isinstance(done, str):
        raise SpecError(done)
    return done


def is_whole(chosen: type[RegisteredPolicy], knob: str) -> bool:
    """Whether a policy's keyword argument is a whole number, told by its default."""
    parameter = inspect.signature(chosen).parameters.get(knob)
    return parameter is not None and type(parameter.default) is int


def _typed(chosen: type[RegisteredPolicy], knob: str, value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and is_whole(chosen, knob) else value
