"""Training, validation and history episodes of a scenario, each a function of its seed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from rl_autoscale.envs.mdp import EpisodeSetup
from rl_autoscale.envs.reward import LEAST_WEIGHT, PRICE_RANGE
from rl_autoscale.fleet.errors import SilenceError, SpecError
from rl_autoscale.fleet.rng import stream
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.workload.spec import BuiltWorkload, TraceSource
from rl_autoscale.workload.trace import Workload

INITIAL_HEADROOM = (0.8, 3.0)
"""Replicas ready when an episode begins, over its mean demand: fleets are found as somebody sized them."""
MOST_DRAWS = 50
"""Draws of traffic that are tried for one that holds requests."""
_NEXT_DRAW = 1 << 32
EQUAL_WEIGHTS = 1 / 3
"""Share of the episodes of several classes in which a miss of each costs the same."""


class TrainingScenario(Protocol):
    """What a sampler needs of a scenario."""

    @property
    def fleet(self) -> FleetSpec:
        """The fleet."""
        ...

    def build_train(self, seed: int, store: TraceSource, *, span_s: float | None = None) -> BuiltWorkload:
        """Traffic of one training episode."""
        ...

    def build_validation(self, seed: int, store: TraceSource, *, span_s: float | None = None) -> BuiltWorkload:
        """Traffic of one validation episode."""
        ...

    def draw_randomisation(self, seed: int, *, validation: bool = False) -> tuple[float, float]:
        """(speed, start-up scale) of one episode."""
        ...


class ScenarioSampler:
    """Draws traffic, capacity error, start-up scale, initial fleet, the price of a miss and its weight by class.

    Building traffic takes as long as simulating it, so a run draws from ``num_workloads`` of them; everything else is
    new in each episode.

    Args:
        scenario: where episodes come from.
        store: where traces come from.
        price_range: prices are log-uniform in it; equal ends fix the price.
        num_workloads: different traffic draws in a run.
        validation: draw the scenario's validation traffic, which no training sees (experiments/split.yaml).
        span_s: length of an episode; default the scenario's.
        weighted: draw weights; else a miss of every class costs the same.
    """

    def __init__(
        self,
        scenario: TrainingScenario,
        store: TraceSource,
        price_range: tuple[float, float] = PRICE_RANGE,
        num_workloads: int = 96,
        *,
        validation: bool = False,
        span_s: float | None = None,
        weighted: bool = True,
    ) -> None:
        self._span_s = span_s
        self._weighted = weighted and len(scenario.fleet.classes) > 1
        self._scenario = scenario
        self._store = store
        self._price_range = price_range
        self._num_workloads = num_workloads
        self._validation = validation
        self._workloads: dict[int, Workload] = {}
        self.notes: set[str] = set()

    def __call__(self, seed: int) -> EpisodeSetup:
        """The episode of a seed."""
        number = seed % self._num_workloads
        if number not in self._workloads:
            build = self._scenario.build_validation if self._validation else self._scenario.build_train
            built = first_with_requests(lambda draw: build(draw, self._store, span_s=self._span_s), number)
            self._workloads[number] = built.workload
            self.notes.update(built.notes)
        speed, startup_scale = self._scenario.draw_randomisation(seed, validation=self._validation)
        rng = stream(seed, "validation-episode" if self._validation else "episode")
        low, high = np.log(self._price_range)
        return EpisodeSetup(
            self._workloads[number],
            float(np.exp(rng.uniform(low, high))),
            speed=speed,
            startup_scale=startup_scale,
            initial_headroom=float(rng.uniform(*INITIAL_HEADROOM)),
            miss_weight=draw_weights(rng, len(self._scenario.fleet.classes)) if self._weighted else None,
        )


class RecordedScenario(Protocol):
    """What `HistorySampler` needs of a scenario."""

    def build_history(self, seed: int, store: TraceSource, *, span_s: float | None = None) -> BuiltWorkload:
        """Traffic that was on record before the test."""
        ...


class HistorySampler:
    """Draws what a fleet's owner has on record, from the replicas that it begins with and at its own speed.

    Args:
        scenario: whose history it is.
        store: where traces come from.
        span_s: length of an episode; a trace that has less gives what it has.

    Raises:
        SpecError: when called, if there is no past, or no request in it.

    Attributes:
        notes: what is to be told of the traffic drawn, for example a trace that a generator stands in for.
    """

    def __init__(self, scenario: RecordedScenario, store: TraceSource, *, span_s: float) -> None:
        self._scenario, self._store, self._span_s = scenario, store, span_s
        self.notes: set[str] = set()

    def __call__(self, seed: int) -> EpisodeSetup:
        """The episode of a seed, at a price of a miss of 1."""
        built = self._build(seed)
        self.notes.update(built.notes)
        return EpisodeSetup(built.workload, miss_price=1.0)

    def _build(self, seed: int) -> BuiltWorkload:
        """A window of the past; another one where it is silent, as nights are."""
        try:
            return first_with_requests(
                lambda draw: self._scenario.build_history(draw, self._store, span_s=self._span_s), seed
            )
        except SilenceError as silent:
            raise SpecError(
                f"the fleet's past: {silent}; begin the test's slice_s where seconds before it hold requests, or at 0, "
                "which leaves the past out"
            ) from None


def first_with_requests(build: Callable[[int], BuiltWorkload], seed: int) -> BuiltWorkload:
    """The traffic of a seed; where it is silent, as nights are, that of another.

    Args:
        build: makes traffic of a seed.
        seed: the first that is tried.

    Raises:
        SilenceError: none of `MOST_DRAWS` holds a request.
    """
    for draw in range(MOST_DRAWS):
        try:
            return build(seed + draw * _NEXT_DRAW)
        except SilenceError as problem:
            silent = problem
    raise SilenceError(f"{silent} (in {MOST_DRAWS} draws)")


def draw_weights(rng: np.random.Generator, num_classes: int) -> tuple[float, ...]:
    """What a miss of each class costs over the dearest, which is 1: of the others some too, and some less."""
    if rng.random() < EQUAL_WEIGHTS:
        return (1.0,) * num_classes
    lower = np.exp(rng.uniform(np.log(LEAST_WEIGHT), 0.0, num_classes))
    weight = np.where(rng.random(num_classes) < 0.5, 1.0, lower)
    return tuple((weight / weight.max()).tolist())
