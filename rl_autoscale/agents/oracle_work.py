"""Known requests as work over time, laid on the control grid: what the clairvoyant planner optimises over.

The approximations are listed in `rl_autoscale.agents.oracle`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rl_autoscale.agents.fluid import FluidProblem
from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.fleet.spec import FleetSpec, IntArray, ServiceClass
from rl_autoscale.fleet.state import FloatArray

MAX_SUBSTEPS = 10
"""Finest resolution of the urgent peak within one control step."""
MAX_QUANTA_PER_STEP = 20
"""Finest resolution of work: a twentieth of what a replica does in one step."""
MAX_STATES = 30_000
"""Most (replicas, backlog) states per step; to fit, work is counted more coarsely, then the backlog is kept shorter."""


@dataclass(frozen=True, slots=True)
class KnownWork:
    """The future of one pool, per class that it serves.

    Attributes:
        arrival_s: shape (n,).
        prefill_s: shape (n,), replica-seconds at full utilisation.
        decode_s: shape (n,), replica-seconds at full utilisation.
        duration_s: shape (n,), how long the decode work is spread.
        wait_s: shape (n,), the allowed wait of each request.
    """

    arrival_s: FloatArray
    prefill_s: FloatArray
    decode_s: FloatArray
    duration_s: FloatArray
    wait_s: FloatArray

    def select(self, which: npt.NDArray[np.bool_]) -> KnownWork:
        """The requests picked by a boolean array."""
        columns = (self.arrival_s, self.prefill_s, self.decode_s, self.duration_s, self.wait_s)
        return KnownWork(*(column[which] for column in columns))


def released_work_s(work: KnownWork, at_s: FloatArray) -> FloatArray:
    """Cumulative urgent work by each time: prefill counts at arrival, decode evenly over its duration."""
    slope = work.decode_s / work.duration_s
    prefill = _sum_until(work.arrival_s, work.prefill_s, at_s)
    return prefill + _ramp(work.arrival_s, slope, at_s) - _ramp(work.arrival_s + work.duration_s, slope, at_s)


def _sum_until(
    time_s: FloatArray, amount: FloatArray, at_s: FloatArray, side: Literal["left", "right"] = "left"
) -> FloatArray:
    """Sum of the amounts whose time is before each of ``at_s`` (side "right": or at it)."""
    order = np.argsort(time_s, kind="stable")
    total = np.concatenate([[0.0], np.cumsum(amount[order])])
    return np.asarray(total[np.searchsorted(time_s[order], at_s, side=side)], dtype=np.float64)


def _ramp(start_s: FloatArray, slope: FloatArray, at_s: FloatArray) -> FloatArray:
    """Sum over i of slope_i * max(0, at - start_i)."""
    return _sum_until(start_s, slope, at_s) * at_s - _sum_until(start_s, slope * start_s, at_s)


def fluid_problem(
    work: KnownWork,
    pool: PoolSpec,
    *,
    step_s: float,
    utilisation: float,
    startup_s: float,
    horizon_s: float | None = None,
) -> FluidProblem:
    """Lay known work on the control grid.

    Args:
        work: at least one request.
        pool: gives replica bounds.
        step_s: control interval.
        utilisation: share of a replica's full-batch capacity that is planned with.
        startup_s: from asking to serving.
        horizon_s: when control ends, and by when all work must be done; None waits for the last allowed moment.
    """
    if horizon_s is None:
        horizon_s = float((work.arrival_s + np.maximum(work.duration_s, work.wait_s)).max())
    num_steps = max(1, math.ceil(horizon_s / step_s - 1e-9))
    edges_s = np.arange(num_steps + 1, dtype=np.float64) * step_s
    urgent = work.select(work.wait_s <= step_s)
    waiting = work.select(work.wait_s > step_s)
    amount_s = waiting.prefill_s + waiting.decode_s
    arrived_s = _sum_until(waiting.arrival_s, amount_s, edges_s)
    due_s = _sum_until(np.minimum(waiting.arrival_s + waiting.wait_s, horizon_s), amount_s, edges_s, side="right")
    due_s = np.minimum(due_s, arrived_s)
    capacity_s = utilisation * step_s
    num_rows = pool.max_replicas - pool.min_replicas + 1
    largest_steps = float((arrived_s - due_s).max()) / capacity_s
    most_levels = MAX_STATES // num_rows
    quanta = int(np.clip(most_levels / (largest_steps + 1.0), 1, MAX_QUANTA_PER_STEP)) if len(waiting.arrival_s) else 1
    arrived = np.ceil(arrived_s * quanta / capacity_s).astype(np.int64)
    due = np.ceil(due_s * quanta / capacity_s).astype(np.int64)
    return FluidProblem(
        least_ready=_urgent_peak(urgent, num_steps, step_s, utilisation),
        urgent_quanta=np.ceil(np.diff(released_work_s(urgent, edges_s)) * quanta / capacity_s - 1e-9).astype(np.int64),
        deferrable_quanta=np.diff(arrived),
        backlog_bound=np.minimum((arrived - due)[1:], most_levels),
        quanta_per_replica_step=quanta,
        startup_steps=math.ceil(startup_s / step_s - 1e-9),
        initial=pool.initial,
        min_replicas=pool.min_replicas,
        max_replicas=pool.max_replicas,
    )


def _urgent_peak(urgent: KnownWork, num_steps: int, step_s: float, utilisation: float) -> IntArray:
    """Replicas that the busiest sub-step of each step needs, shape (num_steps,)."""
    if len(urgent.arrival_s) == 0:
        return np.zeros(num_steps, dtype=np.int64)
    substeps = int(np.clip(math.ceil(step_s / float(urgent.wait_s.min())), 1, MAX_SUBSTEPS))
    edges_s = np.arange(num_steps * substeps + 1, dtype=np.float64) * (step_s / substeps)
    per_second = np.diff(released_work_s(urgent, edges_s)) / (step_s / substeps)
    peak = per_second.reshape(num_steps, substeps).max(axis=1)
    return np.asarray(np.ceil(peak / utilisation - 1e-9), dtype=np.int64)


def known_work(
    spec: FleetSpec, pool: int, columns: dict[str, npt.NDArray[Any]], *, which: npt.NDArray[np.bool_]
) -> KnownWork:
    """Price the chosen requests in replica-seconds of a pool.

    Args:
        spec: the fleet.
        pool: the pool that serves them.
        columns: ``arrival_s``, ``prompt_tokens``, ``output_tokens``, ``class_index``, each shape (n,).
        which: shape (n,), the requests to take.
    """
    classes = columns["class_index"][which].astype(np.int64)
    prompt = columns["prompt_tokens"][which].astype(np.float64)
    output = columns["output_tokens"][which].astype(np.float64)
    demand, nothing = DemandEstimator(spec), np.zeros(len(classes))
    pace_s = np.array([decode_pace_s(spec.pools[pool], service_class) for service_class in spec.classes])
    wait_s = np.array([allowed_wait_s(service_class) for service_class in spec.classes])
    return KnownWork(
        arrival_s=columns["arrival_s"][which].astype(np.float64),
        prefill_s=demand.pool_work_s(prompt, nothing, classes, pool),
        decode_s=demand.pool_work_s(nothing, output, classes, pool),
        duration_s=np.maximum(output * pace_s[classes], 1e-6),
        wait_s=wait_s[classes],
    )


def allowed_wait_s(service_class: ServiceClass) -> float:
    """How long a class's work may wait: its time-to-first-token SLO, or its deadline where that is shorter."""
    return min(service_class.ttft_slo_s, service_class.deadline_s or math.inf)


def decode_pace_s(pool: PoolSpec, service_class: ServiceClass) -> float:
    """Seconds per output token of a full decode batch at 1k tokens of context, no slower than the SLO."""
    batch_size = max(1, min(pool.batch_limit, pool.num_kv_blocks * BLOCK_SIZE_TOKENS // 1024))
    return min(batch_size * pool.decode_s_per_token(batch_size, 1024.0), service_class.tpot_slo_s)
