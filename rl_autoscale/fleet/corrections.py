"""What refusal and the batch cap were found to be off by, corrected by what became of them.

Both rest on a latency profile, which is off by a quarter at times, and on the mean request. Whether they were right is
seen afterwards, so each is a feedback on what it can mend, and needs no model: with each window's requests

    octaves += GAIN x (too lax - BALANCE x too strict) / (both, in the last minutes, + what is negligible)

and what a policy is relative to is ``2 ** -octaves`` times what it was.

| | too lax | too strict | range |
|---|---|---|---|
| refusal (fleet/admission.py): `StrictnessCorrection` | late first tokens, slow answers | refused | half to twice |
| batch cap (fleet/in_flight.py): `CapCorrection` | slow answers | refused, late first tokens | a quarter to once |

A request is refused when its expected first token is later than ``admission * ttft_slo_s``. Late ones that were let in
say that this was too hopeful, and where none is late while some are refused it was too careful. A *slow* answer had its
first token in time and came late by the pace of the others, which prompts computed beside it break: both fewer requests
let in and fewer at once on a replica mend that, and waiting is the price. Answers of a few tokens are not counted
(`SHORT_ANSWER_TOKENS`): nothing here mends those, nor what misses a deadline alone. In balance about a quarter of those
that miss are late, near which the bill was lowest for replicas a quarter slower and faster than their profile, for long
prompts with short answers, and for a first token due in 0.6 to 30 s (docs/design/decision-process.md).

Beside other classes a request may be late through them, and behind one of several pools through that pool alone: there
neither does anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import ClassTelemetry, FleetState, FloatArray

BALANCE = 0.3
"""Requests for which it was too lax, for each one for which it was too strict."""
GAIN = 0.5
TIME_CONSTANT_S = 120.0
"""In which requests that missed are forgotten."""
NEGLIGIBLE = 0.005
"""Share of the arrivals that may miss before it says much."""


class _Correction(ABC):
    """A correction by feedback, where one pool serves one interactive class; elsewhere nothing.

    Args:
        corrects: whether the fleet is one of those.
        shape: of what is corrected, leading dimensions first.

    Attributes:
        octaves: by which to be stricter, of that shape, from LAXEST to STRICTEST.
    """

    LAXEST: ClassVar[float]
    STRICTEST: ClassVar[float]

    def __init__(self, corrects: bool, shape: tuple[int, ...]) -> None:
        self._corrects = corrects
        self.octaves: FloatArray = np.zeros(shape)
        self._missed, self._arrived = np.zeros(shape), np.zeros(shape)

    @property
    def factor(self) -> FloatArray:
        """What to multiply by, of the shape of what is corrected; 1 where nothing is."""
        return np.asarray(2.0**-self.octaves)

    def reset(self, which: npt.NDArray[np.bool_] | None = None) -> None:
        """Forget, for all fleets or those selected by a boolean array of the batch shape."""
        chosen = ... if which is None else which
        for remembered in (self.octaves, self._missed, self._arrived):
            remembered[chosen] = 0.0

    def adopt(self, other: _Correction, which: npt.NDArray[np.bool_]) -> None:
        """Take over what a correction of fewer fleets knows, for the selected ones."""
        for name in ("octaves", "_missed", "_arrived"):
            getattr(self, name)[which] = getattr(other, name)

    def update(self, state: FleetState) -> None:
        """Count one window; one that cannot be read, is old, or in which nothing could be refused says nothing."""
        if not self._corrects:
            return
        classes, window_s = state.classes, np.asarray(state.window_s)[..., None]
        too_lax, too_strict = (per_s * window_s for per_s in self._evidence(classes))
        arrived = classes.arrivals_per_s * window_s
        fresh = np.isfinite(classes.admission) & ~(classes.age_s >= np.maximum(window_s, 1e-9))
        counts = fresh & np.isfinite(too_lax + too_strict + arrived)
        kept = np.where(counts, np.exp(-window_s / TIME_CONSTANT_S), 1.0)
        self._missed = self._missed * kept + np.where(counts, too_lax + too_strict, 0.0)
        self._arrived = self._arrived * kept + np.where(counts, arrived, 0.0)
        step = GAIN * (too_lax - BALANCE * too_strict) / (self._missed + NEGLIGIBLE * self._arrived + 1.0)
        self.octaves = np.clip(self.octaves + np.where(counts, step, 0.0), self.LAXEST, self.STRICTEST)

    @abstractmethod
    def _evidence(self, classes: ClassTelemetry) -> tuple[FloatArray, FloatArray]:
        """Requests per second for which it was too lax, and for which it was too strict."""


class StrictnessCorrection(_Correction):
    """How much more strictly to refuse than a policy says, by class.

    Args:
        spec: the fleet.
        batch_shape: leading dimensions, () for one fleet.
    """

    LAXEST, STRICTEST = -1.0, 1.0

    def __init__(self, spec: FleetSpec, batch_shape: tuple[int, ...] = ()) -> None:
        super().__init__(_is_corrected(spec), (*batch_shape, len(spec.classes)))

    def _evidence(self, classes: ClassTelemetry) -> tuple[FloatArray, FloatArray]:
        return classes.late_first_tokens_per_s + classes.slow_answers_per_s, classes.refused_per_s


class CapCorrection(_Correction):
    """How much less to have in flight than the mean request allows, by pool.

    Args:
        spec: the fleet.
        batch_shape: leading dimensions, () for one fleet.
    """

    LAXEST, STRICTEST = 0.0, 2.0

    def __init__(self, spec: FleetSpec, batch_shape: tuple[int, ...] = ()) -> None:
        super().__init__(_is_corrected(spec), (*batch_shape, len(spec.pools)))

    def _evidence(self, classes: ClassTelemetry) -> tuple[FloatArray, FloatArray]:
        return classes.slow_answers_per_s, classes.refused_per_s + classes.late_first_tokens_per_s


def _is_corrected(spec: FleetSpec) -> bool:
    return spec.is_simple and spec.classes[0].kind == "interactive"
