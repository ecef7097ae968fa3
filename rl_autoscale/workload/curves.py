"""Rate curves: how the expected rate moves over time. Each function returns a `RateCurve` for `arrivals.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.arrivals import RateCurve
from rl_autoscale.workload.trace import FloatArray

MAX_STEPS = 5_000_000
"""A finer curve than this is a mistake of unit."""

DAY_S = 86_400.0
HOUR_S = 3_600.0

SERVEGEN_M_SMALL_HOURLY: tuple[float, ...] = (
    0.835, 0.671, 0.666, 0.658, 0.623, 0.644, 0.726, 0.810, 0.968, 1.151, 1.137, 1.113,
    1.074, 1.043, 1.071, 1.042, 1.050, 1.066, 1.062, 1.213, 1.450, 1.462, 1.347, 1.117,
)  # fmt: skip
"""Rate by hour of day relative to its mean: ServeGen m-small, days 0-7 (Xiang et al., NSDI 2026, data/language)."""

SERVEGEN_DEEPSEEK_R1_HOURLY: tuple[float, ...] = (
    1.438, 1.584, 1.475, 1.452, 1.580, 1.349, 1.116, 0.842, 0.875, 0.704, 0.951, 0.999,
    0.521, 0.317, 0.392, 0.406, 0.512, 0.627, 0.715, 0.706, 1.109, 1.485, 1.461, 1.383,
)  # fmt: skip
"""The same for ServeGen deepseek-r1, one day."""

BURSTGPT_HOURLY: tuple[float, ...] = (
    0.522, 0.334, 0.221, 0.105, 0.059, 0.052, 0.009, 0.053, 0.291, 1.080, 1.747, 2.171,
    0.942, 1.011, 1.719, 2.292, 2.058, 1.656, 1.055, 1.287, 1.594, 1.488, 1.241, 1.012,
)  # fmt: skip
"""Tokens by hour of day relative to their mean: BurstGPT week 1 (Wang et al., 2024), from third-party sums."""

HOURLY_SHAPES: dict[str, tuple[float, ...]] = {
    "servegen_m_small": SERVEGEN_M_SMALL_HOURLY,
    "servegen_deepseek_r1": SERVEGEN_DEEPSEEK_R1_HOURLY,
    "burstgpt": BURSTGPT_HOURLY,
}


def constant(rate_per_s: float, span_s: float) -> RateCurve:
    """One rate for the whole span."""
    return RateCurve(np.array([0.0, checked_span(span_s)]), np.array([rate_per_s]))


def markov_modulated(
    rng: np.random.Generator, rates_per_s: Sequence[float], mean_sojourns_s: Sequence[float], span_s: float
) -> RateCurve:
    """A continuous-time Markov chain over rates: exponential stays, then a uniform jump to another state.

    The first state is drawn by its share of time, so the curve is stationary and its mean is the sojourn-weighted
    mean rate.

    Args:
        rng: source of randomness.
        rates_per_s: one rate per state, at least two states.
        mean_sojourns_s: mean stay in each state, > 0.
        span_s: length of the curve.
    """
    sojourns = np.asarray(mean_sojourns_s, dtype=np.float64)
    num_states = len(rates_per_s)
    if num_states < 2 or sojourns.shape != (num_states,):
        raise SpecError(f"mmpp: {num_states} rates and {sojourns.size} sojourns; give one each for two states or more")
    if not (np.isfinite(sojourns).all() and sojourns.min() > 0):
        raise SpecError(f"mmpp: mean_sojourns_s={list(mean_sojourns_s)} must all be positive and finite")
    span_s = checked_span(span_s)
    if span_s > sojourns.min() * MAX_STEPS:
        raise SpecError(f"mmpp: mean_sojourns_s={sojourns.min():g} is too short for span_s={span_s:g}")
    # a uniform jump visits every state equally often, so the share of time is the sojourn's share
    state = int(rng.choice(num_states, p=sojourns / sojourns.sum()))
    edges, states = [0.0], []
    while edges[-1] < span_s:
        states.append(state)
        edges.append(edges[-1] + max(float(rng.exponential(sojourns[state])), 1e-6))
        state = (state + 1 + int(rng.integers(num_states - 1))) % num_states
    edges[-1] = span_s
    return RateCurve(np.array(edges), np.asarray(rates_per_s, dtype=np.float64)[states])


def sinusoid(rate_per_s: float, amplitude: float, period_s: float, span_s: float, phase: float = 0.0) -> RateCurve:
    """``rate_per_s * (1 + amplitude * sin(2 pi (t / period_s + phase)))`` in steps of at most period_s / 96.

    Args:
        rate_per_s: mean over a whole period.
        amplitude: 0..1.
        period_s: for example a day.
        span_s: length of the curve.
        phase: fraction of a period by which the curve is ahead.
    """
    if not 0 <= amplitude <= 1:
        raise SpecError(f"diurnal: amplitude={amplitude} must be between 0 and 1")
    if not period_s > 0:
        raise SpecError(f"diurnal: period_s={period_s} must be positive")
    edges = even_edges(span_s, period_s / 96.0)
    middle = (edges[:-1] + edges[1:]) / 2
    return RateCurve(edges, rate_per_s * (1.0 + amplitude * np.sin(2 * np.pi * (middle / period_s + phase))))


def hourly(shape: Sequence[float], rate_per_s: float, span_s: float, start_hour: float = 0.0) -> RateCurve:
    """A day's relative rate by hour, repeated, linear between the middles of the hours, in 5-minute steps.

    Args:
        shape: 24 relative rates; they are divided by their mean.
        rate_per_s: mean over a whole day.
        span_s: length of the curve.
        start_hour: hour of day at time 0.
    """
    relative = np.asarray(shape, dtype=np.float64)
    if relative.shape != (24,) or not np.isfinite(relative).all() or relative.min() < 0 or relative.sum() <= 0:
        raise SpecError(f"diurnal: an hourly shape is 24 numbers >= 0 that are not all zero, got {relative.size}")
    edges = even_edges(span_s, 300.0)
    hour = (edges[:-1] + edges[1:]) / 2 / HOUR_S + start_hour - 0.5  # hour h is centred on h + 0.5
    return RateCurve(edges, rate_per_s * np.interp(hour, np.arange(24), relative / relative.mean(), period=24.0))


def flash_crowd(
    base_per_s: float, peak_factor: float, start_s: float, ramp_s: float, hold_s: float, decay_s: float, span_s: float
) -> RateCurve:
    """A base rate, a linear ramp to ``base * peak_factor``, a plateau, then exponential decay back to the base.

    Args:
        base_per_s: rate before the crowd and long after it.
        peak_factor: >= 1, plateau over base.
        start_s: when the ramp begins.
        ramp_s: 0 is a jump.
        hold_s: length of the plateau.
        decay_s: time constant of the decay; 0 falls at once.
        span_s: length of the curve.
    """
    if not peak_factor >= 1:
        raise SpecError(f"flash_crowd: peak_factor={peak_factor} must be at least 1")
    for name, value in (("start_s", start_s), ("ramp_s", ramp_s), ("hold_s", hold_s), ("decay_s", decay_s)):
        if not value >= 0:
            raise SpecError(f"flash_crowd: {name}={value} must not be negative")
    span_s = checked_span(span_s)
    shortest = min((value for value in (ramp_s, decay_s) if value > 0), default=span_s)
    grid = even_edges(span_s, max(shortest / 20.0, span_s / 100_000))
    corners = [start_s, start_s + ramp_s, start_s + ramp_s + hold_s]
    edges = np.unique(np.concatenate((grid, [corner for corner in corners if 0 < corner < span_s])))
    since = (edges[:-1] + edges[1:]) / 2 - start_s
    rise = np.clip(since / ramp_s, 0.0, 1.0) if ramp_s > 0 else (since >= 0).astype(np.float64)
    over = np.maximum(since - ramp_s - hold_s, 0.0)
    fall = np.exp(-over / decay_s) if decay_s > 0 else (over <= 0).astype(np.float64)
    return RateCurve(edges, base_per_s * (1.0 + (peak_factor - 1.0) * rise * fall))


def log_ar1(
    rng: np.random.Generator,
    rate_per_s: float,
    sigma: float,
    correlation_time_s: float,
    span_s: float,
    step_s: float = 10.0,
) -> RateCurve:
    """``rate_per_s * exp(x - sigma²/2)``, x a stationary AR(1) of standard deviation sigma.

    In other words x is an Ornstein-Uhlenbeck process, sampled every step_s. The mean over draws is rate_per_s; one
    draw's own mean wanders, as real hours do.

    Args:
        rng: source of randomness.
        rate_per_s: mean over draws.
        sigma: standard deviation of the log rate, >= 0.
        correlation_time_s: time in which the autocorrelation falls to 1/e.
        span_s: length of the curve.
        step_s: the rate is constant for so long.
    """
    for name, value in (("correlation_time_s", correlation_time_s), ("step_s", step_s)):
        if not value > 0:
            raise SpecError(f"log_ar1: {name}={value} must be positive")
    if not 0 <= sigma <= 3:
        raise SpecError(f"log_ar1: sigma={sigma} must be between 0 and 3")
    edges = even_edges(span_s, step_s)
    noise = ar1(rng, edges.size - 1, float(np.exp(-step_s / correlation_time_s)))
    return RateCurve(edges, rate_per_s * np.exp(sigma * noise - sigma**2 / 2))


def ar1(rng: np.random.Generator, size: int, lag1: float) -> FloatArray:
    """Stationary AR(1) with zero mean, unit variance and the given lag-1 autocorrelation; shape (size,)."""
    shocks = rng.standard_normal(size)
    shocks[1:] *= np.sqrt(1.0 - lag1**2)
    values = np.empty(size)
    level = 0.0
    for i, shock in enumerate(shocks.tolist()):  # a few thousand steps at most: plain Python beats importing a filter
        level = lag1 * level + shock
        values[i] = level
    return values


def with_noise(rng: np.random.Generator, curve: RateCurve, sigma: float, correlation_time_s: float) -> RateCurve:
    """Multiply a curve by a log-AR(1) of mean 1, on edges of at most a fifth of the correlation time."""
    if sigma == 0:
        return curve
    noise = log_ar1(rng, 1.0, sigma, correlation_time_s, curve.span_s, step_s=correlation_time_s / 5.0)
    return multiply(curve, noise)


def multiply(first: RateCurve, second: RateCurve) -> RateCurve:
    """Product of two curves over the shorter span."""
    span_s = min(first.span_s, second.span_s)
    edges = np.unique(np.concatenate((first.edges_s, second.edges_s)))
    edges = edges[edges <= span_s]
    middle = (edges[:-1] + edges[1:]) / 2
    return RateCurve(edges, rate_at(first, middle) * rate_at(second, middle))


def rate_at(curve: RateCurve, time_s: FloatArray) -> FloatArray:
    """The curve's rate at times within its span; same shape as `time_s`."""
    return curve.rate_per_s[np.searchsorted(curve.edges_s[1:-1], time_s, side="right")]


def even_edges(span_s: float, step_s: float) -> FloatArray:
    """Edges from 0 to span_s in equal steps of at most step_s; raises SpecError for more than `MAX_STEPS`."""
    span_s = checked_span(span_s)
    if span_s > step_s * MAX_STEPS:
        raise SpecError(
            f"span_s={span_s:g} in steps of {step_s:.3g} s is too fine; lower the span or slow the rate down"
        )
    return np.linspace(0.0, span_s, max(1, int(np.ceil(span_s / step_s - 1e-9))) + 1)


def checked_span(span_s: float) -> float:
    """Return the span; raises SpecError unless it is positive and finite."""
    if not (np.isfinite(span_s) and span_s > 0):
        raise SpecError(f"span_s={span_s} must be a positive finite number of seconds")
    return float(span_s)
