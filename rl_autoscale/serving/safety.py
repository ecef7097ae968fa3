"""What stands between a proposal and the fleet besides the shield: judgement of telemetry, breaker, cool-downs, owner.

Each is a small machine fed once per control step with what was seen; none reads a clock or does I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.spec import FleetSpec, IntArray
from rl_autoscale.fleet.state import FleetState, FloatArray, ScalingDecision
from rl_autoscale.serving.live_fleet import TelemetryReport

BoolArray = npt.NDArray[np.bool_]
Fault = Literal["stale", "envelope", "error", "timeout", "invalid", "actuator"]
FAULTS: tuple[Fault, ...] = ("stale", "envelope", "error", "timeout", "invalid", "actuator")


class SafetyConfig(Config):
    """Limits of the live controller; all have sane defaults."""

    policy_time_budget_s: PositiveFloat = Field(default=1.0, description="a policy that takes longer did not answer")
    blind_hold_s: NonNegativeFloat = Field(default=60.0, description="blind: hold so long, then the rule may add")
    down_cooldown_s: NonNegativeFloat = Field(default=60.0, description="no scale-down so soon after any change")
    up_cooldown_s: NonNegativeFloat = Field(default=0.0, description="no scale-up so soon after a scale-up")
    faults_to_open: PositiveInt = Field(default=3, description="steps in a row with one fault until the breaker opens")
    steps_to_close: PositiveInt = Field(default=30, description="faultless steps in a row until it closes again")
    override_window: PositiveInt = Field(default=30, description="steps over which shield overrides are counted")
    max_override_share: float = Field(default=0.8, gt=0, le=1, description="of them that open the breaker")
    crash_loop_failures: PositiveInt = Field(default=3, description="failed replicas in a pool that stop its growth")
    manual_hold_s: NonNegativeFloat = Field(
        default=600.0, description="a pool someone else scaled is left alone so long"
    )
    max_actuator_backoff_s: PositiveFloat = Field(default=300.0, description="longest pause between failing calls")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the telemetry is worth.

    Attributes:
        blind: per pool, whether a decision to shrink would be a guess.
        reasons: one line per finding.
    """

    blind: BoolArray
    reasons: tuple[str, ...]


def judge(
    state: FleetState, report: TelemetryReport, spec: FleetSpec, stale_after_s: float, coverage: float
) -> Verdict:
    """Find the pools that cannot be seen well enough.

    A pool is blind when its replicas are unknown, too few of them speak, or its row is too old; and when the arrivals
    of a class that it serves are unknown or too old: no data is never read as no load.
    """
    blind = np.zeros(len(spec.pools), dtype=np.bool_)
    reasons: list[str] = []

    def condemn(pools: Sequence[int], reason: str) -> None:
        blind[list(pools)] = True
        reasons.append(reason)

    for p, name in enumerate(spec.pool_names):
        if np.isnan(state.pools.ready[p]) or np.isnan(state.pools.asked_for[p]):
            condemn([p], f"{name}: replicas unknown")
        elif report.coverage.get(name, 1.0) < coverage:
            condemn([p], f"{name}: {report.coverage[name]:.0%} of its replicas speak")
        elif not state.pools.age_s[p] <= stale_after_s:
            condemn([p], f"{name}: telemetry is {state.pools.age_s[p]:.0f} s old")
    for c, name in enumerate(spec.class_names):
        if np.isnan(state.classes.arrivals_per_s[c]):
            why = "arrivals unknown" if state.window_s > 0 else "no window yet"
            condemn(spec.pools_passed(c), f"{name}: {why}")
        elif not state.classes.age_s[c] <= stale_after_s:
            condemn(spec.pools_passed(c), f"{name}: telemetry is {state.classes.age_s[c]:.0f} s old")
    return Verdict(blind, tuple(reasons))


def check_decision(decision: object, spec: FleetSpec) -> str | None:
    """Why a policy's answer cannot be meant, or None: a NaN that became an integer must not pass for a target."""
    if not isinstance(decision, ScalingDecision):
        return f"a {type(decision).__name__} is no ScalingDecision"
    pools, classes = (len(spec.pools),), (len(spec.classes),)
    allowed = {
        "target_replicas": (pools, 0),
        "max_batch_size": (pools, 1),
        "admission": (classes, 0),
        "max_in_flight": (classes, 0),
        "selectivity": (classes, 0),
    }
    for name, (shape, least) in allowed.items():
        values: object = getattr(decision, name)
        if values is None and name in ("max_in_flight", "selectivity"):
            continue
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
            return f"{name} {values!r} is no array of numbers"
        if values.shape != shape:
            return f"{name} has shape {values.shape} instead of {shape}"
        kind = {"admission": "", "selectivity": "finite and "}.get(name, "whole numbers ")
        finite = name == "admission" or np.isfinite(values).all()
        whole = name in ("admission", "selectivity") or (values == np.floor(values)).all()
        if not (finite and whole and (values >= least).all()):  # NaN is not
            return f"{name} {values.tolist()} must be {kind}>= {least}"
    return None


def is_override(raw: ScalingDecision, spec: FleetSpec) -> bool:
    """Whether the policy asks for what the fleet can never have; the shield's steps, waits and guards do not count.

    Those are its ordinary work: while replicas take ten minutes to start, a sound policy is cut at every step.
    """
    wanted = raw.target_replicas
    outside = (wanted < spec.min_replicas) | (wanted > spec.max_replicas)
    too_dear = spec.gpu_budget is not None and int(wanted @ spec.gpus_per_replica) > spec.gpu_budget
    return bool(outside.any()) or too_dear


@dataclass(slots=True)
class Breaker:
    """Decides whether the policy is trusted with decisions; while open the fallback rule has them.

    It opens after ``faults_to_open`` steps in a row with the same fault, or when most proposals are impossible (see
    `is_override`);
    it closes after ``steps_to_close`` faultless steps, during which the policy is asked and watched but not obeyed.
    """

    config: SafetyConfig
    open_reason: str = ""
    num_trips: int = 0
    _in_row: dict[Fault, int] = field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    _overrides: deque[bool] = field(default_factory=deque)
    _good_steps: int = 0

    @property
    def is_open(self) -> bool:
        """Whether the fallback decides."""
        return bool(self.open_reason)

    def trip(self, reason: str) -> None:
        """Open now."""
        if not self.is_open:
            self.num_trips += 1
        self.open_reason = reason
        self._good_steps = 0

    def record(self, faults: Sequence[Fault], *, overridden: bool | None) -> None:
        """Take in one step; ``overridden`` is None when the shield was not asked about the policy."""
        for fault in FAULTS:
            self._in_row[fault] = self._in_row[fault] + 1 if fault in faults else 0
            if self._in_row[fault] >= self.config.faults_to_open:
                self.trip(f"{fault} for {self._in_row[fault]} steps")
        if overridden is not None:
            self._overrides.append(overridden)
            while len(self._overrides) > self.config.override_window:
                self._overrides.popleft()
        share = sum(self._overrides) / self.config.override_window
        if share > self.config.max_override_share:
            self.trip(f"the shield overruled {share:.0%} of the last {self.config.override_window} proposals")
        if self.is_open:
            self._good_steps = 0 if faults or overridden else self._good_steps + 1
            if self._good_steps >= self.config.steps_to_close:
                self.open_reason = ""
                self._overrides.clear()


class CoolDowns:
    """How soon a pool may change again; a fresh one behaves as if every pool had just been scaled up.

    Args:
        num_pools: how many.
        config: the durations.
        now_s: monotonic.
    """

    def __init__(self, num_pools: int, config: SafetyConfig, now_s: float) -> None:
        self._config = config
        self._last_up_s: FloatArray = np.full(num_pools, now_s)
        self._last_change_s: FloatArray = np.full(num_pools, now_s)
        self._may_grow_at_once = np.ones(num_pools, dtype=np.bool_)  # "just fired" must not forbid the first rescue

    def restart(self, now_s: float) -> None:
        """Treat all cool-downs as just fired."""
        self._last_change_s[:] = now_s

    def limit(self, target: IntArray, current: IntArray, now_s: float) -> IntArray:
        """``target`` where a change is allowed, ``current`` elsewhere."""
        cool_up = (now_s - self._last_up_s < self._config.up_cooldown_s) & ~self._may_grow_at_once
        cool_down = now_s - self._last_change_s < self._config.down_cooldown_s
        held = ((target > current) & cool_up) | ((target < current) & cool_down)
        return np.where(held, current, target)

    def changed(self, before: IntArray, after: IntArray, now_s: float) -> None:
        """Remember what was applied."""
        up = after > before
        self._may_grow_at_once &= ~up
        self._last_up_s[up] = now_s
        self._last_change_s[after != before] = now_s


@dataclass(slots=True)
class Owner:
    """Notices that someone else writes the same targets, and keeps hands off for a while.

    Two writers that correct each other scale a fleet up and down for ever; whoever is quiet ends that.
    """

    hold_s: float
    num_foreign: int = 0
    _applied: dict[int, int] = field(default_factory=dict)
    _attempted: dict[int, int] = field(default_factory=dict)
    _until_s: dict[int, float] = field(default_factory=dict)

    def applied(self, pool: int, target: int) -> None:
        """We have set a target and it was accepted."""
        self._applied[pool] = target

    def attempted(self, pool: int, target: int) -> None:
        """A call failed that may have worked all the same (a time-out): seeing its target later is no surprise."""
        self._attempted[pool] = target

    def look(self, pool: int, asked_for: float, now_s: float) -> str | None:
        """Compare with what is in force now; a line for the log when it is not ours."""
        if np.isnan(asked_for):
            return None
        ours = self._applied.setdefault(pool, int(asked_for))
        attempted = self._attempted.pop(pool, None)
        self._applied[pool] = int(asked_for)
        if int(asked_for) in (ours, attempted):
            return None
        self._until_s[pool] = now_s + self.hold_s
        self.num_foreign += 1
        return f"someone else set {int(asked_for)} replicas (we had {ours})"

    def hands_off(self, pool: int, now_s: float) -> bool:
        """Whether the pool is left alone now."""
        return now_s < self._until_s.get(pool, -np.inf)


@dataclass(slots=True)
class Actuation:
    """Failing calls to one pool's back end: how many in a row, and when to try again."""

    num_failed: NonNegativeInt = 0
    not_before_s: float = -np.inf

    def failed(self, now_s: float, interval_s: float, longest_s: float, *, retryable: bool) -> None:
        """A call failed; what cannot succeed by itself (forbidden, no such object) waits longest at once."""
        self.num_failed += 1
        pause_s = longest_s if not retryable else min(interval_s * 2.0 ** (self.num_failed - 1), longest_s)
        self.not_before_s = now_s + pause_s - interval_s / 2  # half a step early: steps are not exact

    def succeeded(self) -> None:
        """A call went through."""
        self.num_failed, self.not_before_s = 0, -np.inf
