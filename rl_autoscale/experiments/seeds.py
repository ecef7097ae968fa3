"""Several seeds of one training, each in a sub-folder of its own: one run says what happened, five what to expect.

<out>/seed-K/         a training with ``ppo.seed`` K, as `train` leaves it; finished ones are not run again
<out>/mean/           the mean of their policies, where it was asked for
<out>/learning.png    learning curves with intervals over seeds
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from rl_autoscale.agents.policy_file import read_card
from rl_autoscale.envs.scenario import Scenario
from rl_autoscale.experiments.ray_workers import Files, RayCluster, SentTraces, other_code, write_files
from rl_autoscale.experiments.runs import code_fingerprint
from rl_autoscale.experiments.tracking import Tracker
from rl_autoscale.experiments.train import (
    TrainingReport,
    TrainingResult,
    check_training,
    finished_policy,
    train,
)
from rl_autoscale.experiments.train_config import TrainConfig, averaging, origins, timesteps_before
from rl_autoscale.fleet.errors import RlAutoscaleError, SpecError
from rl_autoscale.workload.store import TraceStore

Watch = Callable[[int, Path, TrainConfig], AbstractContextManager[tuple[Tracker, TrainingReport]]]
"""Called with a seed, its folder and its configuration; gives a tracker and a progress report while it trains."""


def seed_folder(out: Path, seed: int) -> Path:
    """Where one seed's training lies."""
    return out / f"seed-{seed}"


def seed_configs(config: TrainConfig, num_seeds: int) -> dict[int, TrainConfig]:
    """One configuration per seed: ``config.ppo.seed`` and those that follow."""
    first = config.ppo.seed
    return {
        seed: config.model_copy(update={"ppo": config.ppo.model_copy(update={"seed": seed})})
        for seed in range(first, first + num_seeds)
    }


def finished_seed(config: TrainConfig, folder: Path) -> TrainingResult | None:
    """What a finished training of exactly this configuration left behind, or None."""
    policy = finished_policy(folder)
    if policy is None or TrainConfig.from_yaml(folder / "config.yaml") != config:
        return None
    training = read_card(policy)["training"]
    timesteps = int(training["timesteps"]) - timesteps_before(config)
    if timesteps < config.ppo.total_timesteps:  # of a shorter training that was to go on
        return None
    return TrainingResult(policy, timesteps, tuple(training.get("notes", ())))


def train_seeds(
    config: TrainConfig,
    scenarios: Sequence[Scenario],
    store: TraceStore,
    out: Path,
    num_seeds: int,
    *,
    resume: bool = True,
    watch: Watch,
) -> dict[int, TrainingResult]:
    """Train seeds one after the other; an interrupted call goes on with the seed it was at.

    Args:
        config: of the first seed; the others differ in ``ppo.seed`` only.
        scenarios: the resolved ``config.scenarios``.
        store: where their traces come from.
        out: the seeds' folders lie here.
        num_seeds: how many.
        resume: keep what is finished, go on from checkpoints.
        watch: opens what follows each training.

    Raises:
        SpecError: a folder holds a checkpoint of another configuration.
    """
    configs = seed_configs(config, num_seeds)
    for seed, one in configs.items():
        check_training(one, scenarios, seed_folder(out, seed), resume=resume)
    results = {}
    for seed, one in configs.items():
        folder = seed_folder(out, seed)
        known = finished_seed(one, folder) if resume else None
        if known is None:
            with watch(seed, folder, one) as (tracker, report):
                known = train(one, scenarios, store, folder, resume=resume, tracker=tracker, report=report)
        results[seed] = known
    return results


def average_seeds(
    config: TrainConfig,
    scenarios: Sequence[Scenario],
    store: TraceStore,
    out: Path,
    results: Mapping[int, TrainingResult],
    *,
    resume: bool = True,
    report: TrainingReport | None = None,
) -> TrainingResult:
    """The mean of the seeds' policies, its offsets searched and its dial measured as those of a trained policy.

    Args:
        config: of the training, with the search that the mean is to have.
        scenarios: the resolved ``config.scenarios``.
        store: where their traces come from.
        out: the seeds' folders lie here, and what is exported in ``mean``.
        results: of the seeds.
        resume: keep what is finished, unless a seed has another policy since.
        report: told what is done.
    """
    averaged = averaging(config, [str(result.policy_folder) for result in results.values()])
    folder = out / "mean"
    known = finished_seed(averaged, folder) if resume else None
    if known is not None and read_card(known.policy_folder)["training"]["started_from"] == origins(averaged):
        return known
    return train(averaged, scenarios, store, folder, resume=False, report=report)


def train_seeds_on_ray(
    cluster: RayCluster,
    config: TrainConfig,
    scenarios: Sequence[Scenario],
    store: TraceStore,
    out: Path,
    num_seeds: int,
    *,
    resume: bool = True,
    done: Callable[[int], None] | None = None,
) -> dict[int, TrainingResult]:
    """The same on a cluster, all seeds at once; what each leaves behind is brought into its folder here.

    A seed that was interrupted begins anew: its checkpoints stay on its node.

    Args:
        cluster: connected.
        config: of the first seed; a seed takes as many cores as its ``ppo.num_threads``.
        scenarios: the resolved ``config.scenarios``.
        store: where this machine finds their traces; they are sent along.
        out: the seeds' folders lie here.
        num_seeds: how many.
        resume: keep what is finished.
        done: told each seed that has come back.

    Raises:
        SpecError: a training that cannot begin, or a node with other code.
    """
    configs = seed_configs(config, num_seeds)
    check_training(config, scenarios, out / "nothing", resume=False)
    missing = {
        seed: one for seed, one in configs.items() if not resume or finished_seed(one, seed_folder(out, seed)) is None
    }
    traces = SentTraces.of(scenarios, store)
    calls = {seed: (one, list(scenarios), traces, code_fingerprint()) for seed, one in missing.items()}
    for seed, files in cluster.map(train_elsewhere, calls, config.ppo.num_threads):
        if isinstance(files, str):
            raise SpecError(files)
        write_files(seed_folder(out, seed), files)
        if done is not None:
            done(seed)
    results = {seed: finished_seed(one, seed_folder(out, seed)) for seed, one in configs.items()}
    return {seed: result for seed, result in results.items() if result is not None}


def train_elsewhere(config: TrainConfig, scenarios: list[Scenario], traces: SentTraces, code: str) -> Files | str:
    """On a node: train in a temporary folder; its files, or why there are none."""
    if (problem := other_code(code)) is not None:
        return problem
    with tempfile.TemporaryDirectory(prefix="rl-autoscale-") as folder:
        try:
            train(config, scenarios, traces, Path(folder))
        except RlAutoscaleError as error:
            return str(error)
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
