"""The scheduler of one replica: its sequences, and the rule that the pool's ``scheduler`` names."""

from __future__ import annotations

from dataclasses import replace

from rl_autoscale.sim.reference.request import Request
from rl_autoscale.sim.reference.schedulers import RANKS, SCHEDULERS
from rl_autoscale.sim.reference.sequences import Iteration, Sequences

__all__ = ["Iteration", "Scheduler"]


class Scheduler(Sequences):
    """Sequences under the rule of their pool; arguments as there."""

    def add(self, request: Request, now_s: float = 0.0) -> None:
        """A request arrives at the engine."""
        if (rank := RANKS.get(self.pool.scheduler)) is not None:
            rank(self, request, now_s)
        self.enqueue(request)

    def schedule(self, now_s: float) -> Iteration | None:
        """Decide the next iteration, beside which blocks are moved; None with nothing to run."""
        self.now_s = now_s
        iteration = SCHEDULERS[self.pool.scheduler](self, now_s)
        move_s, self.moved_blocks = self.moved_blocks * self.pool.block_move_s, 0
        return None if iteration is None else replace(iteration, move_s=move_s)
