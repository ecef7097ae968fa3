"""How strictly to refuse, corrected by what became of it: what a policy's admission is measured by.

A request is refused when its expected first token is later than ``admission * ttft_slo_s`` (fleet/admission.py). What
is expected rests on a latency profile, which is off by a quarter at times, and says nothing of the pace of tokens after
the first. Whether it was right is seen afterwards: requests that were let in and came late say that it was too
hopeful, and where none is late while some are refused it was too careful. So with each window's requests

    octaves += GAIN x (late - LATE_PER_REFUSED x refused) / (late and refused of the last minutes + what is negligible)

and admission is ``2 ** -octaves`` times what a policy says. It is a feedback, and needs no model: in balance about a
quarter of those that miss are late, near which the bill was lowest for replicas a quarter slower and faster than their
profile, for long prompts with short answers, and for a first token due in 0.6 to 30 s (docs/learner.md).

Beside other classes a request may be late through them, and behind one of several pools through that pool alone: there
it does nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, FloatArray

LATE_PER_REFUSED = 0.3
"""Late requests for each one refused, in balance."""
GAIN = 0.5
TIME_CONSTANT_S = 120.0
"""In which requests that missed are forgotten."""
NEGLIGIBLE = 0.005
"""Share of the arrivals that may miss before it says much."""
LAXEST, STRICTEST = -1.0, 1.0
"""Octaves. Some answers of two or three tokens are late whatever is refused: there it would go on for ever."""


class StrictnessCorrection:
    """What refusal was found to be off by, where one pool serves one interactive class; elsewhere nothing.

    Args:
        spec: the fleet.
        batch_shape: leading dimensions, () for one fleet.

    Attributes:
        octaves: by which to be stricter, shape (..., num_classes); negative where refusal is too strict.
    """

    def __init__(self, spec: FleetSpec, batch_shape: tuple[int, ...] = ()) -> None:
        self._corrects = spec.is_simple and spec.classes[0].kind == "interactive"
        shape = (*batch_shape, len(spec.classes))
        self.octaves: FloatArray = np.zeros(shape)
        self._missed, self._arrived = np.zeros(shape), np.zeros(shape)

    def reset(self, which: npt.NDArray[np.bool_] | None = None) -> None:
        """Forget, for all fleets or those selected by a boolean array of the batch shape."""
        chosen = ... if which is None else which
        for remembered in (self.octaves, self._missed, self._arrived):
            remembered[chosen] = 0.0

    def adopt(self, other: StrictnessCorrection, which: npt.NDArray[np.bool_]) -> None:
        """Take over what a correction of fewer fleets knows, for the selected ones."""
        for name in ("octaves", "_missed", "_arrived"):
            getattr(self, name)[which] = getattr(other, name)

    def update(self, state: FleetState) -> None:
        """Count one window; one that cannot be read, is old, or in which nothing could be refused says nothing."""
        if not self._corrects:
            return
        classes, window_s = state.classes, np.asarray(state.window_s)[..., None]
        late = (classes.finished_per_s - classes.met_per_s) * window_s
        refused, arrived = classes.refused_per_s * window_s, classes.arrivals_per_s * window_s
        fresh = np.isfinite(classes.admission) & ~(classes.age_s >= np.maximum(window_s, 1e-9))
        counts = fresh & np.isfinite(late + refused + arrived)
        kept = np.where(counts, np.exp(-window_s / TIME_CONSTANT_S), 1.0)
        self._missed = self._missed * kept + np.where(counts, late + refused, 0.0)
        self._arrived = self._arrived * kept + np.where(counts, arrived, 0.0)
        step = GAIN * (late - LATE_PER_REFUSED * refused) / (self._missed + NEGLIGIBLE * self._arrived + 1.0)
        self.octaves = np.clip(self.octaves + np.where(counts, step, 0.0), LAXEST, STRICTEST)
