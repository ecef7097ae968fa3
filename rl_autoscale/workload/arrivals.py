"""From a rate curve and a gap law to arrival times.

Every generator is the same two steps. A *rate curve* says how many requests per second are expected at each moment
(`curves.py` makes them). A *gap law* says how evenly they come: a renewal process of unit rate is drawn in
operational time and mapped back through the inverse of the cumulative rate, so the expected count in every interval
is the curve's integral whatever the law, and the gaps' coefficient of variation is the law's wherever the rate is
locally constant.

Reference: Gerhardt and Nelson, "Transforming renewal processes for simulation of nonstationary arrival processes",
INFORMS Journal on Computing 21(4), 2009, the inversion method with an equilibrium first gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.trace import FloatArray

GapKind = Literal["gamma", "weibull"]

MAX_EXPECTED_ARRIVALS = 200_000_000
"""Refuse larger draws: 8 bytes each and a mistyped rate would take the machine's memory."""

MAX_GAP_CV = 100.0
"""Beyond this a law of unit mean is all zeros and one giant gap in double precision."""


@dataclass(frozen=True, slots=True, eq=False)
class RateCurve:
    """Expected requests per second, constant between edges and zero outside.

    Attributes:
        edges_s: shape (K + 1,), float64, strictly increasing from 0.
        rate_per_s: shape (K,), float64, >= 0.

    Raises:
        SpecError: when any of this does not hold.
    """

    edges_s: FloatArray
    rate_per_s: FloatArray

    def __post_init__(self) -> None:
        """Check shapes, order and sign."""
        edges, rates = np.asarray(self.edges_s, dtype=np.float64), np.asarray(self.rate_per_s, dtype=np.float64)
        object.__setattr__(self, "edges_s", edges)
        object.__setattr__(self, "rate_per_s", rates)
        if rates.ndim != 1 or rates.size == 0 or edges.shape != (rates.size + 1,):
            raise SpecError(
                f"rate curve: {edges.size} edges do not bound {rates.size} rates; give one edge more than rates"
            )
        if not (np.isfinite(edges).all() and edges[0] == 0 and (np.diff(edges) > 0).all()):
            raise SpecError("rate curve: edges_s must be finite and strictly increasing from 0")
        if not (np.isfinite(rates).all() and rates.min() >= 0):
            bad = int(np.flatnonzero(~(rates >= 0) | ~np.isfinite(rates))[0])
            raise SpecError(f"rate curve: rate_per_s[{bad}]={rates[bad]} must be finite and not negative")

    @property
    def span_s(self) -> float:
        """Length of the curve."""
        return float(self.edges_s[-1])

    @property
    def mean_rate_per_s(self) -> float:
        """Time average of the rate."""
        return float(self.rate_per_s @ np.diff(self.edges_s)) / self.span_s

    def turned(self, start_s: float) -> RateCurve:
        """The same curve from another place on: what lies before it follows after the end."""
        start_s %= self.span_s
        if start_s == 0.0:
            return self
        first = int(np.searchsorted(self.edges_s, start_s, side="right")) - 1  # the piece in which it begins
        later, sooner = self.edges_s[first + 1 :] - start_s, self.edges_s[1 : first + 1] + self.span_s - start_s
        edges = np.concatenate([[0.0], later, sooner, [self.span_s]])
        rates = np.concatenate([self.rate_per_s[first:], self.rate_per_s[: first + 1]])
        kept = np.diff(edges) > 0  # of a start on an edge nothing is left of its piece at the end
        return RateCurve(np.append(edges[:-1][kept], self.span_s), rates[kept])

    def scaled(self, factor: float) -> RateCurve:
        """The same shape with every rate multiplied."""
        return RateCurve(self.edges_s, self.rate_per_s * factor)


@dataclass(frozen=True, slots=True)
class GapLaw:
    """The law of inter-arrival gaps in operational time (unit mean).

    Attributes:
        cv: coefficient of variation, standard deviation over mean; 0 is a clock, 1 is Poisson, real traffic is often
            above 1.
        kind: gamma (shape 1/cv²) or weibull (heavier tail at the same cv > 1).

    Raises:
        SpecError: when cv is negative, not finite or above `MAX_GAP_CV`.
    """

    cv: float = 1.0
    kind: GapKind = "gamma"

    def __post_init__(self) -> None:
        """Check the range and the kind."""
        if self.kind not in ("gamma", "weibull"):
            raise SpecError(f"gap law '{self.kind}' is unknown; use gamma or weibull")
        if not 0 <= self.cv <= MAX_GAP_CV:
            raise SpecError(f"cv={self.cv} of inter-arrival gaps must be between 0 and {MAX_GAP_CV:g}")

    def sample(self, rng: np.random.Generator, size: int) -> FloatArray:
        """Draw unit-mean gaps, shape (size,)."""
        if self.cv < 1e-6:
            return np.ones(size)
        if self.kind == "gamma":
            shape = 1.0 / self.cv**2
            return rng.standard_gamma(shape, size) / shape
        shape = weibull_shape(self.cv)
        return rng.weibull(shape, size) / math.gamma(1.0 + 1.0 / shape)

    def sample_first(self, rng: np.random.Generator) -> float:
        """Draw the time from an arbitrary moment to the next arrival: a uniform part of a length-biased gap.

        Without it a process would start as if an arrival had just happened, and bursty laws (cv > 1) would put more
        arrivals into the window than the rate says.
        """
        if self.cv < 1e-6:
            return float(rng.random())
        if self.kind == "gamma":  # length-biasing a Gamma adds one to its shape
            shape = 1.0 / self.cv**2
            biased = rng.standard_gamma(shape + 1.0) / shape
        else:  # x^c of a Weibull is exponential; length-biased it is Gamma(1 + 1/c)
            shape = weibull_shape(self.cv)
            biased = rng.standard_gamma(1.0 + 1.0 / shape) ** (1.0 / shape) / math.gamma(1.0 + 1.0 / shape)
        return float(rng.random() * biased)


POISSON = GapLaw()
"""Exponential gaps."""


def sample_arrivals(rng: np.random.Generator, curve: RateCurve, law: GapLaw = POISSON) -> FloatArray:
    """Draw arrival times.

    Args:
        rng: source of randomness.
        curve: expected rate over time.
        law: gap law in operational time.

    Returns:
        Shape (N,), float64, non-decreasing, within [0, curve.span_s].

    Raises:
        SpecError: when more than `MAX_EXPECTED_ARRIVALS` are expected.
    """
    cumulative = np.concatenate(([0.0], np.cumsum(curve.rate_per_s * np.diff(curve.edges_s))))
    if cumulative[-1] > MAX_EXPECTED_ARRIVALS:
        raise SpecError(
            f"a mean rate of {curve.mean_rate_per_s:g} requests/s over {curve.span_s:g} s asks for "
            f"{cumulative[-1]:.3g} requests; at most {MAX_EXPECTED_ARRIVALS:g} are drawn at once: "
            "lower the rate or the span"
        )
    operational = renewal_times(rng, float(cumulative[-1]), law)
    return np.interp(operational, cumulative, curve.edges_s)


def renewal_times(rng: np.random.Generator, horizon: float, law: GapLaw) -> FloatArray:
    """Draw a stationary renewal process of unit rate on [0, horizon]; shape (N,), non-decreasing."""
    chunks: list[FloatArray] = []
    now = law.sample_first(rng)
    while now <= horizon:
        left = horizon - now
        size = int(left + 4.0 * max(law.cv, 0.1) * math.sqrt(left)) + 16
        times = now + np.concatenate(([0.0], np.cumsum(law.sample(rng, size))))
        chunks.append(times[:-1])
        now = float(times[-1])
    times = np.concatenate(chunks) if chunks else np.empty(0)
    return times[: np.searchsorted(times, horizon, side="right")]


@cache
def weibull_shape(cv: float) -> float:
    """Shape of the Weibull law with a coefficient of variation, by bisection on the monotone cv(shape)."""

    def log_cv2_plus_1(shape: float) -> float:
        return math.lgamma(1.0 + 2.0 / shape) - 2.0 * math.lgamma(1.0 + 1.0 / shape)

    low, high, target = 0.02, 1e6, math.log1p(cv * cv)
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if log_cv2_plus_1(middle) > target else (low, middle)
    return math.sqrt(low * high)
