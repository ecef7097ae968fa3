"""The dial, measured again on the traffic at hand.

A trained policy's card says which share of the requests it served in time at some prices, on validation traffic: the
*dial*. Other traffic has another one. Where a policy was exported with a miss forecast (experiments/miss_forecast.py),
every observation says what it would miss at each of these prices; averaged over the recent past, with the card's dial
for a beginning, that is the dial of the traffic at hand. It is the average that is turned into a price, not the moment:
one price for easy and hard moments alike buys an attainment with the least cost. What the forecast has wrong is left to
the error budget (error_budget.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rl_autoscale.fleet.state import FleetState, FloatArray

HORIZON_S = 1800.0
"""Forecasts are forgotten at this time constant."""
OPENING_S = 120.0
"""The card's dial counts as if it had been seen for so long; the two are averaged in the logarithm of misses."""
LEAST_SHARE = 1e-6


def price_for(attainment: float, dial: Sequence[Mapping[str, float]], otherwise: float) -> float:
    """The price at which the policy delivered an attainment when it was measured, interpolated between the points.

    Args:
        attainment: what is asked.
        dial: points of ``miss_price`` and ``slo_attainment``, as a card holds them.
        otherwise: the answer when there are no points.
    """
    if not dial:
        return otherwise
    points = sorted((point["miss_price"], point["slo_attainment"]) for point in dial)
    prices = np.log([price for price, _ in points])
    reached = np.maximum.accumulate([share for _, share in points])  # noise must not turn the dial round
    misses = np.log(np.maximum(1.0 - reached, 1e-6))
    return float(np.exp(np.interp(-math.log(1.0 - attainment), -misses, prices)))


class RunningDial:
    """Missed shares by price, of late.

    Args:
        dial: the card's: points of ``miss_price`` and ``slo_attainment``, at least one.
    """

    def __init__(self, dial: Sequence[Mapping[str, float]]) -> None:
        points = sorted(dial, key=lambda point: point["miss_price"])
        self.prices = np.array([point["miss_price"] for point in points])
        self._before = np.maximum(1.0 - np.array([point["slo_attainment"] for point in points]), LEAST_SHARE)
        self.reset()

    def reset(self) -> None:
        """Forget all traffic."""
        self._missed = np.zeros_like(self._before)
        self._arrived = 0.0
        self._seen_s = 0.0

    def update(self, state: FleetState, missed_share: FloatArray) -> None:
        """Take in the forecast of one observation; a window without known arrivals changes nothing.

        Args:
            state: the observation.
            missed_share: at each of ``prices``, shape (num_prices,).
        """
        window_s = float(state.window_s)
        rate_per_s = float(np.sum(state.classes.arrivals_per_s))
        if window_s <= 0 or not math.isfinite(rate_per_s):
            return
        kept = math.exp(-window_s / HORIZON_S)
        self._seen_s = kept * self._seen_s + window_s
        self._arrived = kept * self._arrived + rate_per_s * window_s
        self._missed = kept * self._missed + rate_per_s * window_s * missed_share

    def price_for(self, attainment: float) -> float:
        """The price that would have delivered an attainment, as far as is known."""
        missed = self._before
        if self._arrived > 0:
            own = self._seen_s / (self._seen_s + OPENING_S)
            forecast = self._missed / self._arrived
            missed = np.exp((1.0 - own) * np.log(missed) + own * np.log(np.maximum(forecast, LEAST_SHARE)))
        points = [
            {"miss_price": price, "slo_attainment": 1.0 - share}
            for price, share in zip(self.prices, missed, strict=True)
        ]
        return price_for(attainment, points, math.nan)
