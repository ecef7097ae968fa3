"""What a control step leaves behind: for the log, the metrics and the status page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rl_autoscale.fleet.spec import IntArray
from rl_autoscale.fleet.state import FleetState, ScalingDecision
from rl_autoscale.serving.live_fleet import TelemetryReport
from rl_autoscale.serving.modes import Mode
from rl_autoscale.serving.safety import Fault

Source = Literal["policy", "rule", "hold"]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One control step, complete enough to explain it; arrays are per pool.

    Attributes:
        step, wall_s, time_s: number, wall clock, controller's monotonic clock.
        mode, mode_reason: in force, and what put it there.
        source: who decided: the policy, the fallback rule, or nobody (targets held).
        reasons: one line per thing that made this decision differ from the policy's wish.
        current: targets in force before; raw: as proposed; shielded: as the shield allows; final: as applied (or as
            would have been applied in shadow mode).
        applied: whether it was.
    """

    pool_names: tuple[str, ...]
    class_names: tuple[str, ...]
    step: int
    wall_s: float
    time_s: float
    mode: Mode
    mode_reason: str
    source: Source
    reasons: tuple[str, ...]
    faults: tuple[Fault, ...]
    state: FleetState
    report: TelemetryReport
    current: IntArray
    raw: ScalingDecision
    shielded: ScalingDecision
    final: ScalingDecision
    applied: bool
    failures: dict[str, str]
    overridden: bool
    outside: tuple[str, ...]
    breaker: str
    latency_s: float
