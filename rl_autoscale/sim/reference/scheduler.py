"""The scheduler of one replica: its sequences, and the rule that the pool's ``scheduler`` names."""

from __future__ import annotations

from rl_autoscale.sim.reference.schedulers import SCHEDULERS
from rl_autoscale.sim.reference.sequences import Iteration, Sequences

__all__ = ["Iteration", "Scheduler"]


class Scheduler(Sequences):
    """Sequences under the rule of their pool; arguments as there."""

    def schedule(self, now_s: float) -> Iteration | None:
        """Decide the next iteration; None with nothing to run."""
        return SCHEDULERS[self.pool.scheduler](self, now_s)
