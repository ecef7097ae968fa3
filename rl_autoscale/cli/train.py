"""``rl-autoscale train``: PPO on a scenario."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rl_autoscale.fleet.errors import MissingExtraError

stderr = Console(stderr=True)


class TrainingBar:
    """A progress bar fed by training reports; a context manager. Writes to stderr."""

    def __init__(self, total_timesteps: int) -> None:
        self._progress = Progress(
            TextColumn("training PPO"),
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

    def __call__(self, progress: Any) -> None:
        """Show one `TrainingProgress`."""
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
    config: Annotated[Path | None, typer.Option(help="YAML with scenarios, ppo, miss_price, faults.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/train"),
    timesteps: Annotated[int | None, typer.Option(min=1, help="Environment steps in total, over all fleets.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the run.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that simulate.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore a checkpoint in the folder.")] = False,
    track: Annotated[str, typer.Option(help="tensorboard, wandb or none.")] = "tensorboard",
    traces: Annotated[list[Path] | None, typer.Option("--traces", help="Folder of traces, looked at first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train PPO on a scenario and export the policy.

    A second call with the same folder goes on where the first stopped. The result is <out>/policy (ONNX and JSON),
    ready for 'rl-autoscale evaluate --policy <out>/policy'.

    Examples:
        rl-autoscale train --scenario bursty --timesteps 200000 --out runs/bursty

        rl-autoscale train --scenario bursty --scenario azure-code --scenario diurnal --out runs/three

        WANDB_MODE=offline rl-autoscale train --scenario chiron --track wandb
    """
    require_training()
    from rl_autoscale.envs.scenario import load_scenario
    from rl_autoscale.experiments.tracking import make_tracker
    from rl_autoscale.experiments.train import TrainConfig, check_training, train
    from rl_autoscale.workload.store import TraceStore

    chosen = TrainConfig.from_yaml(config) if config is not None else TrainConfig()
    changes: dict[str, int] = {
        key: value
        for key, value in (("total_timesteps", timesteps), ("seed", seed), ("num_threads", threads))
        if value is not None
    }
    chosen = chosen.model_copy(
        update={"scenarios": tuple(scenario or chosen.scenarios), "ppo": chosen.ppo.model_copy(update=changes)}
    )
    resolved = [load_scenario(name) for name in chosen.scenarios]
    check_training(chosen, resolved, out, resume=not fresh)  # before the tracker makes the folder
    store = TraceStore(traces or [])
    with (
        make_tracker(track, out, chosen.model_dump(mode="json")) as tracker,
        TrainingBar(chosen.ppo.total_timesteps) as bar,
    ):
        result = train(chosen, resolved, store, out, resume=not fresh, tracker=tracker, report=bar)
    for note in result.notes:
        stderr.print(f"note: {note}")
    if as_json:
        print(json.dumps({"policy": str(result.policy_folder), "timesteps": result.timesteps}))
    else:
        print(f"trained {result.timesteps:,} steps; policy in {result.policy_folder}")
