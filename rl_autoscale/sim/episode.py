"""What the compiled engine and the reference share: an episode's draws, checks, end and time line."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.pool import PoolSpec, StartupPhase
from rl_autoscale.fleet.rng import stream
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, FloatArray, ScalingDecision
from rl_autoscale.sim.layout import COLD, LIFE, SPOT, WAKE, IntArray
from rl_autoscale.workload.trace import Workload

NUM_DRAWS = 1024
"""Start-up times and lives drawn per pool and episode; under every policy a pool's j-th start takes the j-th draw."""

_DRAIN_MARGIN_S = 600.0


def draw_replica_times(pool: PoolSpec, seed: int, startup_scale: float = 1.0) -> FloatArray:
    """What chance decides about a pool's replicas, shape (4, NUM_DRAWS), rows COLD, WAKE, LIFE and SPOT of layout.py.

    Start-up and wake-up durations, ready time until a crash and until the notice of a spot replica; infinite where the
    spec has no such thing.
    """
    times = np.full((4, NUM_DRAWS), np.inf)
    times[COLD] = startup_scale * _draw_phases(pool.startup, stream(seed, f"startup/{pool.name}"))
    if pool.sleep is not None:
        times[WAKE] = startup_scale * _draw_phases(pool.sleep.wake, stream(seed, f"wake/{pool.name}"))
    if pool.mean_time_to_crash_s is not None:
        times[LIFE] = stream(seed, f"crash/{pool.name}").exponential(pool.mean_time_to_crash_s, NUM_DRAWS)
    if pool.spot is not None:
        times[SPOT] = stream(seed, f"spot/{pool.name}").exponential(pool.spot.mean_life_s, NUM_DRAWS)
    return times


def _draw_phases(phases: tuple[StartupPhase, ...], rng: np.random.Generator) -> FloatArray:
    """The sum over phases of Gamma variables with each phase's mean and cv, shape (NUM_DRAWS,)."""
    total = np.zeros(NUM_DRAWS)
    for phase in phases:
        if phase.cv == 0.0 or phase.mean_s == 0.0:
            total += phase.mean_s
        else:
            shape = 1.0 / phase.cv**2
            total += rng.gamma(shape, phase.mean_s / shape, size=NUM_DRAWS)
    return total


def draw_routing(seed: int, num_requests: int) -> FloatArray:
    """The router's random numbers in [0, 1), shape (num_requests,)."""
    return stream(seed, "routing").random(num_requests)


def check_workload(spec: FleetSpec, workload: Workload) -> None:
    """Refuse a workload that is not this fleet's, or with a request whose KV cache would not fit an empty replica.

    Raises:
        SpecError: naming the classes, or the first such request.
    """
    if workload.class_names != spec.class_names:
        raise SpecError(
            f"the workload's classes {list(workload.class_names)} are not the fleet's {list(spec.class_names)}"
        )
    tokens = workload.prompt_tokens.astype(np.int64) + workload.output_tokens - 1
    for c, item in enumerate(spec.classes):
        serving = spec.pools_serving(c)
        if item.max_output_tokens is not None:
            _check_max_tokens(c, item.name, item.max_output_tokens, [spec.pools[p] for p in serving], workload)
        for pools, needed in ((spec.decode_pools or serving, tokens), (serving, workload.prompt_tokens)):
            limit = min(spec.pools[p].longest_request_tokens for p in pools)
            too_long = np.flatnonzero((workload.class_index == c) & (needed > limit))
            if not len(too_long):
                continue
            q = int(too_long[0])
            raise SpecError(
                f"request {q} needs {needed[q]} KV tokens, a replica holds {limit}; "
                "clip the workload's lengths or use hardware with more KV blocks"
            )


def _check_max_tokens(c: int, name: str, max_output_tokens: int, pools: list[PoolSpec], workload: Workload) -> None:
    """Refuse outputs that the class does not allow, and prompts whose longest answer a pool could not reserve."""
    own = workload.class_index == c
    if (too_long := np.flatnonzero(own & (workload.output_tokens > max_output_tokens))).size:
        q = int(too_long[0])
        raise SpecError(
            f"request {q} has {workload.output_tokens[q]} output tokens, class '{name}' allows "
            f"max_output_tokens={max_output_tokens}; raise it or clip the workload's lengths"
        )
    for pool in pools:
        room = pool.longest_request_tokens - max_output_tokens
        if pool.reserves_output and (too_long := np.flatnonzero(own & (workload.prompt_tokens > room))).size:
            q = int(too_long[0])
            raise SpecError(
                f"request {q} has {workload.prompt_tokens[q]} prompt tokens; beside the {max_output_tokens} that class "
                f"'{name}' may ask for, pool '{pool.name}' holds {room}; lower max_output_tokens or clip the workload"
            )


def cut_off_s(spec: FleetSpec, workload: Workload, drain_limit_s: float | None) -> float:
    """When an episode ends even though requests are left: by default the longest promise plus ten minutes after it."""
    if drain_limit_s is None:
        promises = [max(item.ttft_slo_s, item.deadline_s or 0.0, item.timeout_s or 0.0) for item in spec.classes]
        drain_limit_s = max(promises) + _DRAIN_MARGIN_S
    return workload.span_s + drain_limit_s


def scrape_window_s(spec: FleetSpec, steps: IntArray) -> FloatArray:
    """What the rates of the newest scrape refer to: an interval, less its age in the first, 0 before.

    Args:
        spec: the fleet.
        steps: control steps so far, any shape.
    """
    return np.where(steps > 0, spec.control_interval_s - np.where(steps == 1, spec.telemetry_age_s, 0.0), 0.0)


@dataclass(slots=True)
class Timeline:
    """What was seen, decided and missed at each control step."""

    _states: list[FleetState] = field(default_factory=list)
    _decisions: list[ScalingDecision] = field(default_factory=list)
    _missed: list[IntArray] = field(default_factory=list)

    def record(self, state: FleetState, decision: ScalingDecision, missed: IntArray) -> None:
        """Add a control step.

        Args:
            state: what the decision was taken on.
            decision: what is applied now.
            missed: misses so far per class, shape (num_classes,).
        """
        self._states.append(state)
        self._decisions.append(decision)
        self._missed.append(missed)

    def arrays(self, missed_at_end: IntArray) -> dict[str, FloatArray]:
        """One array per signal, shape (num_steps,), (num_steps, num_pools) or (num_steps, num_classes)."""
        states, decisions = self._states, self._decisions
        missed = np.array([*self._missed, missed_at_end], dtype=np.float64)
        return {
            "time_s": np.array([state.time_s for state in states]),
            "target": np.array([decision.target_replicas for decision in decisions], dtype=np.float64),
            "batch_cap": np.array([decision.max_batch_size for decision in decisions], dtype=np.float64),
            "admission": np.array([decision.admission for decision in decisions]),
            "ready": np.array([state.pools.ready for state in states]),
            "starting": np.array([state.pools.starting for state in states]),
            "queue_length": np.array([state.classes.queue_length for state in states]),
            "waiting": np.array([state.pools.waiting for state in states]),
            "arrivals_per_s": np.array([state.classes.arrivals_per_s for state in states]),
            "missed": np.diff(missed, axis=0),
        }
