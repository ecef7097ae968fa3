"""Telemetry faults to train under: scrapes that fail and scrapes that freeze."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from rl_autoscale.fleet.state import ClassTelemetry, FleetState, FloatArray, PoolTelemetry


@dataclass(frozen=True, slots=True)
class TelemetryFaults:
    """Probabilities per control step and fleet.

    Attributes:
        missing: the whole observation is missing (every field NaN).
        frozen: the previous observation is delivered again, older by one interval.
    """

    missing: float = 0.0
    frozen: float = 0.0

    def corrupt(self, state: FleetState, previous: FleetState | None, draws: FloatArray) -> FleetState:
        """Return what a controller would see.

        Args:
            state: with one leading fleet dimension.
            previous: what it saw a step before; None at the beginning.
            draws: a number in [0, 1) of each fleet, shape (num_fleets,).
        """
        draw = draws[:, None, None]
        pools, classes = state.pools.to_matrix(), state.classes.to_matrix()
        if previous is not None:
            frozen = (draw >= self.missing) & (draw < self.missing + self.frozen) & (state.window_s > 0)[:, None, None]
            old_pools, old_classes = previous.pools.to_matrix(), previous.classes.to_matrix()
            elapsed_s = (state.time_s - previous.time_s)[:, None]
            old_pools[..., -1] += elapsed_s  # age_s is the last field of both
            old_classes[..., -1] += elapsed_s
            pools = np.where(frozen, old_pools, pools)
            classes = np.where(frozen, old_classes, classes)
        pools = np.where(draw < self.missing, np.nan, pools)
        classes = np.where(draw < self.missing, np.nan, classes)
        return replace(
            state, pools=PoolTelemetry.from_matrix(pools), classes=ClassTelemetry.from_matrix(classes), stages=None
        )
