"""The cheapest replica plan for known work, by exact dynamic programming over a fluid model of one pool.

The model, on steps t = 0..T-1 of equal length (all numbers are integers):

- a replica asked for at the start of step t serves from step t + L on, if it stays asked for: with ``asked_for`` n, the
  ready replicas are min(n[t-L..t]), and min(initial, n[0..t]) while t < L; newest starts are cancelled first;
- a ready replica does m quanta of work per step; at least ``least_ready[t]`` replicas must be ready (urgent work, which
  cannot wait, by its peak in the step), and urgent work takes ``urgent_quanta[t]`` of the capacity;
- the rest serves the backlog of deferrable work; at the end of step t it may hold at most ``backlog_bound[t]`` quanta.
  With the bound equal to what arrived within the allowed wait, that is exactly "first come first served, nobody waits
  longer";
- cost is the sum of n[t] over steps: a starting replica costs as much as a ready one.

What cannot be met (work before anything can start, or beyond ``max_replicas``) is minimised first, cost second.

Why the plan needs no memory of pending starts: bridging a gap of g steps costs g by keeping a replica and L by
starting it again, so the best plan over ready replicas r with cost r[t] + L * max(0, r[t] - r[t-1]) equals the best
plan over n, and n[t] = max(r[t..t+L]) realises it. That leaves (r, backlog) as the state, and the step between two r
costs one prefix and one suffix minimum: O(T * replicas * backlog levels).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import IntArray


@dataclass(frozen=True, slots=True)
class FluidProblem:
    """Known work of one pool on a grid of T steps; see the module for the model.

    Attributes:
        least_ready: shape (T,), replicas that urgent work needs ready.
        urgent_quanta: shape (T,), work that urgent requests take.
        deferrable_quanta: shape (T,), work that arrives during the step and may wait.
        backlog_bound: shape (T,), deferrable work that may be left at the end of the step.
        quanta_per_replica_step: m, >= 1.
        startup_steps: L, >= 0.
        initial: replicas ready at step 0.
        min_replicas: least n.
        max_replicas: largest n.
    """

    least_ready: IntArray
    urgent_quanta: IntArray
    deferrable_quanta: IntArray
    backlog_bound: IntArray
    quanta_per_replica_step: int
    startup_steps: int
    initial: int
    min_replicas: int
    max_replicas: int

    def __post_init__(self) -> None:
        lengths = {len(array) for array in self.arrays()}
        if len(lengths) != 1 or 0 in lengths:
            raise SpecError(f"a fluid problem needs four arrays of one length >= 1; got lengths {sorted(lengths)}")
        if any((array < 0).any() for array in self.arrays()):
            raise SpecError("a fluid problem holds a negative count; all work and bounds must be >= 0")
        if not 0 <= self.min_replicas <= self.initial <= self.max_replicas:
            raise SpecError(
                f"initial={self.initial} must be within min_replicas={self.min_replicas}.."
                f"max_replicas={self.max_replicas}"
            )
        if self.quanta_per_replica_step < 1 or self.startup_steps < 0:
            raise SpecError(
                f"quanta_per_replica_step={self.quanta_per_replica_step} must be >= 1 and "
                f"startup_steps={self.startup_steps} >= 0"
            )

    def arrays(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """The four (T,) arrays."""
        return self.least_ready, self.urgent_quanta, self.deferrable_quanta, self.backlog_bound


@dataclass(frozen=True, slots=True)
class FluidPlan:
    """An optimal plan.

    Attributes:
        asked_for: shape (T,), n.
        ready: shape (T,), replicas that serve.
        cost_replica_steps: the sum of ``asked_for``.
        shortage_quanta: work that could not be done in time by any plan.
    """

    asked_for: IntArray
    ready: IntArray
    cost_replica_steps: int
    shortage_quanta: int


def ready_replicas(asked_for: IntArray, startup_steps: int, initial: int) -> IntArray:
    """Replicas that serve in each step, given those asked for; shape (T,)."""
    ready = np.empty_like(asked_for)
    for t in range(len(asked_for)):
        held = int(asked_for[max(0, t - startup_steps) : t + 1].min())
        ready[t] = held if t >= startup_steps else min(initial, held)
    return ready


def shortage_quanta(problem: FluidProblem, ready: IntArray) -> int:
    """Work not done in time with the given replicas ready; what is late is given up and leaves the backlog."""
    backlog = shortage = 0
    m = problem.quanta_per_replica_step
    for t, replicas in enumerate(ready):
        free = max(0, int(replicas) * m - int(problem.urgent_quanta[t]))
        left = max(0, backlog + int(problem.deferrable_quanta[t]) - free)
        backlog = min(left, int(problem.backlog_bound[t]))
        shortage += left - backlog + m * max(0, int(problem.least_ready[t]) - int(replicas))
    return shortage


def solve_fluid(problem: FluidProblem) -> FluidPlan:
    """Minimise (shortage, cost) in this order, exactly.

    Args:
        problem: the known work; time and memory grow with T * (max - min replicas + 1) * (largest backlog bound + 1).

    Returns:
        An optimal plan; the same one every time.
    """
    choices = _backward(problem)
    ready = _forward(problem, choices)
    asked_for = np.array([ready[t : t + problem.startup_steps + 1].max() for t in range(len(ready))], dtype=np.int64)
    return FluidPlan(
        asked_for=asked_for,
        ready=ready_replicas(asked_for, problem.startup_steps, problem.initial),
        cost_replica_steps=int(asked_for.sum()),
        shortage_quanta=shortage_quanta(problem, ready),
    )


def _backward(problem: FluidProblem) -> npt.NDArray[np.uint16]:
    """Best row of the next r, for every step, previous r and backlog: shape (T, rows, levels)."""
    replicas = np.arange(problem.min_replicas, problem.max_replicas + 1, dtype=np.int64)[:, None]
    backlog = np.arange(int(problem.backlog_bound.max()) + 1, dtype=np.int64)[None, :]
    rows = np.arange(len(replicas), dtype=np.int64)[:, None]
    num_steps, num_rows, startup = len(problem.least_ready), len(replicas), problem.startup_steps
    penalty = num_steps * (problem.max_replicas + 1) * (startup + 1) + 1  # one quantum outweighs every possible cost
    value = np.zeros((num_rows, backlog.shape[1]), dtype=np.int64)
    choices = np.empty((num_steps, *value.shape), dtype=np.uint16)
    for t in range(num_steps - 1, -1, -1):
        # Cost and row travel in one integer, so that a running minimum is a running argmin too.
        keyed = _stay_cost(problem, t, replicas, backlog, penalty, value) * num_rows + rows
        best = np.minimum.accumulate(keyed, axis=0)  # keep or drop: any r <= the previous one
        if t >= startup and num_rows > 1:
            restart = keyed + startup * replicas * num_rows
            above = np.minimum.accumulate(restart[::-1], axis=0)[::-1][1:]  # grow: any r > the previous one
            best[:-1] = np.minimum(best[:-1], above - startup * replicas[:-1] * num_rows)
        value, choices[t] = best // num_rows, best % num_rows
    return choices


def _stay_cost(
    problem: FluidProblem, t: int, replicas: IntArray, backlog: IntArray, penalty: int, value: IntArray
) -> IntArray:
    """Cost of step t and all that follow with r replicas ready and a backlog at its start, shape (rows, levels)."""
    m, bound = problem.quanta_per_replica_step, int(problem.backlog_bound[t])
    free = np.maximum(replicas * m - problem.urgent_quanta[t], 0)
    left = np.maximum(backlog + problem.deferrable_quanta[t] - free, 0)
    kept = np.minimum(left, bound)
    shortage = left - kept + m * np.maximum(problem.least_ready[t] - replicas, 0)
    return np.asarray(replicas + penalty * shortage + np.take_along_axis(value, kept, axis=1), dtype=np.int64)


def _forward(problem: FluidProblem, choices: npt.NDArray[np.uint16]) -> IntArray:
    """Follow the best rows from the initial replicas and an empty backlog; shape (T,)."""
    ready = np.empty(len(choices), dtype=np.int64)
    row, backlog = problem.initial - problem.min_replicas, 0
    for t in range(len(choices)):
        row = int(choices[t, row, backlog])
        ready[t] = problem.min_replicas + row
        free = max(0, int(ready[t]) * problem.quanta_per_replica_step - int(problem.urgent_quanta[t]))
        left = max(0, backlog + int(problem.deferrable_quanta[t]) - free)
        backlog = min(left, int(problem.backlog_bound[t]))
    return ready
