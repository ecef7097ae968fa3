"""What an operator asks of a trained policy, turned into prices of misses: one dial for all requests, or one per class.

Asked for one attainment, all requests count alike and one price is sought. Asked for an attainment of each class, each
class has a dial of its own: the price at which the forecast says that *its* requests are served in time as asked, the
prices of the others as they stand. The dearest price is the policy's ``miss_price``, the others over it are its
``miss_weight`` (envs/reward.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rl_autoscale.agents.error_budget import ErrorBudget
from rl_autoscale.agents.running_dial import RunningDial
from rl_autoscale.envs.reward import LEAST_WEIGHT
from rl_autoscale.fleet.state import FleetState, FloatArray

GAIN = 1.5
LARGEST_FACTOR = 30.0

Forecast = Callable[[FloatArray, FloatArray], FloatArray]
"""(miss_price (num_rows,), miss_weight (num_rows, num_classes)) to missed shares (num_rows, num_classes)."""


class Dials:
    """The dials of one fleet.

    Args:
        card: points of ``miss_price`` and ``slo_attainment`` and, of several classes, ``slo_attainment/class0.KIND``.
        asked: one attainment for all classes together, or one of each.
        class_keys: the schema's names of the classes.
        price_range: prices that the policy knows.
        otherwise: price to begin with where the card has no points.
    """

    def __init__(
        self,
        card: Sequence[Mapping[str, float]],
        asked: float | Sequence[float],
        class_keys: Sequence[str],
        price_range: tuple[float, float],
        otherwise: float,
    ) -> None:
        if isinstance(asked, float):
            self._asked: tuple[float, ...] = (asked,)
            self._classes, keys = [np.arange(len(class_keys))], ["slo_attainment"]
        else:
            self._asked, keys = tuple(asked), [f"slo_attainment/{key}" for key in class_keys]
            self._classes = [np.array([c]) for c in range(len(class_keys))]
        known = [key if all(key in point for point in card) else "slo_attainment" for key in keys]
        self._dials = [RunningDial(card, key) for key in known] if card else []
        self._budgets = [
            ErrorBudget(share, GAIN, math.log(LARGEST_FACTOR), of)
            for share, of in zip(self._asked, self._classes, strict=True)
        ]
        self._range = price_range
        self._prices = np.full(len(self._asked), otherwise)
        if self._dials:
            self._prices[:] = [dial.price_for(share) for dial, share in zip(self._dials, self._asked, strict=True)]
        self._in_force = np.clip(self._prices, *price_range)

    def turn(self, state: FleetState, forecast: Forecast | None) -> tuple[float, FloatArray]:
        """Take in one observation.

        Args:
            state: the observation.
            forecast: what would be missed at each price; None leaves the card's dial as it is.

        Returns:
            ``miss_price``, and ``miss_weight`` of shape (num_classes,).
        """
        if forecast is not None and self._dials:
            self._prices = self._measured(state, forecast)
        factors = np.exp([budget.update(state) for budget in self._budgets])
        self._in_force = np.clip(self._prices * factors, *self._range)
        return self._priced(self._in_force)

    def _measured(self, state: FleetState, forecast: Forecast) -> FloatArray:
        """Each dial's price after this observation's forecasts: along its own prices, the others where they are."""
        rows = []
        for number, dial in enumerate(self._dials):
            along = np.repeat(self._in_force[None], len(dial.prices), axis=0)
            along[:, number] = dial.prices
            rows.append(along)
        priced = [self._priced(row) for row in np.concatenate(rows)]
        shares = forecast(np.array([price for price, _ in priced]), np.array([weight for _, weight in priced]))
        parts = np.split(shares, np.cumsum([len(dial.prices) for dial in self._dials])[:-1])
        found = []
        for dial, share, of, asked in zip(self._dials, parts, self._classes, self._asked, strict=True):
            dial.update(state, share[:, of], of)
            found.append(dial.price_for(asked))
        return np.array(found)

    def _priced(self, prices: FloatArray) -> tuple[float, FloatArray]:
        """Price of the dearest class, and what each costs over it."""
        by_class = np.empty(sum(len(of) for of in self._classes))
        for price, of in zip(prices, self._classes, strict=True):
            by_class[of] = price
        dearest = float(by_class.max())
        return dearest, np.maximum(by_class / dearest, LEAST_WEIGHT)
