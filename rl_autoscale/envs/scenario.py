"""A scenario: a fleet, its limits, the traffic a policy may be trained and tuned on, and the traffic it is judged on.

    name: azure-conversation
    description: the card, in sentences; printed by ``scenario show`` and in every report
    fleet: {...}                    # fleet/spec.py: FleetSpec
    shield: {...}                   # fleet/spec.py: ShieldSpec
    episode_s: 1200                 # length of a training episode
    train:                          # one source is drawn per episode, by weight
      - {name: trace, weight: 1, workload: {streams: [...]}}
    test: {streams: [...]}          # held out: nothing is ever tuned on it
    train_randomisation: {speed: {low: 0.8, high: 1.25}, startup_scale: {low: 0.5, high: 2}}

The seed of a build decides everything random in it. Training, validation, history and test draw from differently named
streams, so test seed 3 shares nothing with training seed 3. Validation traffic, for choosing between policies or
checkpoints, comes from the training sources that hold no trace: a trace's seconds are for training or for the test only
(experiments/split.yaml lists who gets what). History is what somebody who runs this very fleet has on record when the
test begins: other draws of the test's generators, of a rate curve from any place of it on (it goes round), and of a
trace the seconds before the test's. A setting may be chosen on it, by every policy alike (experiments/choice.py), and
whoever says so searches on it: rules' constants (experiments/tuning.py) and what a policy is adapted by.
"""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field, PositiveFloat, model_validator

from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.fleet.rng import stream
from rl_autoscale.fleet.spec import FleetSpec, ShieldSpec
from rl_autoscale.workload.generators import RateCurveSpec
from rl_autoscale.workload.ranges import Positive, Range, fixed
from rl_autoscale.workload.spec import BuiltWorkload, TraceSource, WorkloadSpec

_TRAIN_STREAM = "workload/train"
_VALIDATION_STREAM = "workload/validation"
_HISTORY_STREAM = "workload/history"
_TEST_STREAM = "workload/test"
_RANDOMISATION_STREAM = "train-randomisation"
_VALIDATION_RANDOMISATION_STREAM = "validation-randomisation"


class TrainingSource(Config):
    """One kind of training traffic."""

    name: str = Field(min_length=1, description="what reports call it")
    weight: PositiveFloat = Field(default=1.0, description="relative frequency among the training episodes")
    workload: WorkloadSpec


class TrainRandomisation(Config):
    """What else differs between training episodes, drawn once per episode and unknown to the policy."""

    speed: Positive = Field(default=fixed(1.0), description="true iteration time over the profile's")
    startup_scale: Positive = Field(default=fixed(1.0), description="true start-up time over the fleet's")


class Scenario(Config):
    """Everything an experiment needs but the policy."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="lower case, digits, dots and dashes")
    description: str = Field(min_length=1, description="the card: what it models, how it is scaled, what it leaves out")
    fleet: FleetSpec
    shield: ShieldSpec = ShieldSpec()
    train: tuple[TrainingSource, ...] = Field(min_length=1, description="traffic that may be trained and tuned on")
    test: WorkloadSpec
    episode_s: PositiveFloat = Field(default=1200.0, description="length of a training episode")
    train_randomisation: TrainRandomisation = TrainRandomisation()

    @model_validator(mode="after")
    def _check(self) -> Scenario:
        names = [source.name for source in self.train]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"names of training sources must differ; repeated: {', '.join(repeated)}")
        if self.episode_s < self.fleet.control_interval_s:
            raise ValueError(
                f"episode_s={self.episode_s:g} is shorter than one control interval of "
                f"{self.fleet.control_interval_s:g} s; raise it"
            )
        for where, workload in (*((f"train '{s.name}'", s.workload) for s in self.train), ("test", self.test)):
            self._check_classes(where, workload)
        return self

    def _check_classes(self, where: str, workload: WorkloadSpec) -> None:
        for item in workload.streams:
            named = {item.class_name} if item.class_name is not None else set(item.shares or {})
            unknown = sorted(named - set(self.fleet.class_names))
            if unknown:
                raise ValueError(
                    f"{where} names class {', '.join(unknown)}; the fleet has {', '.join(self.fleet.class_names)}"
                )

    def build_train(self, seed: int, store: TraceSource, *, span_s: float | None = None) -> BuiltWorkload:
        """Draw the traffic of one training episode: a source by weight, then a workload from it.

        Args:
            seed: of the episode.
            store: where traces come from.
            span_s: length; default ``episode_s``.

        Raises:
            SpecError, TraceError: see `WorkloadSpec.build`.
        """
        return self._build_from(self.train, stream(seed, _TRAIN_STREAM), store, span_s)

    @property
    def validation_sources(self) -> tuple[TrainingSource, ...]:
        """The training sources without a trace; validation draws from them."""
        return tuple(source for source in self.train if all(item.trace is None for item in source.workload.streams))

    def build_validation(self, seed: int, store: TraceSource, *, span_s: float | None = None) -> BuiltWorkload:
        """Draw the traffic of one validation episode, which no training seed draws.

        Args:
            seed: of the episode.
            store: where traces come from.
            span_s: length; default ``episode_s``.

        Raises:
            SpecError: every training source holds a trace; or see `WorkloadSpec.build`.
        """
        if not self.validation_sources:
            raise SpecError(
                f"scenario '{self.name}' has no validation traffic: every training source holds a trace; "
                "add one made of generators"
            )
        return self._build_from(self.validation_sources, stream(seed, _VALIDATION_STREAM), store, span_s)

    @property
    def history(self) -> WorkloadSpec | None:
        """Traffic like the test's that is over when the test begins; None where a trace has no seconds before it."""
        streams = []
        for item in self.test.streams:
            if item.trace is None:
                streams.append(item.model_copy(update={"generator": _another_day(item.generator)}))
            elif item.slice_s is None or item.slice_s[0] <= 0:
                return None
            else:
                earlier = {"slice_s": (0.0, item.slice_s[0]), "random_window": True}
                streams.append(item.model_copy(update=earlier))
        return self.test.model_copy(update={"streams": tuple(streams)})

    def build_history(self, seed: int, store: TraceSource, *, span_s: float | None = None) -> BuiltWorkload:
        """Draw traffic that was on record before the test.

        Args:
            seed: of the draw.
            store: where traces come from.
            span_s: length; a trace that has less gives what it has.

        Raises:
            SpecError: there is none; or see `WorkloadSpec.build`.
        """
        if self.history is None:
            raise SpecError(
                f"scenario '{self.name}' has no history: its test traffic is a trace from its first second on; give "
                "the test a slice_s that begins later"
            )
        return self.history.build(stream(seed, _HISTORY_STREAM), store, self.fleet.class_names, span_s=span_s)

    def _build_from(
        self, sources: tuple[TrainingSource, ...], rng: np.random.Generator, store: TraceSource, span_s: float | None
    ) -> BuiltWorkload:
        """A source by weight, then a workload from it."""
        weights = np.array([source.weight for source in sources])
        source = sources[int(rng.choice(len(sources), p=weights / weights.sum()))]
        length_s = self.episode_s if span_s is None else span_s
        return source.workload.build(rng, store, self.fleet.class_names, span_s=length_s)

    def build_test(self, seed: int, store: TraceSource, *, span_s: float | None = None) -> BuiltWorkload:
        """Draw the held-out traffic, the same for every policy under one seed.

        Args:
            seed: of the run.
            store: where traces come from.
            span_s: cut to this length, for quick looks; default the whole of it.

        Raises:
            SpecError, TraceError: see `WorkloadSpec.build`.
        """
        return self.test.build(stream(seed, _TEST_STREAM), store, self.fleet.class_names, span_s=span_s)

    def draw_randomisation(self, seed: int, *, validation: bool = False) -> tuple[float, float]:
        """``(speed, startup_scale)`` of one training or validation episode, for `FleetBatch.load`."""
        rng = stream(seed, _VALIDATION_RANDOMISATION_STREAM if validation else _RANDOMISATION_STREAM)
        chosen = self.train_randomisation
        return chosen.speed.draw(rng), chosen.startup_scale.draw(rng)


def shipped_scenario_names() -> list[str]:
    """Names of the scenarios in the package, sorted."""
    return sorted(item.name.removesuffix(".yaml") for item in _shipped().iterdir() if item.name.endswith(".yaml"))


def _shipped() -> Traversable:
    return resources.files("rl_autoscale") / "experiments" / "scenarios"


def _another_day(generator: Any) -> Any:
    """A generator for the past: where its course is written out, from any place on, lest the past be the test."""
    if not isinstance(generator, RateCurveSpec):
        return generator
    return generator.model_copy(update={"start_s": Range(low=0.0, high=generator.edges_s[-1])})


def load_scenario(name_or_path: str | Path) -> Scenario:
    """Load a shipped scenario by name, or any scenario by path (anything that ends in .yaml or .yml).

    Raises:
        UnknownNameError: no shipped scenario has that name.
        SpecError: the file is missing or not a scenario; every problem is named.
    """
    name = str(name_or_path)
    if name.endswith((".yaml", ".yml")):
        return Scenario.from_yaml(Path(name))
    if name not in shipped_scenario_names():
        raise UnknownNameError("scenario", name, shipped_scenario_names())
    text = (_shipped() / f"{name}.yaml").read_text(encoding="utf-8")
    data: Any = yaml.safe_load(text)
    return Scenario.from_dict(data, where=f"scenario {name}")
