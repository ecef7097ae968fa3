"""``rl-autoscale train``: PPO on a scenario."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rl_autoscale.fleet.errors import MissingExtraError, SpecError

if TYPE_CHECKING:
    from rl_autoscale.agents.ppo import TrainingProgress
    from rl_autoscale.envs.scenario import Scenario
    from rl_autoscale.experiments.offset_search import SearchProgress
    from rl_autoscale.experiments.train_config import TrainConfig

stderr = Console(stderr=True)


class TrainingBar:
    """A progress bar fed by training reports; a context manager. Writes to stderr."""

    def __init__(self, total_timesteps: int, title: str = "training PPO") -> None:
        self._total = total_timesteps
        self._progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=stderr,
        )
        self._task = self._progress.add_task("train", total=total_timesteps, status="compiling the simulator ...")

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, progress: TrainingProgress | SearchProgress | str) -> None:
        """Show how far the training or the search is, or what is done after them."""
        from rl_autoscale.experiments.offset_search import SearchProgress

        if isinstance(progress, str):
            self._progress.update(self._task, completed=self._total, status=progress)
            return
        if isinstance(progress, SearchProgress):
            self._total = progress.most_runs
            status = "runs at most of the search of constants and offsets"
            self._progress.update(self._task, total=self._total, completed=progress.runs, status=status)
            return
        status = (
            f"{progress.steps_per_s:,.0f} steps/s  cost {progress.cost_over_ideal:.2f} x ideal  "
            f"attainment {progress.slo_attainment:.1%}"
        )
        self._progress.update(self._task, completed=progress.timesteps, status=status)


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_training() -> None:
    """Fail with advice before anything else happens when the ``train`` extra is missing."""
    if any(find_spec(name) is None for name in ("onnx", "stable_baselines3", "torch")):
        raise MissingExtraError("training", "train")


def command(
    scenario: Annotated[
        list[str] | None,
        typer.Option(help="A shipped scenario's name or a path ending in .yaml; may be repeated: one policy for all."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML with scenarios, ppo, miss_price, faults; or a policy's folder or pretrained/NAME: as its card "
            "says that it was trained."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/train"),
    timesteps: Annotated[
        int | None,
        typer.Option(min=0, help="Environment steps, over all fleets; 0 with --start-from: the search alone."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the run.")] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Train so many seeds, from --seed on, into OUT/seed-K; draws learning curves.")
    ] = 1,
    mean: Annotated[
        bool,
        typer.Option(
            "--mean", help="With --seeds: search offsets not for each seed but for the mean of all, in OUT/mean."
        ),
    ] = False,
    start_from: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapt an exported policy: its folder, or pretrained/NAME. Keeps its layers and prices, "
            "and only searches constants and offsets unless told --timesteps to train for, too. May be "
            "repeated: from the mean of several."
        ),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Train the seeds on a Ray cluster: auto, HOST:PORT, or local for this machine.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that simulate.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore a checkpoint in the folder.")] = False,
    track: Annotated[str, typer.Option(help="tensorboard, wandb (docs/tracking.md) or none.")] = "tensorboard",
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train PPO on a scenario and export the policy.

    A second call with the same folder goes on where the first stopped. The result is <out>/policy (ONNX and JSON),
    ready for 'rl-autoscale evaluate --policy <out>/policy'. With --start-from it is played beside the policy that it
    came of, on validation traffic and on the fleet's own past, and the last line says which of the two to run.

    Examples:
        rl-autoscale train --scenario bursty --timesteps 200000 --out runs/bursty

        rl-autoscale train --scenario bursty --scenario azure-code --scenario diurnal --out runs/three

        rl-autoscale train --scenario bursty --seeds 5 --mean --out runs/five

        rl-autoscale train --config pretrained/single-pool --out runs/again

        rl-autoscale train --scenario mine.yaml --start-from pretrained/single-pool --out runs/mine

        WANDB_MODE=offline rl-autoscale train --scenario chiron --track wandb
    """
    require_training()
    from rl_autoscale.envs.scenario import load_scenario
    from rl_autoscale.experiments.adapting import VERDICT_FILE, judge_adapted
    from rl_autoscale.experiments.runs import write_text
    from rl_autoscale.experiments.showings import policy_showing, training_job
    from rl_autoscale.experiments.tracking import check_tracker, make_tracker
    from rl_autoscale.experiments.train import check_training, train
    from rl_autoscale.experiments.train_config import TrainConfig, read_training, train_on, with_what_it_starts_from
    from rl_autoscale.workload.store import TraceStore

    chosen = read_training(config) if config is not None else TrainConfig()
    changes: dict[str, int] = {
        key: value
        for key, value in (("total_timesteps", timesteps), ("seed", seed), ("num_threads", threads))
        if value is not None
    }
    chosen = chosen.model_copy(
        update={"scenarios": tuple(scenario or chosen.scenarios), "ppo": chosen.ppo.model_copy(update=changes)}
    )
    chosen = train_on(chosen, start_from) if start_from else with_what_it_starts_from(chosen)
    resolved = [load_scenario(name) for name in chosen.scenarios]
    check_tracker(track)
    if ray is not None and track == "wandb":
        stderr.print(
            f"note: seeds on Ray are not tracked while they run; 'rl-autoscale report {out} --track wandb' after"
        )
    if ray is not None and seeds == 1:
        raise SpecError("--ray trains several seeds at once; say how many with --seeds")
    if seeds > 1 and chosen.ppo.total_timesteps == 0:
        raise SpecError("--seeds trains several times, and there is nothing to train; say how long with --timesteps")
    if mean and seeds == 1:
        raise SpecError("--mean is of several seeds; say how many with --seeds")
    if seeds > 1:
        _train_seeds(
            *(chosen, resolved, out, seeds, track, traces or []), mean=mean, ray=ray, fresh=fresh, as_json=as_json
        )
        return
    check_training(chosen, resolved, out, resume=not fresh)  # before the tracker makes the folder
    store = TraceStore(traces or [])
    with (
        make_tracker(track, out, training_job(chosen)) as tracker,
        TrainingBar(chosen.ppo.total_timesteps, "training PPO" if chosen.ppo.total_timesteps else "searching") as bar,
    ):
        result = train(chosen, resolved, store, out, resume=not fresh, tracker=tracker, report=bar)
        tracker.show(policy_showing(result.policy_folder))
        start = chosen.start_from[0] if chosen.start_from else None
        verdict = None if start is None else judge_adapted(result.policy_folder, start, resolved, store, report=bar)
    told = set(result.notes) if verdict is None else set(result.notes) | verdict.notes
    for note in sorted(told):
        stderr.print(f"note: {note}")
    if verdict is not None:
        write_text(out / VERDICT_FILE, json.dumps(verdict.to_dict(), indent=2) + "\n")
    if as_json:
        judged = {} if verdict is None else {"verdict": verdict.to_dict()}
        print(json.dumps({"policy": str(result.policy_folder), "timesteps": result.timesteps, **judged}))
        return
    done = f"trained {result.timesteps:,} steps" if chosen.ppo.total_timesteps else "searched"
    print(f"{done}; policy in {result.policy_folder}")
    if verdict is not None:
        print(verdict.in_words())


def _train_seeds(
    config: TrainConfig,
    scenarios: list[Scenario],
    out: Path,
    num_seeds: int,
    track: str,
    traces: list[Path],
    *,
    mean: bool,
    ray: str | None,
    fresh: bool,
    as_json: bool,
) -> None:
    """Train every seed, draw their learning curves, and export their mean if it is wanted."""
    from rl_autoscale.experiments.learning_curves import curve_table, write_curves
    from rl_autoscale.experiments.offset_search import OffsetSearchConfig
    from rl_autoscale.experiments.ray_workers import RayCluster
    from rl_autoscale.experiments.report import rich_table
    from rl_autoscale.experiments.seeds import average_seeds, train_seeds, train_seeds_on_ray
    from rl_autoscale.experiments.showings import policy_showing, training_job
    from rl_autoscale.experiments.tracking import make_tracker
    from rl_autoscale.workload.store import TraceStore

    @contextmanager
    def watch(seed: int, folder: Path, one: TrainConfig) -> Iterator[Any]:
        title = f"training PPO, seed {seed}"
        with (
            make_tracker(track, folder, training_job(one, folder)) as tracker,
            TrainingBar(one.ppo.total_timesteps, title) as bar,
        ):
            yield tracker, bar
            tracker.show(policy_showing(folder / "policy"))

    store = TraceStore(traces)
    each = config.model_copy(update={"offset_search": OffsetSearchConfig(rounds=0)}) if mean else config
    if ray is None:
        results = train_seeds(each, scenarios, store, out, num_seeds, resume=not fresh, watch=watch)
    else:
        with RayCluster(ray) as cluster:
            results = train_seeds_on_ray(
                *(cluster, each, scenarios, store, out, num_seeds),
                resume=not fresh,
                done=lambda seed: stderr.print(f"seed {seed} is trained"),
            )
    for note in sorted({note for result in results.values() for note in result.notes}):
        stderr.print(f"note: {note}")
    averaged = None
    if mean:
        with TrainingBar(0, "the mean of the seeds") as bar:
            averaged = average_seeds(config, scenarios, store, out, results, resume=not fresh, report=bar)
    curves, paths = write_curves(out)
    if as_json:
        trained = {str(seed): str(result.policy_folder) for seed, result in results.items()}
        known = {"mean": str(averaged.policy_folder)} if averaged is not None else {}
        print(json.dumps({"policies": trained, **known, "curves": [str(path) for path in paths]}))
        return
    Console().print(rich_table(curve_table(curves)))
    print(f"trained {num_seeds} seeds; policies in {out}/seed-*/policy, learning curves in {paths[0]}")
    if averaged is not None:
        print(f"their mean is in {averaged.policy_folder}")
