"""Exponential smoothing with a damped trend and an optional season, written plainly.

Additive Holt-Winters with a damped trend, for a value y observed at equal steps:

    level  <- alpha (y - season[s]) + (1 - alpha) (level + phi trend)
    trend  <- beta (level - old level) + (1 - beta) phi trend
    season[s] <- gamma (y - level) + (1 - gamma) season[s]
    forecast h steps ahead: level + (phi + ... + phi^h) trend + season of that step

With gamma or the number of seasonal slots at zero this is Holt's damped linear method. The recursion is the steady
state of a local-linear-trend Kalman filter.

Source: Hyndman and Athanasopoulos, Forecasting: Principles and Practice, sections 8.2-8.3; Gardner and McKenzie 1985.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from rl_autoscale.fleet.state import FloatArray


@dataclass(slots=True)
class HoltWinters:
    """One series.

    Attributes:
        alpha: weight of the newest value in the level, 0..1.
        beta: weight of the newest change in the trend, 0..1.
        phi: damping of the trend per step, 0..1; 1 is a straight line.
        gamma: weight of the newest deviation in the season, 0..1.
        num_slots: seasonal slots; 0: no season.
        steps_per_slot: steps that share a slot.
    """

    alpha: float
    beta: float
    phi: float = 1.0
    gamma: float = 0.0
    num_slots: int = 0
    steps_per_slot: int = 1
    level: float = math.nan
    trend: float = 0.0
    season: FloatArray = field(default_factory=lambda: np.zeros(0))
    _step: int = 0

    def __post_init__(self) -> None:
        self.season = np.zeros(max(self.num_slots, 1))

    def _slot(self, step: int) -> int:
        return (step // self.steps_per_slot) % len(self.season)

    def update(self, value: float) -> None:
        """Take in the next step's value; NaN (a gap) only moves the season on."""
        slot = self._slot(self._step)
        self._step += 1
        if math.isnan(value):
            return
        if math.isnan(self.level):
            self.level = value
            return
        old = self.level
        self.level = self.alpha * (value - self.season[slot]) + (1.0 - self.alpha) * (old + self.phi * self.trend)
        self.trend = self.beta * (self.level - old) + (1.0 - self.beta) * self.phi * self.trend
        if self.num_slots > 0:
            self.season[slot] += self.gamma * (value - self.level - self.season[slot])

    def forecast(self, num_steps: int) -> FloatArray:
        """Values expected 1, 2, ..., ``num_steps`` steps ahead, shape (num_steps,); NaN before the first value."""
        damping = np.cumsum(self.phi ** np.arange(1, num_steps + 1))
        season = np.array([self.season[self._slot(self._step + k)] for k in range(num_steps)])
        return np.asarray(self.level + damping * self.trend + season)
