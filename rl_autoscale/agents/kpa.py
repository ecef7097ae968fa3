"""Knative's pod autoscaler (KPA): a stable window, and a panic window that may only grow.

Per pool, with c_s and c_p the mean load over the stable and over the panic window, r = max(1, ready) and tau the target
per replica:

    D_s = clamp(ceil(c_s / tau), floor(r / 2), 1000 r),   D_p from c_p likewise
    panic begins, or goes on, while ceil(c_p / tau) / r >= 2; it ends 60 s (a stable window) after the last such tick
    in panic the answer is the largest max(D_s, D_p) since it began, otherwise D_s
    then the largest answer of the last ``scale_down_delay_s`` (default 0)

A pool goes to zero, where it may, only after a whole stable window without load and 30 s of grace. The load is the
number of outstanding requests (Knative's concurrency), or the tokens held and queued, which AIBrix offers for LLMs.

Deviations: Knative ticks every 2 s and its panic window is 6 s; here a tick is a control step (10 s by default), so the
panic window is never shorter than the newest reading. Knative's target is a container's concurrency limit (100) times
0.7; ``target`` is that product. A pool that begins with more than one replica begins in panic, as in Knative. A reading
that is missing is not added to a window; with empty windows the pool is held.

Source: knative/serving ``pkg/autoscaler/scaling/autoscaler.go`` and config-autoscaler defaults; vllm-project/aibrix
``pkg/controller/podautoscaler/algorithm/kpa.go``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy, ceil_replicas
from rl_autoscale.agents.signals import Samples, outstanding_per_pool, tokens_per_pool
from rl_autoscale.fleet.errors import SpecError, did_you_mean
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision

MAX_SCALE_UP_RATE = 1000.0
MAX_SCALE_DOWN_RATE = 2.0
SCALE_TO_ZERO_GRACE_S = 30.0
METRICS = ("concurrency", "tokens")


@dataclass(slots=True)
class _PoolMemory:
    """What one KPA remembers."""

    load: Samples
    answers: Samples
    panic_since_s: float = math.nan
    panic_replicas: int = 0
    last_load_s: float = math.nan


@dataclass(kw_only=True, eq=False)
class KpaPolicy(RulePolicy):
    """Knative's KPA per pool; see the module for the rule.

    Attributes:
        target: load per replica: outstanding requests, or tokens with ``metric="tokens"``.
        stable_window_s: of the slow mean; also how long panic lasts after the last over-threshold tick.
        panic_window_share: panic window over stable window.
        panic_threshold: replicas wanted over replicas ready at which panic begins.
        scale_down_delay_s: the largest answer of so long counts.
        metric: ``concurrency`` or ``tokens``.
    """

    NAME: ClassVar[str] = "kpa"
    READS: ClassVar[str] = "ready, asked-for, running, waiting (tokens: KV use) per pool; gateway queue per class"
    RULE: ClassVar[str] = (
        "ceil(mean load of 60 s / target); in panic the maximum, from the newest mean, never shrinking"
    )
    SOURCE: ClassVar[str] = "Knative serving autoscaler.go and defaults; AIBrix kpa.go"
    KNOB: ClassVar[Knob] = Knob("target", (6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192), "load per replica")

    target: float = 40.0
    stable_window_s: float = 60.0
    panic_window_share: float = 0.1
    panic_threshold: float = 2.0
    scale_down_delay_s: float = 0.0
    metric: str = "concurrency"
    _memory: list[_PoolMemory] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("target", self.target, low=0.0, above=True)
        self._check("stable_window_s", self.stable_window_s, low=0.0, above=True)
        self._check("panic_window_share", self.panic_window_share, low=0.0, high=1.0, above=True)
        self._check("panic_threshold", self.panic_threshold, low=1.0)
        self._check("scale_down_delay_s", self.scale_down_delay_s, low=0.0)
        if self.metric not in METRICS:
            raise SpecError(
                f"policy 'kpa': metric={self.metric!r} is not allowed{did_you_mean(str(self.metric), METRICS)}; "
                f"it must be one of {', '.join(METRICS)}"
            )

    def reset(self, spec: FleetSpec) -> None:
        """Forget the windows and the panic."""
        super().reset(spec)
        self._memory = [
            _PoolMemory(Samples(self.stable_window_s), Samples(self.scale_down_delay_s)) for _ in spec.pools
        ]

    def decide(self, state: FleetState) -> ScalingDecision:
        """One tick of every pool's KPA."""
        target = self.standing_target(state)
        load = (tokens_per_pool if self.metric == "tokens" else outstanding_per_pool)(self.spec, state)
        for pool, memory in enumerate(self._memory):
            current, ready = int(target[pool]), float(state.pools.ready[pool])
            ready = current if np.isnan(ready) else ready
            target[pool] = self._tick(memory, current, int(ready), float(load[pool]), float(state.time_s), pool)
        return self.decision(target)

    def _tick(self, memory: _PoolMemory, current: int, ready: int, load: float, now_s: float, pool: int) -> int:
        if math.isnan(memory.last_load_s):  # the first tick
            memory.last_load_s = now_s
            if current > 1:
                memory.panic_since_s, memory.panic_replicas = now_s, current
        memory.load.add(now_s, load)
        stable = memory.load.mean(now_s, self.stable_window_s)
        if math.isnan(load) or math.isnan(stable):
            return current
        panic = memory.load.mean(now_s, self.panic_window_share * self.stable_window_s)
        panic = load if math.isnan(panic) else panic
        if load > 0:
            memory.last_load_s = now_s
        desired = self._with_panic(memory, stable, panic, max(1, ready), now_s)
        memory.answers.add(now_s, desired)
        desired = int(max([desired, *memory.answers.last(now_s, self.scale_down_delay_s)]))
        if desired == 0 and current > 0 and now_s - memory.last_load_s < self.stable_window_s + SCALE_TO_ZERO_GRACE_S:
            return max(1, int(self.spec.min_replicas[pool]))
        return desired

    def _with_panic(self, memory: _PoolMemory, stable: float, panic: float, ready: int, now_s: float) -> int:
        """The answer of one tick before the scale-down delay."""
        low, high = math.floor(ready / MAX_SCALE_DOWN_RATE), math.ceil(ready * MAX_SCALE_UP_RATE)
        wanted_panic = ceil_replicas(panic / self.target)
        desired_stable = min(max(ceil_replicas(stable / self.target), low), high)
        desired_panic = min(max(wanted_panic, low), high)
        if wanted_panic / ready >= self.panic_threshold:
            if math.isnan(memory.panic_since_s):
                memory.panic_replicas = 0
            memory.panic_since_s = now_s
        elif now_s - memory.panic_since_s >= self.stable_window_s:  # never true of NaN
            memory.panic_since_s = math.nan
        if math.isnan(memory.panic_since_s):
            return desired_stable
        memory.panic_replicas = max(memory.panic_replicas, desired_stable, desired_panic)
        return memory.panic_replicas
