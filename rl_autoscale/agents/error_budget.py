"""The error budget: how far the misses of the recent past are from those an asked attainment allows.

Site reliability engineering calls the share ``1 - attainment`` of all requests the *error budget* (Beyer et al., Site
Reliability Engineering, chapter 3). A policy that knows how much of it is spent can be asked for an attainment and
keep to it under traffic its knob was never tuned on: this is the feedback that turns the knob.

Everything it reads is counted by a live gateway.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.state import FleetState

HORIZON_S = 1800.0
"""Misses are forgotten at this time constant: a bad hour is not to be paid back for the rest of the day."""

_OPENING_S = 300.0
"""The budget begins as if this long had gone by exactly as asked, so that the first misses decide nothing alone."""

_INTEGRAL_S = 600.0
_MOST_SPENT = 2.0


def check_attainment(policy: str, attainment: object) -> None:
    """Raise SpecError unless a policy can be asked for this attainment."""
    if not (isinstance(attainment, int | float) and 0.0 < attainment < 1.0):
        raise SpecError(
            f"policy '{policy}': attainment={attainment!r} is not allowed; it must be between 0 and 1, such as 0.98"
        )


class ErrorBudget:
    """Counts misses against what is allowed, and answers by how much a knob should be raised.

    The answer is proportional and integral in the share of the budget overspent: the proportional part acts at once
    on the recent half-hour, the integral part finds the level that this traffic needs. Both are bounded, so that an
    outage does not wind the knob up beyond what a few quiet minutes take back.

    Args:
        attainment: asked share of requests that meet their SLOs, in (0, 1).
        gain: natural logarithm of the knob per budget overspent.
        bound: largest absolute value of the answer.
        classes: whose requests count; None for all.
    """

    def __init__(
        self, attainment: float, gain: float, bound: float, classes: npt.NDArray[np.int64] | None = None
    ) -> None:
        self._classes = slice(None) if classes is None else classes
        self._share = 1.0 - attainment
        self._gain = gain
        self._bound = bound
        self.reset()

    def reset(self) -> None:
        """Forget all misses."""
        self._missed = 0.0
        self._resolved = 0.0
        self._integral = 0.0
        self._rate_per_s = math.nan

    @property
    def overspent(self) -> float:
        """Misses beyond the budget, in budgets: 0 is exactly as asked, -1 no miss at all; at most 2."""
        allowed = self._allowed()
        return 0.0 if allowed <= 0.0 else min((self._missed + self._opening()) / allowed - 1.0, _MOST_SPENT)

    def _opening(self) -> float:
        return 0.0 if math.isnan(self._rate_per_s) else self._share * _OPENING_S * self._rate_per_s

    def _allowed(self) -> float:
        return self._share * self._resolved + self._opening()

    def update(self, state: FleetState) -> float:
        """Take in one observation; a window whose counts are missing changes nothing.

        Returns:
            Natural logarithm of the factor to raise the knob by, in [-bound, bound].
        """
        classes, window_s = state.classes, float(state.window_s)
        lost = classes.refused_per_s + classes.dropped_per_s
        resolved_per_s = float(np.sum((classes.finished_per_s + lost)[self._classes]))
        missed_per_s = float(np.sum((classes.finished_per_s - classes.met_per_s + lost)[self._classes]))
        if window_s > 0 and not (math.isnan(resolved_per_s) or math.isnan(missed_per_s)):
            kept = math.exp(-window_s / HORIZON_S)
            self._missed = kept * self._missed + missed_per_s * window_s
            self._resolved = kept * self._resolved + resolved_per_s * window_s
            if math.isnan(self._rate_per_s):
                self._rate_per_s = resolved_per_s
            self._rate_per_s += (1.0 - math.exp(-window_s / _OPENING_S)) * (resolved_per_s - self._rate_per_s)
            # An outage is not to be paid back for hours: what exceeds the most that counts is forgiven.
            self._missed = min(self._missed, (1.0 + _MOST_SPENT) * self._allowed())
            step = self._gain * self.overspent * window_s / _INTEGRAL_S
            self._integral = min(max(self._integral + step, -self._bound), self._bound)
        return min(max(self._integral + self._gain * self.overspent, -self._bound), self._bound)
