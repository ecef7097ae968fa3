"""Constants of a policy: what its laws are set to, beside its actions.

| constant | neutral | what it does |
|---|---|---|
| hysteresis | 0 | share of the replicas wanted that a pool may have more of before it gives any back (envs/action.py) |
| selectivity | 0 | how much more readily requests of much work are refused (fleet/admission.py) |
| cap_share | 1 | requests in flight per replica over what the load allows (fleet/in_flight.py) |
| found_share | 0 | share of the fleet it finds that a pool keeps at least, forgotten over 900 s (envs/action.py) |
| least_replicas | 0 | replicas that a pool keeps at least, of a policy adapted to one fleet (envs/action.py) |

Each is one number, or several for prices of a miss that cover the dial's range evenly in their logarithm: how long to
keep a replica that is not needed now depends on what a miss costs. Between two of these prices a constant is
interpolated. They are no actions because noise in them teaches a policy little: a direct search finds them
(experiments/offset_search.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from rl_autoscale.envs.reward import PRICE_RANGE
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.state import FloatArray

ByPrice = float | tuple[float, ...]
"""One number for all prices, or several from the cheapest to the dearest."""


class ConstantsInForce(NamedTuple):
    """The constants at the prices in force, each of the shape of these."""

    hysteresis: FloatArray
    selectivity: FloatArray
    cap_share: FloatArray
    found_share: FloatArray
    least_replicas: FloatArray


CONSTANTS = ConstantsInForce._fields
MOST = {"found_share": 1.0}
"""The largest value of a constant that has one."""


@dataclass(frozen=True, slots=True)
class Constants:
    """A policy's constants.

    Args:
        hysteresis: >= 0.
        selectivity: >= 0.
        cap_share: > 0; at the law's own value, the engine's limit still holds.
        found_share: 0 to 1; with more, a policy that begins anew again and again would grow its fleet.
        least_replicas: >= 0, a number of one fleet: a policy for many has 0.
        miss_price: the prices at which the first and the last of several values hold.

    Raises:
        SpecError: a value is not allowed, or there are several for one price.
    """

    hysteresis: ByPrice = 0.0
    selectivity: ByPrice = 0.0
    cap_share: ByPrice = 1.0
    found_share: ByPrice = 0.0
    least_replicas: ByPrice = 0.0
    miss_price: tuple[float, float] = PRICE_RANGE

    def __post_init__(self) -> None:
        for name in CONSTANTS:
            object.__setattr__(self, name, _checked(name, getattr(self, name), self.miss_price))

    def at(self, miss_price: FloatArray | float) -> ConstantsInForce:
        """What holds at prices of any shape; beyond the range, what does at its ends."""
        price = np.asarray(miss_price, dtype=np.float64)
        return ConstantsInForce(*(self._at(getattr(self, name), price) for name in CONSTANTS))

    def _at(self, value: ByPrice, price: FloatArray) -> FloatArray:
        if isinstance(value, float):
            return np.full(price.shape, value)
        low, high = np.log(self.miss_price)
        return np.asarray(np.interp(np.log(price), np.linspace(low, high, len(value)), value))

    def over(self, miss_price: tuple[float, float]) -> Constants:
        """The same for a dial of another range: what held at its prices, or at the nearest."""
        if miss_price == self.miss_price:
            return self
        low, high = miss_price
        values = {}
        for name in CONSTANTS:
            value = getattr(self, name)
            if not isinstance(value, float):
                prices = np.geomspace(low, high, len(value)) if low < high else np.array([low])
                values[name] = tuple(self._at(value, prices).tolist())
        return replace(self, **values, miss_price=miss_price)

    def to_card(self) -> dict[str, float | list[float]]:
        """Entries of a policy's card, by name."""
        values = {name: getattr(self, name) for name in CONSTANTS}
        return {name: value if isinstance(value, float) else list(value) for name, value in values.items()}


def mean_constants(several: Sequence[Constants]) -> Constants:
    """The mean of constants whose prices are the same; of those that all agree on, what they are."""
    first, values = several[0], {}
    for name in CONSTANTS:
        given = [getattr(item, name) for item in several]
        if any(value != given[0] for value in given):
            count = max(len(value) if isinstance(value, tuple) else 1 for value in given)
            low, high = first.miss_price
            prices = np.geomspace(low, high, count)
            values[name] = tuple(np.mean([getattr(item.at(prices), name) for item in several], axis=0).tolist())
    return replace(first, **values)


def _checked(name: str, value: Any, miss_price: tuple[float, float]) -> ByPrice:
    """One float, or a tuple of them; a list of equal numbers is one."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    most = MOST.get(name, np.inf)
    allowed = all(
        isinstance(item, int | float) and not isinstance(item, bool) and np.isfinite(item) and 0.0 <= item <= most
        for item in values
    )
    if not (values and allowed) or (name == "cap_share" and min(values) == 0.0):
        bounds = "more than 0" if name == "cap_share" else "at least 0" if most == np.inf else f"0 to {most:g}"
        raise SpecError(f"{name}={value!r} is not allowed; it must be {bounds}, one number or several by price")
    if len(set(values)) == 1:
        return float(values[0])
    if not miss_price[0] < miss_price[1]:
        raise SpecError(f"{name}={value!r} has {len(values)} values for one price, {miss_price[0]:g}; give one")
    return tuple(float(item) for item in values)
