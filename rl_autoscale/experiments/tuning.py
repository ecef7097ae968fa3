"""Tune a rule's constants on training traffic, by the same budget for every rule.

An operator who deploys a rule tunes it on yesterday's traffic. So does this: candidates are judged on *training*
episodes (capacity error and start-up scale drawn as in the training of the learned policy), every second one of the
fleet's own history where that is asked for, each on the same seeds, and the winner goes through the benchmark
unchanged.

The loss of a candidate is its GPU-hours, relative to the rule's defaults, plus a price on every point of attainment
that it stays below the asked one. The price is finite on purpose: where the asked attainment is out of reach on the
hardest training episodes, a strict constraint would drive the search into corners. The defaults are the first
candidate, so tuning never loses to them on training traffic; then a quarter of the budget is random search (uniform in
the unit cube that the ranges span), the rest is drawn around the best point so far, with a third of the constants moved
by steps that widen where a better one is found and narrow where none is. Candidates *race*: one episode after another,
and whoever is behind the best on the episodes so far by more than a tenth for each that is left is played no further,
so most of the budget goes to candidates that may win (the idea is irace's: Lopez-Ibanez et al., Operations Research
Perspectives 3, 2016; the rule here is simpler).

Constants that are best for one attainment are not for another: a fleet that keeps a reserve for 99 % has no use for a
knob at 90. So one search may have several targets, each with a best point of its own. Every candidate is judged for all
of them, moves begin at the best point of each in turn, and a candidate leaves the race when it is behind for all.

The budget is counted in simulated hours of training traffic, the currency in which the learned policy's training is
counted too (`trained_hours`), so that a rule can be given exactly what PPO got.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_autoscale.experiments.episodes import EpisodeJob, EpisodePool, Split
from rl_autoscale.experiments.offset_search import search_timesteps
from rl_autoscale.experiments.search_spaces import LEAST_REPLICAS, SELECTIVITY, STRICTNESS, Dimension, search_space
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.rng import stream

RANDOM_SHARE = 0.25
SHORTFALL_PRICE = 20.0
"""Bills per unit of attainment missing where policies are chosen and scored: a point weighs 20 % of the bill."""
HISTORY_PRICE = 60.0
"""The same where constants are searched with the fleet's past. At 20 rules that were asked for 98 % of ``coder`` and
``bursty`` settled at 93 to 95 %; on training traffic alone, which is harder than what follows, 60 made rules too
large."""

CANDIDATES_PER_RACE = 4
BEHIND = 0.1
"""A candidate leaves the race whose loss is above the best's on the same episodes by this share for each one left."""
FIRST_STEP, LARGEST_STEP, SMALLEST_STEP = 0.25, 0.4, 0.03
"""Standard deviation of a move in the unit cube."""
WIDENING, NARROWING = 1.5, 0.9
MOVED_SHARE = 0.3
"""Of the constants, those that a move changes, on average."""

FloatArray = npt.NDArray[np.float64]

_WHOLE = frozenset({"batch_cap", "least_replicas", "replicas"})


@dataclass(frozen=True, slots=True)
class TuningResult:
    """The best constants found, and what they did on the training traffic.

    Attributes:
        policy: name of the tuned variant.
        knobs: keyword arguments of its base policy.
        asked_attainment: what it was tuned for.
        slo_attainment: mean over the training episodes.
        gpu_hours: mean over the training episodes.
        num_candidates: points tried, some of them in the first episodes only.
        num_episodes: episodes run.
        simulated_hours: fleet time simulated, the budget all rules share; of the search for all attainments together,
            as candidates and episodes are.
    """

    policy: str
    knobs: dict[str, Any]
    asked_attainment: float
    slo_attainment: float
    gpu_hours: float
    num_candidates: int
    num_episodes: int
    simulated_hours: float


Play = Callable[[Sequence[dict[str, Any]], int], FloatArray]
"""Candidates and the number of an episode -> (attainment, GPU-hours) of each, shape (num_candidates, 2)."""
Judge = Callable[[FloatArray], float]
"""Scores in some episodes, shape (num_episodes, 2) -> `loss` for one target."""


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
    targets: Sequence[float] = (0.98,),
    one_pool: bool = False,
    history: bool = False,
    fixed: dict[str, Any] | None = None,
    seed: int = 0,
) -> list[TuningResult]:
    """Tune one rule on one scenario's training traffic, for each of the targets.

    Args:
        policy: a key of `SEARCH_SPACES`.
        scenario: name of one of the pool's scenarios.
        pool: runs the episodes.
        episode_s: length of each, the same for every rule.
        budget_episodes: episodes for each target.
        num_seeds: training episodes that a candidate is judged on, unless it falls behind.
        targets: attainments asked for.
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

    def play(candidates: Sequence[dict[str, Any]], episode: int) -> FloatArray:
        split: Split = "history" if history and episode % 2 else "train"
        jobs = [
            EpisodeJob(str(number), scenario, split, episode, space.base, {**given, **knobs}, episode_s)
            for number, knobs in enumerate(candidates)
        ]
        scores = np.zeros((len(candidates), 2))
        for outcome in pool.run(jobs):
            metrics = outcome.metrics
            scores[int(outcome.job.identity)] = (metrics["slo_attainment"], metrics["gpu_hours"])
        return scores

    found = search(
        *(dimensions, play, budget_episodes * len(targets)),
        num_seeds=num_seeds,
        targets=targets,
        price=HISTORY_PRICE if history else SHORTFALL_PRICE,
        rng=stream(seed, f"tune/{policy}"),
    )
    hours = found.num_episodes * episode_s / 3600.0
    results = []
    for target, leader in zip(targets, found.leaders, strict=True):
        attainment, gpu_hours = (float(mean) for mean in leader.scores.mean(axis=0))
        knobs = {**given, **_candidate(dimensions, leader.point)}
        spent = (found.num_candidates, found.num_episodes, hours)
        results.append(TuningResult(policy, knobs, target, attainment, gpu_hours, *spent))
    return results


@dataclass(frozen=True, slots=True, eq=False)
class Leader:
    """The best candidate for one target so far.

    Attributes:
        point: in the unit cube, shape (num_dimensions,).
        scores: (attainment, GPU-hours) in each episode, shape (num_seeds, 2).
        step: of the next moves around it.
    """

    point: FloatArray
    scores: FloatArray
    step: float


@dataclass(frozen=True, slots=True)
class Found:
    """What a search ends with.

    Attributes:
        leaders: one for each target.
        num_candidates: that began a race.
        num_episodes: that were played.
    """

    leaders: tuple[Leader, ...]
    num_candidates: int
    num_episodes: int


def search(
    dimensions: Sequence[Dimension],
    play: Play,
    budget_episodes: int,
    *,
    num_seeds: int,
    targets: Sequence[float],
    rng: np.random.Generator,
    price: float = SHORTFALL_PRICE,
) -> Found:
    """The defaults, random search, then moves around the best; see the module.

    Args:
        dimensions: what is searched.
        play: one episode of each candidate.
        budget_episodes: episodes in all, at least ``num_seeds``; fewer than ``num_seeds`` of them may stay unspent.
        num_seeds: episodes of a candidate that is not behind.
        targets: attainments asked for, at least one.
        rng: of the candidates.
        price: of what is missing, in bills of the defaults per unit of attainment.
    """
    size = len(dimensions)
    defaults = np.array([item.unit(item.default) for item in dimensions])
    scores = np.concatenate([play([_candidate(dimensions, defaults)], episode) for episode in range(num_seeds)])
    judges = [partial(loss, target=target, bill_hours=float(scores[:, 1].mean()), price=price) for target in targets]
    leaders = [Leader(defaults, scores, FIRST_STEP) for _ in targets]
    num_candidates, spent, turn = 1, num_seeds, 0
    while (places := min(CANDIDATES_PER_RACE, (budget_episodes - spent) // num_seeds)) > 0:
        moving = spent >= RANDOM_SHARE * budget_episodes
        points = _moves(leaders[turn], places, rng) if moving else rng.random((places, size))
        finished, played = _race(dimensions, play, points, leaders, judges)
        num_candidates, spent = num_candidates + places, spent + played
        better = [_better(leader, finished, judge) for leader, judge in zip(leaders, judges, strict=True)]
        for k, winner in enumerate(better):
            if winner is not None:
                leaders[k] = replace(leaders[k], point=points[winner], scores=finished[winner])
        if moving:
            mover, found = leaders[turn], better[turn] is not None
            step = min(mover.step * WIDENING, LARGEST_STEP) if found else max(mover.step * NARROWING, SMALLEST_STEP)
            leaders[turn] = replace(mover, step=step)
            turn = (turn + 1) % len(leaders)
    return Found(tuple(leaders), num_candidates, spent)


def _moves(leader: Leader, number: int, rng: np.random.Generator) -> FloatArray:
    """Points around a leader, shape (number, num_dimensions); each differs in one coordinate at least."""
    shape = (number, len(leader.point))
    moved = rng.random(shape) < MOVED_SHARE
    moved[np.arange(number), rng.integers(shape[1], size=number)] = True
    return np.asarray(np.clip(leader.point + moved * leader.step * rng.standard_normal(shape), 0.0, 1.0))


def _race(
    dimensions: Sequence[Dimension],
    play: Play,
    points: FloatArray,
    leaders: Sequence[Leader],
    judges: Sequence[Judge],
) -> tuple[dict[int, FloatArray], int]:
    """Play candidates beside the leaders; (scores of those that were not left behind, by number, episodes played)."""
    candidates = [_candidate(dimensions, point) for point in points]
    num_seeds = len(leaders[0].scores)
    scores = np.zeros((len(points), num_seeds, 2))
    running, played = list(range(len(points))), 0
    for episode in range(num_seeds):
        scores[running, episode] = play([candidates[k] for k in running], episode)
        played += len(running)
        so_far, behind = slice(episode + 1), 1.0 + BEHIND * (num_seeds - 1 - episode)
        running = [
            k
            for k in running
            if any(
                judge(scores[k, so_far]) <= behind * judge(leader.scores[so_far])
                for leader, judge in zip(leaders, judges, strict=True)
            )
        ]
        if not running:
            break
    return {k: scores[k] for k in running}, played


def _better(leader: Leader, finished: Mapping[int, FloatArray], judge: Judge) -> int | None:
    """Who of those that finished a race beats a leader, if any."""
    losses = {k: judge(scores) for k, scores in finished.items()}
    best = min(losses, key=losses.__getitem__, default=None)
    return best if best is not None and losses[best] < judge(leader.scores) else None


def loss(scores: npt.ArrayLike, target: float, bill_hours: float, price: float = SHORTFALL_PRICE) -> float:
    """Smaller is better.

    Args:
        scores: (attainment, GPU-hours) of a candidate, shape (2,), or one such row for each episode, of which the mean
            counts.
        target: attainment asked for.
        bill_hours: GPU-hours that the price refers to.
        price: of what is missing, in such bills per unit of attainment.
    """
    attainment, hours = np.asarray(scores, dtype=np.float64).reshape(-1, 2).mean(axis=0)
    return float(hours / max(bill_hours, 1e-9) + price * max(0.0, target - attainment))


def _candidate(dimensions: Sequence[Dimension], point: FloatArray) -> dict[str, Any]:
    values = {item.name: item.value(float(unit)) for item, unit in zip(dimensions, point, strict=True)}
    return {name: round(value) if name in _WHOLE else value for name, value in values.items()}
