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
import numpy.typing as npt

from rl_autoscale.fleet.state import FleetState, FloatArray

TIME_CONSTANT_S = 1800.0
"""Forecasts are forgotten at it."""
OPENING_S = 3600.0
"""The card's dial counts as if it had been seen for so long; the two are averaged in the logarithm of misses.

Bursts that have not come yet are in the card's dial and not in the forecast. Of two minutes to two and a half hours,
chosen on validation traffic (docs/policies.md).
"""
LEAST_SHARE = 1e-6


def price_at(attainment: float, prices: FloatArray, missed_share: FloatArray) -> float:
    """The cheapest price that delivers an attainment, interpolated between the logarithms of prices and of misses.

    Args:
        attainment: what is asked, in (0, 1).
        prices: ascending, shape (num_prices,).
        missed_share: at each of them; where a dearer one misses more, that is taken for noise.

    Returns:
        The first price where all deliver it, the last where none does.
    """
    asked = math.log(max(1.0 - attainment, LEAST_SHARE))
    misses = np.log(np.minimum.accumulate(np.maximum(missed_share, LEAST_SHARE)))
    enough = np.flatnonzero(misses <= asked)
    if len(enough) == 0 or enough[0] == 0:
        return float(prices[-1 if len(enough) == 0 else 0])
    below, above = enough[0] - 1, enough[0]
    way = (misses[below] - asked) / (misses[below] - misses[above])
    return float(prices[below] * (prices[above] / prices[below]) ** way)


class RunningDial:
    """Missed shares by price, of late.

    Args:
        dial: the card's: points of ``miss_price`` and attainment, at least one.
        attainment: what the points call it.
    """

    def __init__(self, dial: Sequence[Mapping[str, float]], attainment: str = "slo_attainment") -> None:
        points = sorted((point["miss_price"], point[attainment]) for point in dial)
        self.prices = np.array([price for price, _ in points])
        self._before = np.maximum(1.0 - np.array([share for _, share in points]), LEAST_SHARE)
        self.reset()

    def reset(self) -> None:
        """Forget all traffic."""
        self._missed = np.zeros_like(self._before)
        self._arrived = 0.0
        self._seen_s = 0.0

    def update(self, state: FleetState, missed_share: FloatArray, classes: npt.NDArray[np.int64]) -> None:
        """Take in the forecast of one observation; a window without arrivals, or without known ones, changes nothing.

        Args:
            state: the observation.
            missed_share: of each of the classes at each of ``prices``, shape (num_prices, len(classes)).
            classes: that count.
        """
        window_s = float(state.window_s)
        by_class = state.classes.arrivals_per_s[classes] * window_s
        arrived = float(by_class.sum())
        if not arrived > 0 or not np.isfinite([arrived, *missed_share.flat]).all():
            return
        kept = math.exp(-window_s / TIME_CONSTANT_S)
        self._seen_s = kept * self._seen_s + window_s
        self._arrived = kept * self._arrived + arrived
        self._missed = kept * self._missed + missed_share @ by_class

    def price_for(self, attainment: float) -> float:
        """The price that would have delivered an attainment, as far as is known."""
        missed = self._before
        if self._arrived > 0:
            own = self._seen_s / (self._seen_s + OPENING_S)
            forecast = np.maximum(self._missed / self._arrived, LEAST_SHARE)
            missed = np.exp((1.0 - own) * np.log(missed) + own * np.log(forecast))
        return price_at(attainment, self.prices, missed)
