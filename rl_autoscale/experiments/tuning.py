"""Tune a rule's constants on training traffic, by the same budget for every rule.

An operator who deploys a rule tunes it on yesterday's traffic. So does this: candidates are judged on *training*
episodes (capacity error and start-up scale drawn as in the training of the learned policy), every second one of the
fleet's own history where that is asked for, each on the same seeds, and the winner goes through the benchmark
unchanged.

The loss of a candidate is its GPU-hours, relative to the rule's defaults, plus a price on every point of attainment
that it stays below the asked one. The price is finite on purpose: where the asked attainment is out of reach on the
hardest training episodes, a strict constraint would drive the search into corners. The defaults are the first
candidate, so tuning never loses to them on training traffic; then half of the budget is random search (uniform in the
unit cube that the ranges span), the rest is coordinate search around the best point with a step that halves when a
round over all coordinates brings nothing. Where the step has become small before the budget is spent, the same begins
again elsewhere: every rule spends all of its budget.

The budget is counted in simulated hours of training traffic, the currency in which the learned policy's training is
counted too (`trained_hours`), so that a rule can be given exactly what PPO got.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl_autoscale.experiments.episodes import EpisodeJob, EpisodePool
from rl_autoscale.experiments.offset_search import search_timesteps
from rl_autoscale.experiments.search_spaces import LEAST_REPLICAS, SELECTIVITY, STRICTNESS, Dimension, search_space
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.rng import stream

RANDOM_SHARE = 0.5
SHORTFALL_PRICE = 20.0
"""Bills of the defaults per unit of attainment missing: a point below the asked one weighs 20 % of the bill."""

FIRST_STEP = 0.15
SMALLEST_STEP = 0.005
_WHOLE = frozenset({"batch_cap", "least_replicas", "replicas"})


@dataclass(frozen=True, slots=True)
class TuningResult:
    """The best constants found, and what they did on the training traffic.

    Attributes:
        policy: name of the tuned variant.
        knobs: keyword arguments of its base policy.
        asked_attainment: what was tuned for.
        slo_attainment: mean over the training episodes.
        gpu_hours: mean over the training episodes.
        num_candidates: points tried.
        num_episodes: episodes run.
        simulated_hours: fleet time simulated, the budget all rules share.
    """

    policy: str
    knobs: dict[str, Any]
    asked_attainment: float
    slo_attainment: float
    gpu_hours: float
    num_candidates: int
    num_episodes: int
    simulated_hours: float


_Scored = tuple[float, np.ndarray, tuple[float, float]]
"""(loss, place in the unit cube, (attainment, GPU-hours))."""

Evaluate = Callable[[Sequence[dict[str, Any]]], list[tuple[float, float]]]
"""Candidates -> (attainment, GPU-hours) of each."""


def budget_episodes(hours: float, episode_s: float) -> int:
    """Whole episodes in so many simulated hours."""
    return int(hours * 3600.0 / episode_s + 1e-9)


def trained_hours(card: Mapping[str, Any], control_interval_s: float) -> float:
    """Simulated hours that went into a learned policy: control steps, of training and search, times their length.

    Args:
        card: of an exported policy (agents/export.py).
        control_interval_s: of the scenario it was trained on.

    Raises:
        SpecError: the card does not say how many steps it was trained for.
    """
    steps = card.get("training", {}).get("timesteps")
    if not isinstance(steps, int) or steps <= 0:
        raise SpecError(
            "the learned policy's card holds no training.timesteps; give the tuning budget in hours instead"
        )
    return (steps + search_timesteps(card["training"])) * control_interval_s / 3600.0


def describe_budgets(results: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """One sentence on what tuning cost, or none; ``results`` are those of ``tuning.json``."""
    if not results:
        return ()
    hours = sorted(float(result["simulated_hours"]) for result in results)
    spent = f"{hours[0]:.1f}" if hours[-1] - hours[0] < 0.05 else f"{hours[0]:.1f} to {hours[-1]:.1f}"
    return (
        f"Each tuned rule spent {spent} simulated hours of training traffic per scenario and refusal "
        f"({min(r['num_candidates'] for r in results)} candidates or more, the same search for all).",
    )


def tune_policy(
    policy: str,
    scenario: str,
    pool: EpisodePool,
    *,
    episode_s: float,
    budget_episodes: int,
    num_seeds: int = 4,
    target: float = 0.98,
    one_pool: bool = False,
    history: bool = False,
    fixed: dict[str, Any] | None = None,
    seed: int = 0,
) -> TuningResult:
    """Tune one rule on one scenario's training traffic.

    Args:
        policy: a key of `SEARCH_SPACES`.
        scenario: name of one of the pool's scenarios.
        pool: runs the episodes.
        episode_s: length of each, the same for every rule.
        budget_episodes: episodes in all; candidates = budget / seeds.
        num_seeds: training episodes each candidate is judged on.
        target: attainment asked for.
        one_pool: whether the fleet has one pool, so that a number of replicas to keep means something.
        history: every second episode is of the fleet's own past, not of its training traffic.
        fixed: further keyword arguments, not searched (early refusal).
        seed: of the search; the training episodes are numbers 0..num_seeds - 1.
    """
    space = search_space(policy)
    dimensions = space.dimensions
    if math.isfinite((fixed or {}).get("admission", math.inf)):
        dimensions = (*dimensions, STRICTNESS, SELECTIVITY)
    if one_pool and space.base != "static":
        dimensions = (*dimensions, LEAST_REPLICAS)
    if budget_episodes < num_seeds:
        raise SpecError(f"budget_episodes={budget_episodes} is below num_seeds={num_seeds}; raise it")
    given = fixed or {}

    def evaluate(candidates: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
        jobs = [
            EpisodeJob(
                str(number),
                scenario,
                "history" if history and episode % 2 else "train",
                episode,
                space.base,
                {**given, **knobs},
                episode_s,
            )
            for episode in range(num_seeds)
            for number, knobs in enumerate(candidates)
        ]
        totals = np.zeros((len(candidates), 2))
        for outcome in pool.run(jobs):
            metrics = outcome.metrics
            totals[int(outcome.job.identity)] += (metrics["slo_attainment"], metrics["gpu_hours"])
        return [(float(a), float(h)) for a, h in totals / num_seeds]

    num_candidates = budget_episodes // num_seeds
    knobs, (attainment, hours), tried = search(
        dimensions, evaluate, num_candidates, target=target, rng=stream(seed, f"tune/{policy}")
    )
    num_episodes = tried * num_seeds
    return TuningResult(
        policy, {**given, **knobs}, target, attainment, hours, tried, num_episodes, num_episodes * episode_s / 3600.0
    )


def search(
    dimensions: Sequence[Dimension],
    evaluate: Evaluate,
    num_candidates: int,
    *,
    target: float,
    rng: np.random.Generator,
) -> tuple[dict[str, Any], tuple[float, float], int]:
    """The defaults, random search, then coordinate search, again while there is budget; see the module.

    Returns:
        (best candidate, its (attainment, GPU-hours), candidates tried).
    """
    start = np.array([item.unit(item.default) for item in dimensions])
    start_score = evaluate([_candidate(dimensions, start)])[0]
    bill = start_score[1]
    best, tried = (loss(start_score, target, bill), start, start_score), 1
    while tried < num_candidates:
        left = num_candidates - tried
        points = rng.random((max(1, round(RANDOM_SHARE * left)), len(dimensions)))
        scores = evaluate([_candidate(dimensions, point) for point in points])
        drawn = [(loss(score, target, bill), point, score) for point, score in zip(points, scores, strict=True)]
        if tried == 1:
            drawn.append(best)  # the first descent may begin at the defaults; later ones begin elsewhere
        tried += len(points)
        local = min(drawn, key=lambda item: item[0])
        local, used = _descend(dimensions, evaluate, local, num_candidates - tried, target, bill)
        tried += used
        best = min(best, local, key=lambda item: item[0])
    return _candidate(dimensions, best[1]), best[2], tried


def _descend(
    dimensions: Sequence[Dimension], evaluate: Evaluate, point: _Scored, budget: int, target: float, bill: float
) -> tuple[_Scored, int]:
    """Coordinate search from a point until its step is small or the budget is spent; (best point, candidates tried)."""
    tried, step, coordinate, improved = 0, FIRST_STEP, 0, False
    while tried < budget and step > SMALLEST_STEP:
        neighbours = _neighbours(point[1], coordinate, step)[: budget - tried]
        found = evaluate([_candidate(dimensions, neighbour) for neighbour in neighbours])
        tried += len(neighbours)
        for neighbour, score in zip(neighbours, found, strict=True):
            if loss(score, target, bill) < point[0]:
                point, improved = (loss(score, target, bill), neighbour, score), True
        coordinate += 1
        if coordinate == len(dimensions):
            step, coordinate, improved = (step if improved else step / 2.0), 0, False
    return point, tried


def loss(score: tuple[float, float], target: float, bill_hours: float) -> float:
    """Smaller is better.

    Args:
        score: (attainment, GPU-hours) of a candidate.
        target: attainment asked for.
        bill_hours: GPU-hours of the defaults.
    """
    attainment, hours = score
    return hours / max(bill_hours, 1e-9) + SHORTFALL_PRICE * max(0.0, target - attainment)


def _candidate(dimensions: Sequence[Dimension], point: np.ndarray) -> dict[str, Any]:
    values = {item.name: item.value(float(unit)) for item, unit in zip(dimensions, point, strict=True)}
    return {name: round(value) if name in _WHOLE else value for name, value in values.items()}


def _neighbours(point: np.ndarray, coordinate: int, step: float) -> list[np.ndarray]:
    moved = []
    for direction in (-step, step):
        neighbour = point.copy()
        neighbour[coordinate] = np.clip(point[coordinate] + direction, 0.0, 1.0)
        if neighbour[coordinate] != point[coordinate]:
            moved.append(neighbour)
    return moved
