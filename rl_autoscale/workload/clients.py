"""Traffic as a sum of clients, each with its own rate, burstiness and lengths.

Production load is not one process: a few clients send most of it, each with its own rhythm, and the fleet sees the sum.
Reference: Xiang et al., "ServeGen: Workload characterization and generation of large language model serving in
production", NSDI 2026, sections 3-5: per-client rate curves, Gamma or Weibull gaps, per-client lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.arrivals import POISSON, GapLaw, RateCurve, sample_arrivals
from rl_autoscale.workload.curves import constant, multiply, with_noise
from rl_autoscale.workload.trace import FloatArray, Int32Array

_MAX_CLIENT_CV = 50.0


@dataclass(frozen=True, slots=True, eq=False)
class Client:
    """One source of requests: its expected rate over time and its gap law."""

    curve: RateCurve
    law: GapLaw = POISSON


@dataclass(frozen=True, slots=True)
class Population:
    """How clients differ from each other; the defaults resemble ServeGen's m-large service.

    Attributes:
        num_clients: how many send requests.
        share_sigma: standard deviation of a client's log share of traffic. 2.2 gives the largest of 139 clients about
            15-25 % and the ten largest about 70 %; ServeGen m-large has 15.5 % and 69 %, m-small (37 clients) 33 %
            and 92 %.
        cv_floor, cv_median_excess, cv_sigma: a client's gap CV is ``cv_floor + cv_median_excess * exp(cv_sigma *
            z)``, z standard normal, at most 50. 0.9, 0.3 and 2.17 reproduce m-large's rate-weighted quantiles 1.03,
            1.20, 2.2, 5.9 (25, 50, 75, 90 %).
        weibull_share: share of clients with Weibull gaps, the others are Gamma; 0.3 in m-large.
        rate_sigma: standard deviation of the log of a client's own rate around its share.
        rate_correlation_s: correlation time of that movement.
    """

    num_clients: int = 139
    share_sigma: float = 2.2
    cv_floor: float = 0.9
    cv_median_excess: float = 0.3
    cv_sigma: float = 2.17
    weibull_share: float = 0.3
    rate_sigma: float = 0.6
    rate_correlation_s: float = 3600.0

    def __post_init__(self) -> None:
        """Check signs and shares."""
        if self.num_clients < 1:
            raise SpecError(f"clients: num_clients={self.num_clients} must be at least 1")
        for name in ("share_sigma", "cv_floor", "cv_median_excess", "cv_sigma", "rate_sigma"):
            if not getattr(self, name) >= 0:
                raise SpecError(f"clients: {name}={getattr(self, name)} must not be negative")
        if not 0 <= self.weibull_share <= 1:
            raise SpecError(f"clients: weibull_share={self.weibull_share} must be between 0 and 1")
        if not self.rate_correlation_s > 0:
            raise SpecError(f"clients: rate_correlation_s={self.rate_correlation_s} must be positive")


def sample_clients(
    rng: np.random.Generator, population: Population, rate_per_s: float, span_s: float, shape: RateCurve | None = None
) -> list[Client]:
    """Draw a population of clients whose expected total is `rate_per_s`.

    Args:
        rng: source of randomness.
        population: how clients differ.
        rate_per_s: expected sum over the clients, averaged over draws.
        span_s: length of every client's curve.
        shape: relative rate over time that all clients share, for example a day; flat without it.
    """
    size = population.num_clients
    share = np.exp(population.share_sigma * rng.standard_normal(size))
    share /= share.sum()
    cv = population.cv_floor + population.cv_median_excess * np.exp(population.cv_sigma * rng.standard_normal(size))
    weibull = rng.random(size) < population.weibull_share
    base = constant(1.0, span_s) if shape is None else multiply(constant(1.0, span_s), shape)
    return [
        Client(
            with_noise(rng, base.scaled(rate_per_s * share[i]), population.rate_sigma, population.rate_correlation_s),
            GapLaw(min(float(cv[i]), _MAX_CLIENT_CV), "weibull" if weibull[i] else "gamma"),
        )
        for i in range(size)
    ]


def sum_of_clients(rng: np.random.Generator, clients: Sequence[Client]) -> tuple[FloatArray, Int32Array]:
    """Superpose clients.

    Returns:
        Arrival times, float64, non-decreasing, and the index of the client of each, int32; both of shape (N,).
    """
    arrivals = [sample_arrivals(rng, client.curve, client.law) for client in clients]
    arrival_s = np.concatenate(arrivals) if arrivals else np.empty(0)
    index = np.repeat(np.arange(len(arrivals), dtype=np.int32), [part.size for part in arrivals])
    order = np.argsort(arrival_s, kind="stable")
    return arrival_s[order], index[order]
