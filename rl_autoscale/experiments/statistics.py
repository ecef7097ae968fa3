"""From episodes to claims: fronts, GPU-hours at equal attainment, bootstrap intervals, hypervolume. Pure functions.

A *sweep* is one policy run with K values of its knob on S seeds: ``attainment`` and ``gpu_hours`` of shape (S, K).
Seeds are common random numbers: row s of every sweep met the same arrivals, lengths, start-ups and routing.

*GPU-hours at an attainment.* For a set of seeds both arrays are averaged per knob value: an operator sets one knob, not
one per seed. Among the K averaged points, those that no other point beats in both are the policy's *front* (its
lower-left envelope in cost over misses); between two neighbours on the front the hours are interpolated linearly,
which is monotone and cannot undershoot a point. There is no extrapolation: an attainment above the front's best is
*not reached* (NaN); one below its lowest costs what the cheapest point costs, which delivers more than was asked.

*Intervals* are percentile bootstrap intervals over seeds (Efron and Tibshirani 1993, chapter 13). A resample draws
seeds with replacement and redoes the whole computation, the front included. Comparisons are *paired*: both policies
take the same resample, so what seeds have in common cancels. A resample in which the target is not reached counts as
infinitely expensive; an interval whose upper end falls among those has no upper end (inf).

*Hypervolume* is the area between the front and a reference point, as a share of the reference rectangle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

TARGETS = (0.90, 0.95, 0.98, 0.99)
"""Attainments at which GPU-hours are reported."""

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
MIN_SEEDS = 5
"""Below this a report says that its intervals rest on few seeds."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its bootstrap interval.

    Attributes:
        value: over all seeds as they are; NaN if not reached.
        low: lower end; NaN with a single seed.
        high: upper end; inf if it was not reached often enough to have one; NaN with a single seed.
    """

    value: float
    low: float
    high: float

    @property
    def reached(self) -> bool:
        """Whether there is a value at all."""
        return bool(np.isfinite(self.value))


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """One policy's knob sweep.

    Attributes:
        attainment: shape (num_seeds, num_knobs), 0..1.
        gpu_hours: same shape, >= 0.
    """

    attainment: FloatArray
    gpu_hours: FloatArray

    def __post_init__(self) -> None:
        if self.attainment.ndim != 2 or self.attainment.shape != self.gpu_hours.shape or not self.attainment.size:
            raise ValueError(
                f"a sweep needs two arrays of one shape (seeds, knobs); got {self.attainment.shape} and "
                f"{self.gpu_hours.shape}"
            )
        if np.isnan(self.attainment).any() or np.isnan(self.gpu_hours).any():
            raise ValueError("a sweep must be complete: an episode is missing (NaN)")

    @property
    def num_seeds(self) -> int:
        """Rows."""
        return len(self.attainment)

    def mean(self, seeds: IntArray | None = None) -> tuple[FloatArray, FloatArray]:
        """Averages over some seeds (repeats allowed; default all): attainment and hours, each of shape (num_knobs,)."""
        if seeds is None:
            return self.attainment.mean(axis=0), self.gpu_hours.mean(axis=0)
        return self.attainment[seeds].mean(axis=0), self.gpu_hours[seeds].mean(axis=0)


def front_indices(attainment: FloatArray, gpu_hours: FloatArray) -> IntArray:
    """Which points no other point beats: by increasing attainment, and hence strictly increasing hours.

    Args:
        attainment: shape (num_points,).
        gpu_hours: shape (num_points,).
    """
    order = np.lexsort((gpu_hours, -attainment))  # best attainment first, the cheaper of equals before the dearer
    hours = gpu_hours[order]
    cheapest_so_far = np.minimum.accumulate(hours)
    keep = np.ones(len(order), dtype=np.bool_)
    keep[1:] = hours[1:] < cheapest_so_far[:-1]
    return np.asarray(order[keep][::-1], dtype=np.int64)


def hours_at(attainment: FloatArray, gpu_hours: FloatArray, targets: FloatArray) -> FloatArray:
    """GPU-hours for which a front delivers at least each target; see the module.

    Args:
        attainment: shape (num_points,).
        gpu_hours: shape (num_points,).
        targets: shape (num_targets,).

    Returns:
        Shape (num_targets,); NaN where the target is not reached.
    """
    front = front_indices(attainment, gpu_hours)
    hours = np.interp(targets, attainment[front], gpu_hours[front])
    return np.where(targets <= attainment[front][-1], hours, np.nan)


def resamples(num_seeds: int, rng: np.random.Generator, num_resamples: int = NUM_RESAMPLES) -> IntArray:
    """Bootstrap resamples of seed indices, shape (num_resamples, num_seeds)."""
    return rng.integers(num_seeds, size=(num_resamples, num_seeds))


def hours_at_attainment(
    sweep: Sweep,
    targets: tuple[float, ...] = TARGETS,
    *,
    rng: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
) -> list[Estimate]:
    """GPU-hours at each target with intervals over seeds."""
    wanted = np.array(targets)
    value = hours_at(*sweep.mean(), wanted)
    drawn = resampled_hours(sweep, wanted, resamples(sweep.num_seeds, rng, num_resamples))
    return [estimate_of(value[k], drawn[:, k], sweep.num_seeds) for k in range(len(targets))]


def paired_ratio(
    sweep: Sweep, baseline: Sweep, targets: tuple[float, ...] = TARGETS, *, rng: np.random.Generator
) -> list[Estimate]:
    """Hours of ``sweep`` over hours of ``baseline`` at each target; below 1 is cheaper. Paired by seed.

    Raises:
        ValueError: the sweeps have different numbers of seeds.
    """
    if sweep.num_seeds != baseline.num_seeds:
        raise ValueError(f"paired sweeps need the same seeds; got {sweep.num_seeds} and {baseline.num_seeds}")
    wanted = np.array(targets)
    value = hours_at(*sweep.mean(), wanted) / hours_at(*baseline.mean(), wanted)
    seeds = resamples(sweep.num_seeds, rng)
    mine, theirs = resampled_hours(sweep, wanted, seeds), resampled_hours(baseline, wanted, seeds)
    ratio = drawn_ratio(mine, theirs)
    return [estimate_of(value[k], ratio[:, k], sweep.num_seeds) for k in range(len(targets))]


def drawn_ratio(mine: FloatArray, theirs: FloatArray) -> FloatArray:
    """Resampled hours over a baseline's: where one of both does not get there it is infinitely expensive.

    Args:
        mine: NaN or infinite where not reached; any shape.
        theirs: the same of the baseline.

    Returns:
        0 where only the baseline misses, infinite where ``mine`` does.
    """
    ratio = np.full(mine.shape, np.inf)
    np.divide(mine, np.where(np.isnan(theirs), np.inf, theirs), out=ratio, where=np.isfinite(mine))
    return ratio


def hypervolume(attainment: FloatArray, gpu_hours: FloatArray, *, reference: tuple[float, float]) -> float:
    """Share of the rectangle (reference attainment..1) x (0..reference hours) that a set of points beats.

    Args:
        attainment: shape (num_points,).
        gpu_hours: shape (num_points,).
        reference: (attainment, GPU-hours) of the reference point; what is worse in either counts nothing.

    Returns:
        0..1; 1 would be full attainment for nothing.
    """
    worst_attainment, worst_hours = reference
    if not 0 <= worst_attainment < 1 or not worst_hours > 0:
        raise ValueError(f"reference={reference} must have attainment in [0, 1) and hours above 0")
    front = front_indices(attainment, gpu_hours)
    heights = np.clip(attainment[front], worst_attainment, 1.0)
    widths = np.clip(worst_hours - gpu_hours[front], 0.0, None)
    steps = np.diff(np.concatenate(([worst_attainment], heights)))
    return float(steps @ widths / ((1.0 - worst_attainment) * worst_hours))


def hypervolume_estimate(
    sweep: Sweep, reference: tuple[float, float], *, rng: np.random.Generator, num_resamples: int = NUM_RESAMPLES
) -> Estimate:
    """Hypervolume of the averaged sweep with an interval over seeds."""
    value = hypervolume(*sweep.mean(), reference=reference)
    drawn_seeds = resamples(sweep.num_seeds, rng, num_resamples)
    drawn = [hypervolume(*sweep.mean(seeds), reference=reference) for seeds in drawn_seeds]
    return estimate_of(value, np.array(drawn), sweep.num_seeds)


def share_of_gap_closed(hours: float, best_rule_hours: float, oracle_hours: float) -> float:
    """How much of the way from the best rule to the clairvoyant plan a policy goes; 1 is all of it, negative is a loss.

    NaN where one of them is not reached, or where the oracle is no cheaper than the best rule.
    """
    gap = best_rule_hours - oracle_hours
    return (best_rule_hours - hours) / gap if gap > 0 else float("nan")


def resampled_hours(sweep: Sweep, targets: FloatArray, seeds: IntArray) -> FloatArray:
    """Shape (num_resamples, num_targets), NaN where not reached; equal resamples are computed once."""
    distinct, places = np.unique(np.sort(seeds, axis=1), axis=0, return_inverse=True)
    hours = np.stack([hours_at(*sweep.mean(row), targets) for row in distinct])
    return np.asarray(hours[places.reshape(-1)])


def estimate_of(value: float, drawn: FloatArray, num_seeds: int) -> Estimate:
    """A value with the percentile interval of its resamples, shape (num_resamples,); NaN among them is infinite."""
    if num_seeds < 2 or not np.isfinite(value):
        return Estimate(float(value), float("nan"), float("nan"))
    tail = (1.0 - CONFIDENCE) / 2.0
    costly = np.where(np.isnan(drawn), np.inf, drawn)
    # order statistics, not interpolation: between a number and infinity there is nothing to interpolate
    low, high = np.quantile(costly, [tail, 1.0 - tail], method="nearest")
    return Estimate(float(value), float(low), float(high))
