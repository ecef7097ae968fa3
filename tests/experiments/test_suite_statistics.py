"""Suite statistics on arrays with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.experiments.suite_statistics import (
    geometric_mean,
    interquartile_mean,
    interquartile_mean_estimate,
    performance_profile,
    probability_of_improvement,
    seed_resamples,
    suite_mean,
)

RNG = np.random.default_rng


def test_resamples_keep_every_scenario_and_draw_its_seeds() -> None:
    drawn = seed_resamples(3, 4, RNG(0), 500)
    assert drawn.shape == (500, 3, 4)
    assert set(np.unique(drawn)) == {0, 1, 2, 3}
    values = np.arange(3)[:, None] * np.ones((1, 4))  # nothing varies over seeds, so nothing varies at all
    estimate = suite_mean(values, drawn)
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


def test_intervals_of_a_mean_cover_it_as_often_as_they_say() -> None:
    covered = 0
    for trial in range(200):
        values = RNG(trial).normal(5.0, 1.0, (6, 8))
        estimate = suite_mean(values, seed_resamples(6, 8, RNG(trial), 200))
        covered += estimate.low <= 5.0 <= estimate.high
    assert 170 <= covered <= 200


def test_interquartile_mean_ignores_what_is_far_out() -> None:
    values = np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 1e9]])
    assert interquartile_mean(values) == pytest.approx(3.5)
    estimate = interquartile_mean_estimate(np.ones((2, 3)), seed_resamples(2, 3, RNG(0)))
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


def test_probability_of_improvement_counts_pairs() -> None:
    drawn = seed_resamples(2, 2, RNG(0))
    low, high = np.zeros((2, 2)), np.ones((2, 2))
    assert probability_of_improvement(low, high, drawn).value == 1.0
    assert probability_of_improvement(high, low, drawn).value == 0.0
    assert probability_of_improvement(low, low, drawn).value == 0.5
    mixed = np.array([[0.0, 0.0], [2.0, 2.0]])  # better on one scenario, worse on the other
    assert probability_of_improvement(mixed, high, drawn).value == 0.5
    one_of_two = np.array([[0.0, 2.0], [0.0, 2.0]])
    estimate = probability_of_improvement(one_of_two, high, drawn)
    assert estimate.low < estimate.value == 0.5 < estimate.high


def test_a_profile_rises_from_none_to_all() -> None:
    values = RNG(0).uniform(1.0, 2.0, (4, 5))
    share, (low, high) = performance_profile(values, np.array([0.5, 1.5, 2.5]), seed_resamples(4, 5, RNG(0)))
    assert share[0] == 0.0
    assert share[2] == 1.0
    assert low[1] <= share[1] <= high[1]
    assert share[1] == np.mean(values <= 1.5)


def test_geometric_mean_does_not_care_who_is_the_denominator() -> None:
    ratios = np.array([0.5, 2.0, 4.0])
    assert geometric_mean(ratios) * geometric_mean(1.0 / ratios) == pytest.approx(1.0)
    assert np.isinf(geometric_mean(np.array([1.0, np.inf])))
