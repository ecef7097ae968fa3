"""Statistics over many scenarios: bootstrap over seeds, interquartile mean, probability of improvement, profiles.

After Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS 2021,
arXiv 2108.13264), section 4, with scenarios as tasks and seeds as runs. Their library (``rliable``) wants scores where
more is better and independent runs; ours are costs, and seeds are common random numbers, so a resample takes the same
seeds for both sides of a comparison, and for all scenarios: a seed draws like bursts and the same jitter in several of
them, which are no independent runs. Pure functions over arrays of shape (num_scenarios, num_seeds), less is better.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import trim_mean

from rl_autoscale.experiments.statistics import Estimate, FloatArray, IntArray, estimate_of

NUM_SUITE_RESAMPLES = 1000


def seed_resamples(
    num_scenarios: int, num_seeds: int, rng: np.random.Generator, num_resamples: int = NUM_SUITE_RESAMPLES
) -> IntArray:
    """Seeds drawn with replacement, the same in every scenario; shape (num_resamples, num_scenarios, num_seeds).

    No scenario is ever left out: the suite is what it is, only the seeds could have been others.
    """
    drawn = rng.integers(num_seeds, size=(num_resamples, 1, num_seeds))
    return np.broadcast_to(drawn, (num_resamples, num_scenarios, num_seeds))


def resample(values: FloatArray, drawn: IntArray) -> FloatArray:
    """Values of the seeds drawn, shape (num_resamples, num_scenarios, num_seeds)."""
    return np.asarray(values[np.arange(len(values))[None, :, None], drawn])


def suite_mean(values: FloatArray, drawn: IntArray) -> Estimate:
    """Mean over scenarios and seeds, each scenario with the same weight."""
    return estimate_of(float(values.mean()), resample(values, drawn).mean(axis=(1, 2)), values.shape[1])


def interquartile_mean(values: FloatArray) -> float:
    """Mean of the middle half of all values, scenarios and seeds together: robust like a median, and less noisy."""
    return float(trim_mean(values, 0.25, axis=None))


def interquartile_mean_estimate(values: FloatArray, drawn: IntArray) -> Estimate:
    """`interquartile_mean` with its interval."""
    resampled = resample(values, drawn).reshape(len(drawn), -1)
    return estimate_of(interquartile_mean(values), trim_mean(resampled, 0.25, axis=1), values.shape[1])


def probability_of_improvement(mine: FloatArray, theirs: FloatArray, drawn: IntArray) -> Estimate:
    """How likely it is that ``mine`` is below ``theirs`` on a scenario drawn at random, any two seeds; ties count half.

    The mean over scenarios of the Mann-Whitney statistic over pairs of seeds.
    """

    def share(a: FloatArray, b: FloatArray) -> FloatArray:
        left, right = a[..., :, None], b[..., None, :]
        return np.asarray(((left < right) + 0.5 * (left == right)).mean(axis=(-1, -2)).mean(axis=-1))

    value = float(share(mine, theirs))
    return estimate_of(value, share(resample(mine, drawn), resample(theirs, drawn)), mine.shape[1])


def performance_profile(values: FloatArray, thresholds: FloatArray, drawn: IntArray) -> tuple[FloatArray, FloatArray]:
    """Share of all episodes at or below each threshold, and its 95 % band.

    Returns:
        (shape (num_thresholds,), shape (2, num_thresholds)).
    """
    share = (values.reshape(-1, 1) <= thresholds).mean(axis=0)
    resampled = resample(values, drawn).reshape(len(drawn), -1)
    band = [np.quantile((resampled <= one).mean(axis=1), [0.025, 0.975]) for one in thresholds]
    return np.asarray(share), np.array(band).T


def geometric_mean(ratios: FloatArray) -> FloatArray:
    """Over axis 0; infinite where one is (something was not reached)."""
    return np.asarray(np.exp(np.log(ratios).mean(axis=0)))
