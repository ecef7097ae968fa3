"""Where a learned policy was trained, feature by feature, and how to notice that a live fleet has left that place.

The bounds of each feature are quantiles of training, widened by a margin. One feature outside its bounds means little
(a hundred features leave a 0.1 % tail often), so training also says how many are outside at once on its worst ordinary
step; more than that is unusual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BOUND_SHARES = (0.001, 0.999)
USUAL_SHARE = 0.999
_MARGIN_SHARE = 0.25
_SMALLEST_MARGIN = 0.1
_USUAL_SHARE_OF_FEATURES = 0.1
"""Of the features may be outside when a card does not say how many usually are (cards of older versions)."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """Bounds of a policy's observations.

    Attributes:
        names: of the features, in the order of the observation.
        low, high: shape (num_features,).
        usually_outside: features outside their widened bounds at once, on an ordinary step.
    """

    names: tuple[str, ...]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    usually_outside: int

    @staticmethod
    def fit(observations: npt.ArrayLike, names: Sequence[str]) -> Envelope:
        """Bounds of observations of any leading shape; at least one."""
        flat = np.asarray(observations, dtype=np.float64).reshape(-1, len(names))
        low, high = np.round(np.quantile(flat, BOUND_SHARES, axis=0), 4)
        bounds = Envelope(tuple(names), low, high, 0)
        usual = int(np.quantile(bounds._outside(flat).sum(axis=-1), USUAL_SHARE))
        return Envelope(bounds.names, low, high, usual)

    @staticmethod
    def from_card(card: Mapping[str, Any]) -> Envelope | None:
        """The envelope of an exported policy; None when its card has none, or one of other features."""
        training = card.get("training", {})
        bounds = training.get("envelope") or {}
        names = tuple(card["features"])
        if set(bounds) != set(names):
            return None
        table = np.array([bounds[name] for name in names], dtype=np.float64)
        default = max(1, round(_USUAL_SHARE_OF_FEATURES * len(names)))
        return Envelope(names, table[:, 0], table[:, 1], int(training.get("envelope_outside", default)))

    def to_card(self) -> dict[str, Any]:
        """Entries of the card's ``training`` section."""
        bounds = {name: [float(a), float(b)] for name, a, b in zip(self.names, self.low, self.high, strict=True)}
        return {"envelope": bounds, "envelope_outside": self.usually_outside}

    def outside(self, observation: npt.NDArray[np.floating]) -> tuple[str, ...]:
        """Names of the features outside their widened bounds, for one observation."""
        return tuple(self.names[k] for k in np.flatnonzero(self._outside(np.asarray(observation, dtype=np.float64))))

    def _outside(self, observations: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        margin = np.maximum(_MARGIN_SHARE * (self.high - self.low), _SMALLEST_MARGIN)
        return (observations < self.low - margin) | (observations > self.high + margin)
