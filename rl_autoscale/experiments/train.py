"""Training runs: scenarios, PPO, checkpoints, a learning curve, and the exported policy at the end.

<out>/config.yaml, run.json    what was asked, by which code
<out>/checkpoint/              to resume from; tensors and JSON
<out>/learning.jsonl           one line per rollout
<out>/policy/                  policy.onnx and policy.json: the result
<out>/verdict.json             of a policy that came of another: which of the two to run
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rl_autoscale.agents.envelope import Envelope
from rl_autoscale.agents.export import Layer, export_policy
from rl_autoscale.agents.policy_file import read_card
from rl_autoscale.agents.ppo import (
    TrainingProgress,
    build_ppo,
    load_checkpoint,
    policy_layers,
    train_ppo,
)
from rl_autoscale.envs.faults import TelemetryFaults
from rl_autoscale.envs.mdp import EpisodeSampler, FleetMdp
from rl_autoscale.envs.sampler import ScenarioSampler
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.adapting import VERDICT_FILE
from rl_autoscale.experiments.dial import measure_dial
from rl_autoscale.experiments.miss_forecast import learn_misses, play_policy
from rl_autoscale.experiments.offset_search import SearchProgress, search_offsets, with_offsets
from rl_autoscale.experiments.runs import describe_run, write_run
from rl_autoscale.experiments.tracking import Tracker
from rl_autoscale.experiments.train_config import (
    FaultConfig,
    TrainConfig,
    first_actor,
    origins,
    search_timesteps_before,
    timesteps_before,
)
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.spec import TraceSource

NO_DIAL = (
    "the dial was not measured, so attainment=... begins at the default price, and no miss forecast turns it: every "
    "training source holds a trace; add one made of generators"
)
NO_HORIZON = "no training traffic is as long as the miss forecast's horizon: there is no such forecast and no envelope"
TrainingReport = Callable[[TrainingProgress | SearchProgress | str], None]
"""Told how a training goes: numbers after each rollout, then words."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run left behind."""

    policy_folder: Path
    timesteps: int
    notes: tuple[str, ...]


def finished_policy(out: Path) -> Path | None:
    """The exported policy of a finished run, or None."""
    return out / "policy" if (out / "policy" / "policy.json").exists() else None


def check_training(config: TrainConfig, scenarios: Sequence[Scenario], out: Path, *, resume: bool = True) -> None:
    """Refuse a training that cannot begin, before it leaves anything behind.

    Raises:
        SpecError: nothing to train, scenarios of several schemas, fewer fleets than scenarios, a policy to start from
            of other sizes or in the folder that a fresh start empties, or a folder that holds a checkpoint of another
            configuration (a longer run of the same one is fine).
        PolicyFileError: the policy to start from cannot be read, or is of another schema.
    """
    if config.ppo.total_timesteps == 0 and not config.start_from:
        raise SpecError("total_timesteps=0 trains nothing; give more steps, or a policy to start_from")
    layouts = {", ".join(Schema.of(item.fleet).layout) for item in scenarios}
    if len(layouts) > 1:
        found = "; ".join(sorted(layouts))
        raise SpecError(f"one policy needs scenarios of one schema, got {len(layouts)}: {found}; train them apart")
    if config.ppo.num_fleets < len(scenarios):
        raise SpecError(
            f"num_fleets={config.ppo.num_fleets} is too few for {len(scenarios)} scenarios; raise it to one for each"
        )
    first_actor(config, scenarios)
    for name in () if resume else config.start_from:
        if Path(name).resolve().is_relative_to(out.resolve()):
            raise SpecError(f"start_from={name} lies in {out}, which a fresh start empties; use another --out")
    recorded = out / "config.yaml"
    if not resume or not recorded.exists() or not (out / "checkpoint" / "checkpoint.json").exists():
        return
    before = TrainConfig.from_yaml(recorded)
    longer = {"total_timesteps": config.ppo.total_timesteps}
    if before.model_copy(update={"ppo": before.ppo.model_copy(update=longer)}) != config:
        raise SpecError(
            f"{out} holds a checkpoint of another configuration; use --fresh to start anew or another --out"
        )


def train(
    config: TrainConfig,
    scenarios: Sequence[Scenario],
    store: TraceSource,
    out: Path,
    *,
    resume: bool = True,
    tracker: Tracker | None = None,
    report: TrainingReport | None = None,
) -> TrainingResult:
    """Train a policy, search its offsets, and export it.

    Args:
        config: what to train.
        scenarios: the resolved ``config.scenarios``.
        store: where their traces come from.
        out: the run's folder.
        resume: go on from the folder's checkpoint if there is one.
        tracker: gets every rollout's metrics.
        report: called after each rollout, and told what is done after the last; for progress bars.

    Raises:
        SpecError: see `check_training`; nothing has been written then.
    """
    check_training(config, scenarios, out, resume=resume)
    if not resume:
        _forget(out)
    write_run(out, config, describe_run(config.ppo.seed))
    learned = _learn(config, scenarios, store, out, resume, report, tracker)
    gc.collect()  # a training's model and fleets refer to each other; what follows needs the memory
    schema, described = Schema.of(scenarios[0].fleet), _describe(config, scenarios)
    layers, config, searched = _searched(learned.layers, config, scenarios, store, report)
    if report is not None:
        report("measuring its dial and what it misses ...")
    measured = measure(layers, config, scenarios, store)
    notes = measured.notes | learned.notes
    training = {
        **described,
        "timesteps": learned.num_timesteps + timesteps_before(config),
        "notes": sorted(notes),
        **searched,
    }
    _export(layers, schema, out / "policy", config, training, measured)
    return TrainingResult(out / "policy", learned.num_timesteps, tuple(sorted(notes)))


def _forget(out: Path) -> None:
    """Remove what an earlier training left: a new one that is cut off early would go on from it, or pass for finished.

    Raises:
        SpecError: it cannot be removed.
    """
    try:
        for name in ("policy/policy.json", "learning.jsonl", VERDICT_FILE):
            (out / name).unlink(missing_ok=True)
        if (out / "checkpoint").exists():
            shutil.rmtree(out / "checkpoint")
    except OSError as error:
        raise SpecError(f"{out}: what is there cannot be removed ({error}); use another --out") from None


class _Learned(NamedTuple):
    """What PPO leaves behind."""

    layers: list[Layer]
    num_timesteps: int
    notes: set[str]


def _learn(
    config: TrainConfig,
    scenarios: Sequence[Scenario],
    store: TraceSource,
    out: Path,
    resume: bool,
    report: TrainingReport | None,
    tracker: Tracker | None,
) -> _Learned:
    """Run PPO; its fleets are nobody's when this returns."""
    mdps, samplers = _build_mdps(config, scenarios, store)
    curve = (out / "learning.jsonl").open("a", encoding="utf-8")

    def on_rollout(progress: TrainingProgress) -> None:
        metrics = {
            "train/reward": progress.mean_reward,
            "train/cost_over_ideal": progress.cost_over_ideal,
            "train/slo_attainment": progress.slo_attainment,
            "train/steps_per_s": progress.steps_per_s,
            **progress.metrics,
        }
        curve.write(json.dumps({"timesteps": progress.timesteps, **metrics}) + "\n")
        curve.flush()
        if tracker is not None:
            tracker.log(metrics, progress.timesteps)
        if report is not None:
            report(progress)

    with curve:
        model = train_ppo(
            mdps,
            config.ppo,
            report=on_rollout,
            checkpoint_folder=out / "checkpoint",
            resume=resume,
            actor=first_actor(config, scenarios),
        )
    notes = {note for sampler in samplers for note in sampler.notes}
    return _Learned(policy_layers(model.policy), int(model.num_timesteps), notes)


def _searched(
    layers: list[Layer],
    config: TrainConfig,
    scenarios: Sequence[Scenario],
    store: TraceSource,
    report: TrainingReport | None,
) -> tuple[list[Layer], TrainConfig, dict[str, Any]]:
    """The network with the offsets found for it, the configuration with its constants, and what the card says."""
    if not config.offset_search.searches:
        return layers, config, {}

    as_deployed = partial(_training_mdp, _without_faults(config))
    found = search_offsets(
        *(layers, scenarios, store, as_deployed, config.constants, config.offset_search),
        seed=config.ppo.seed,
        progress=report,
    )
    schema = Schema.of(scenarios[0].fleet)
    layers = with_offsets(layers, found, schema.features.index("miss_price"))
    return layers, config.with_constants(found.constants), found.to_card(schema)


class _Measured(NamedTuple):
    """What is known of a policy once it was played."""

    dial: list[dict[str, float]]
    forecast: list[Layer] | None
    envelope: Envelope | None
    notes: set[str]


def measure(layers: list[Layer], config: TrainConfig, scenarios: Sequence[Scenario], store: TraceSource) -> _Measured:
    """A policy's dial and envelope, and its miss forecast where there is a dial to turn."""
    as_deployed = partial(_training_mdp, _without_faults(config))
    dial = measure_dial(layers, scenarios, store, as_deployed, config.miss_price, seed=config.ppo.seed)
    outcomes, notes = play_policy(
        layers, scenarios, store, partial(_training_mdp, config), config.miss_price,
        timesteps=config.ppo.total_timesteps + timesteps_before(config), seed=config.ppo.seed,
    )  # fmt: skip
    notes |= set() if dial else {NO_DIAL}
    if outcomes is None:
        return _Measured(dial, None, None, notes | {NO_HORIZON})
    envelope = Envelope.fit(outcomes.observation, Schema.of(scenarios[0].fleet).features)
    return _Measured(dial, learn_misses(outcomes, config.ppo.seed) if dial else None, envelope, notes)


def _describe(config: TrainConfig, scenarios: Sequence[Scenario]) -> dict[str, Any]:
    return {
        "scenarios": [scenario.name for scenario in scenarios],
        "algorithm": "PPO, stable-baselines3",
        "config": config.model_dump(mode="json"),
        "search_timesteps_before": search_timesteps_before(config),
        "started_from": origins(config),
    }


def _export(
    layers: list[Layer],
    schema: Schema,
    folder: Path,
    config: TrainConfig,
    training: dict[str, Any],
    measured: _Measured,
) -> Path:
    return export_policy(
        layers,
        schema,
        folder,
        refuse=config.ppo.refuse,
        training=training if measured.envelope is None else training | measured.envelope.to_card(),
        miss_price_range=config.miss_price,
        dial=measured.dial,
        forecast=measured.forecast,
        constants=config.constants,
    )


def _without_faults(config: TrainConfig) -> TrainConfig:
    return config.model_copy(update={"faults": FaultConfig()})


def _training_mdp(config: TrainConfig, scenario: Scenario, sampler: EpisodeSampler, num_fleets: int) -> FleetMdp:
    return FleetMdp(
        scenario.fleet,
        scenario.shield,
        sampler,
        num_fleets=num_fleets,
        num_threads=config.ppo.num_threads,
        refuse=config.ppo.refuse,
        constants=config.constants,
        faults=TelemetryFaults(**config.faults.model_dump()) if config.faults != FaultConfig() else None,
    )


def _build_mdps(
    config: TrainConfig, scenarios: Sequence[Scenario], store: TraceSource
) -> tuple[list[FleetMdp], list[ScenarioSampler]]:
    """One MDP per scenario; the fleets are shared out evenly, the first scenarios get what is left over."""
    share, left_over = divmod(config.ppo.num_fleets, len(scenarios))
    samplers = [ScenarioSampler(item, store, config.miss_price, config.num_workloads) for item in scenarios]
    mdps = [
        _training_mdp(config, scenario, sampler, share + (k < left_over))
        for k, (scenario, sampler) in enumerate(zip(scenarios, samplers, strict=True))
    ]
    return mdps, samplers


def export_checkpoint(run: Path, out: Path, store: TraceSource) -> Path:
    """Export the checkpoint of a training run, finished or not.

    Args:
        run: the training run's folder.
        out: where the policy goes.
        store: where the scenarios' traces come from; its dial is measured on them.

    Returns:
        The card's path.

    Raises:
        SpecError: the folder is no training run.
        PolicyFileError: its checkpoint is damaged.
    """
    if not (run / "checkpoint" / "checkpoint.pt").exists():
        raise SpecError(f"{run}: holds no checkpoint; give the folder of an 'rl-autoscale train' run")
    config = TrainConfig.from_yaml(run / "config.yaml")
    scenarios = [load_scenario(name) for name in config.scenarios]
    mdps, _ = _build_mdps(config, scenarios, store)
    model = build_ppo(mdps, config.ppo)
    timesteps = load_checkpoint(model, run / "checkpoint")
    # A checkpoint alone does not know what stood in for missing traces; a finished run's card does.
    known = {} if (finished := finished_policy(run)) is None else read_card(finished)["training"]
    described = _describe(config, scenarios)
    layers, config, searched = _searched(policy_layers(model.policy), config, scenarios, store, None)
    measured = measure(layers, config, scenarios, store)
    training = {**known, **described, "timesteps": timesteps + timesteps_before(config), **searched}
    return _export(layers, Schema.of(scenarios[0].fleet), out, config, training, measured)
