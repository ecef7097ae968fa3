"""Episodes and trainings on a Ray cluster: everything travels with them, so a node needs nothing but the package.

Traces, profiles and exported policies are sent along, whatever lies on a node's disk. A node that has another version
of the code says so instead of answering: an episode is a function of its job, so a cluster gives the same rows as one
process, in another order.

Ray trusts everybody who can reach its ports and, started plainly, listens on every address; see docs/benchmark.md.
"""

from __future__ import annotations

import importlib
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl_autoscale.agents.pretrained import policy_folder
from rl_autoscale.envs.scenario import Scenario
from rl_autoscale.experiments.episodes import EpisodeJob, EpisodeOutcome, EpisodeRunner, run_batch, trace_names
from rl_autoscale.experiments.runs import code_fingerprint
from rl_autoscale.fleet.errors import MissingExtraError, SpecError
from rl_autoscale.workload.spec import TraceSource
from rl_autoscale.workload.store import LoadedTrace

LOCAL = "local"
_POLICY_FILES = ("policy.json", "policy.onnx")

Files = dict[str, bytes]
"""Content by path relative to a folder."""


class RayCluster:
    """A connection to a cluster; a context manager.

    Args:
        address: as `ray.init` takes it (``auto``, ``host:port``, ``ray://host:port``), or ``local``: a cluster of this
            machine's cores that ends with the connection.
        ray: the library; given by tests.

    Raises:
        MissingExtraError: Ray is not installed.
        SpecError: nothing answers there.
    """

    def __init__(self, address: str, ray: Any = None) -> None:
        try:
            self.ray = ray or importlib.import_module("ray")
        except ImportError:
            raise MissingExtraError("running on a Ray cluster", "ray") from None
        started = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address == LOCAL else {}
        try:
            self.ray.init(address=None if address == LOCAL else address, log_to_driver=False, **started)
        except Exception as error:  # Ray raises whatever its parts raise, a bare Exception among them
            self.ray.shutdown()  # what it had started of a local cluster
            reason = " ".join(str(error).split())[:200]
            raise SpecError(
                f"--ray {address}: no cluster there ({reason}); start one with 'ray start --head', or give --ray local"
            ) from None

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.ray.shutdown()

    @property
    def num_cpus(self) -> int:
        """Cores of the cluster, at least 1."""
        return max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    def map(self, function: Callable[..., Any], calls: Mapping[Any, tuple[Any, ...]], num_cpus: int) -> Iterator[Any]:
        """Call a function once for each key, in any order; gives (key, result) pairs.

        Args:
            function: of a module that every node has.
            calls: its arguments by key.
            num_cpus: cores that one call takes.
        """
        remote = self.ray.remote(num_cpus=num_cpus)(function)
        pending = {remote.remote(*arguments): key for key, arguments in calls.items()}
        while pending:
            done = self.ray.wait(list(pending), num_returns=1)[0][0]
            yield pending.pop(done), self.ray.get(done)


class RayWorkers:
    """Episodes on a cluster, one worker per core; satisfies `episodes.Workers`.

    Args:
        cluster: connected; stays connected when the workers are closed.
        scenarios: by name; jobs refer to them.
        store: where this machine finds their traces.
    """

    def __init__(self, cluster: RayCluster, scenarios: Mapping[str, Scenario], store: TraceSource) -> None:
        self._ray = cluster.ray
        for scenario in scenarios.values():
            _ = [pool.hardware for pool in scenario.fleet.pools]  # a profile's file is read here, and travels along
        everything = self._ray.put((dict(scenarios), SentTraces.of(scenarios.values(), store), code_fingerprint()))
        worker = self._ray.remote(num_cpus=1)(RemoteRunner)
        self._actors = [worker.remote(everything) for _ in range(cluster.num_cpus)]

    def run(self, batches: Sequence[list[EpisodeJob]]) -> Iterator[list[EpisodeOutcome]]:
        """See `episodes.Workers`."""
        policies = self._ray.put(policy_files(batches))
        waiting, idle = deque(batches), list(self._actors)
        busy: dict[Any, Any] = {}
        while waiting or busy:
            while waiting and idle:
                actor = idle.pop()
                busy[actor.run.remote(waiting.popleft(), policies)] = actor
            done = self._ray.wait(list(busy), num_returns=1)[0][0]
            idle.append(busy.pop(done))
            outcomes = self._ray.get(done)
            if isinstance(outcomes, str):
                raise SpecError(outcomes)
            yield outcomes

    def close(self) -> None:
        """See `episodes.Workers`."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []


@dataclass(frozen=True, slots=True)
class SentTraces:
    """Traces as this machine found them, for machines that have none; satisfies `TraceSource`."""

    traces: dict[str, LoadedTrace]

    @staticmethod
    def of(scenarios: Iterable[Scenario], store: TraceSource) -> SentTraces:
        """The traces of some scenarios."""
        names = dict.fromkeys(name for scenario in scenarios for name in trace_names(scenario))
        return SentTraces({name: store.load_or_stand_in(name) for name in names})

    def load_or_stand_in(self, name: str) -> LoadedTrace:
        """The trace that was sent."""
        return self.traces[name]


class RemoteRunner:
    """What runs in a worker of the cluster.

    Args:
        everything: scenarios by name, their traces, and the fingerprint of the code that sent them.
    """

    def __init__(self, everything: tuple[dict[str, Scenario], SentTraces, str]) -> None:
        scenarios, traces, self._code = everything
        self._runner = EpisodeRunner(scenarios, traces)
        self._folder = Path(tempfile.mkdtemp(prefix="rl-autoscale-"))

    def run(self, jobs: list[EpisodeJob], policies: Mapping[str, Files]) -> list[EpisodeOutcome] | str:
        """Outcomes of jobs, or why there are none."""
        if (problem := other_code(self._code)) is not None:
            return problem
        outcomes = run_batch(self._runner, [self._with_policy_here(job, policies) for job in jobs])
        if isinstance(outcomes, str):
            return outcomes
        return [replace(outcome, job=job) for outcome, job in zip(outcomes, jobs, strict=True)]

    def _with_policy_here(self, job: EpisodeJob, policies: Mapping[str, Files]) -> EpisodeJob:
        path = str(job.knobs.get("path", ""))
        if path not in policies:
            return job
        folder = self._folder / str(list(policies).index(path))
        write_files(folder, policies[path])
        return replace(job, knobs={**job.knobs, "path": str(folder)})


def policy_files(batches: Sequence[Sequence[EpisodeJob]]) -> dict[str, Files]:
    """The exported policies that jobs name, by path."""
    paths = dict.fromkeys(str(job.knobs["path"]) for batch in batches for job in batch if "path" in job.knobs)
    found = {}
    for path in paths:
        folder = policy_folder(path)
        folder = folder if folder.is_dir() else folder.parent
        found[path] = {name: (folder / name).read_bytes() for name in _POLICY_FILES}
    return found


def write_files(folder: Path, files: Files) -> None:
    """Write files that came from elsewhere below a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def other_code(expected: str) -> str | None:
    """What to say when this node's code is not the sender's; None when it is."""
    found = code_fingerprint()
    if found == expected:
        return None
    return (
        f"a node of the cluster has another version of rl_autoscale (code {found}, here {expected}); "
        "install the same one on every node"
    )
