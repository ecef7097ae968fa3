"""The search finds a known optimum within its budget and never loses to the defaults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from rl_autoscale.agents.registry import policy_class
from rl_autoscale.experiments.episodes import EpisodeJob, EpisodeOutcome
from rl_autoscale.experiments.search_spaces import SEARCH_SPACES, Dimension, search_space
from rl_autoscale.experiments.tuning import (
    BEHIND,
    FloatArray,
    Play,
    budget_episodes,
    describe_budgets,
    loss,
    search,
    trained_hours,
    tune_policy,
)
from rl_autoscale.fleet.errors import SpecError

SPACE = (Dimension("x", 0.1, 10.0, 1.0, log=True), Dimension("y", -1.0, 1.0, 0.9))


def bowl(candidates: Sequence[dict[str, Any]], episode: int) -> FloatArray:
    """Hours are least at x = 3, y = 0; every candidate attains enough."""
    return np.array([(1.0, 1.0 + np.log(c["x"] / 3.0) ** 2 + c["y"] ** 2) for c in candidates])


class Counting:
    """Counts the episodes of each candidate of another game."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self.played: Counter[tuple[float, ...]] = Counter()

    def __call__(self, candidates: Sequence[dict[str, Any]], episode: int) -> FloatArray:
        self.played.update(tuple(candidate.values()) for candidate in candidates)
        return self._play(candidates, episode)


def test_search_finds_the_bottom_of_a_bowl() -> None:
    for seed in range(5):
        found = search(SPACE, bowl, 160, num_seeds=2, targets=(0.98,), rng=np.random.default_rng(seed))
        (leader,) = found.leaders
        attainment, hours = leader.scores.mean(axis=0)
        assert attainment == 1.0
        assert hours < 1.01
        assert SPACE[0].value(leader.point[0]) == pytest.approx(3.0, rel=0.1)


def slope(candidates: Sequence[dict[str, Any]], episode: int) -> FloatArray:
    """What is attained grows with x, and so does the bill; y is to be 0."""
    return np.array([(1.0 - 0.02 / c["x"], c["x"] + c["y"] ** 2) for c in candidates])


def test_one_search_finds_constants_for_every_attainment() -> None:
    targets = (0.95, 0.98)
    found = search(SPACE, slope, 400, num_seeds=2, targets=targets, rng=np.random.default_rng(0), price=60.0)
    for target, leader in zip(targets, found.leaders, strict=True):
        attainment, hours = leader.scores.mean(axis=0)
        needed = 0.02 / (1.0 - target)
        assert attainment == pytest.approx(target, abs=0.002)
        assert hours == pytest.approx(needed, rel=0.1)


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("budget", [3, 4, 5, 13, 200])
def test_search_spends_its_budget_and_beats_the_defaults(budget: int, num_seeds: int) -> None:
    counting = Counting(bowl)
    found = search(SPACE, counting, budget, num_seeds=num_seeds, targets=(0.98,), rng=np.random.default_rng(1))
    assert found.num_episodes == counting.played.total()
    assert budget - num_seeds < found.num_episodes <= budget
    assert found.num_candidates >= len(counting.played)  # a move may lead to where another has led
    assert found.leaders[0].scores[:, 1].mean() <= bowl([{"x": 1.0, "y": 0.9}], 0)[0, 1]


def test_who_falls_behind_is_played_no_further() -> None:
    counting = Counting(bowl)
    search(SPACE, counting, 400, num_seeds=4, targets=(0.98,), rng=np.random.default_rng(0))
    hours = {knobs: bowl([dict(zip("xy", knobs, strict=True))], 0)[0, 1] for knobs in counting.played}
    best = min(hours.values())
    assert {counting.played[knobs] for knobs, value in hours.items() if value < best * (1.0 + BEHIND)} == {4}
    assert sum(number < 4 for number in counting.played.values()) > len(hours) / 4


class Recorded:
    """A pool that plays nothing and remembers what it was asked for."""

    def __init__(self) -> None:
        self.jobs: list[EpisodeJob] = []

    def run(self, jobs: Sequence[EpisodeJob]) -> Iterator[EpisodeOutcome]:
        self.jobs += jobs
        return (EpisodeOutcome(job, {"slo_attainment": 1.0, "gpu_hours": 1.0}, 0.0) for job in jobs)


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("one_pool", [False, True])
def test_what_is_tuned_and_on_what(history: bool, one_pool: bool) -> None:
    pool, budget = Recorded(), {"episode_s": 60.0, "budget_episodes": 12, "num_seeds": 4}
    tune_policy("hpa-tuned", "any", pool, history=history, one_pool=one_pool, **budget)  # type: ignore[arg-type]
    assert {job.seed: job.split for job in pool.jobs} == dict(
        enumerate(("train", "history" if history else "train") * 2)
    )
    assert all(("least_replicas" in job.knobs) == one_pool for job in pool.jobs)
    assert all(isinstance(job.knobs["batch_cap"], int) for job in pool.jobs)


def test_loss_prefers_enough_attainment_then_fewer_hours() -> None:
    assert loss((0.985, 12.0), 0.98, 10.0) < loss((0.999, 13.0), 0.98, 10.0)
    assert loss((0.98, 13.0), 0.98, 10.0) < loss((0.95, 10.0), 0.98, 10.0)
    # a hair below the target is not worth doubling the bill
    assert loss((0.979, 10.0), 0.98, 10.0) < loss((0.98, 20.0), 0.98, 10.0)


def test_dimensions_invert_and_stay_inside() -> None:
    for item in (*SPACE, *(d for space in SEARCH_SPACES.values() for d in space.dimensions)):
        assert item.low <= item.default <= item.high
        assert item.value(item.unit(item.default)) == pytest.approx(item.default, rel=1e-3)
        assert item.value(0.0) == pytest.approx(item.low, rel=1e-3)
        assert item.value(1.0) == pytest.approx(item.high, rel=1e-3)


@pytest.mark.parametrize("name", list(SEARCH_SPACES))
def test_search_spaces_name_knobs_that_exist_and_begin_with_the_swept_one(name: str) -> None:
    space = search_space(name)
    chosen = policy_class(space.base)
    assert chosen.KNOB is not None
    assert space.dimensions[0].name == chosen.KNOB.name
    assert {item.name for item in space.dimensions} <= set(chosen.knob_names())


def test_a_policy_without_a_search_space_is_refused() -> None:
    with pytest.raises(SpecError, match="cannot be tuned; did you mean 'hpa-tuned'"):
        search_space("hpo-tuned")


def test_budgets_are_counted_in_simulated_hours() -> None:
    assert budget_episodes(10.0, 1200.0) == 30
    assert budget_episodes(0.99, 1200.0) == 2
    assert trained_hours({"training": {"timesteps": 360_000}}, 10.0) == 1000.0
    searched = {"timesteps": 36_000, "offset_search": {"timesteps": 7200}, "search_timesteps_before": 3600}
    assert trained_hours({"training": searched}, 10.0) == 130.0
    with pytest.raises(SpecError, match=r"training\.timesteps"):
        trained_hours({"training": {}}, 10.0)


def test_reports_say_what_tuning_cost() -> None:
    results = [{"simulated_hours": hours, "num_candidates": 24} for hours in (32.0, 32.02)]
    assert describe_budgets(results)[0].startswith("Each tuned rule spent 32.0 simulated hours")
    assert "10.0 to 32.0" in describe_budgets([*results, {"simulated_hours": 10.0, "num_candidates": 8}])[0]
    assert describe_budgets([]) == ()
