"""Ray Serve's replica autoscaler on ongoing requests.

Per pool (a deployment of its own), with N running replicas, N* those asked for and R the time-weighted mean over
``look_back_s`` of outstanding requests (running, waiting in engines, queued at routers):

    D  = R / target                                   (N > 0)
    D' = ceil(N + g (D - N)),  g = upscale or downscale factor; if shrinking but D' = N, then N - 1
    D' > N* for ``upscale_delay_s`` without a break   -> N* = D' (the wish at expiry)
    D' < N* for ``downscale_delay_s`` without a break -> N* = D', never below 1 except by the delay from 1 to 0
    N = 0 and R > 0                                   -> max(ceil(upscale factor), N*), at once

Delays are wall time since the first of consecutive wishes; a wish the other way, or none, starts them anew. Each
reading is held until the next, and the window begins with the first. Delay to zero equals the downscale delay, its
default.

A reading that is missing is not recorded: the last one is held, as in Ray, for as long as the look-back; after that
nothing is done and the timers start anew.

Source: ray 2.60 ``serve/config.py`` (defaults: target 2, look-back 30 s, delays 30 s and 600 s, factors 1),
``autoscaling_policy.py``, ``_private/autoscaling_state.py``. The default target of 2 is for models without batching;
ours is 40, as for the HPA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy, ceil_replicas
from rl_autoscale.agents.signals import Samples, outstanding_per_pool
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision


def time_weighted_mean(samples: list[tuple[float, float]], now_s: float, window_s: float) -> float:
    """Mean of a right-continuous step function over the window's part that follows its first sample.

    Args:
        samples: (time, value) in order of time, at least one, none later than now.
        now_s: the last value is held until here.
        window_s: length of the window; the newest value older than it counts at its beginning.
    """
    start_s = max(now_s - window_s, samples[0][0])
    ends = [time_s for time_s, _ in samples[1:]] + [now_s]
    total = sum(
        value * max(0.0, end_s - max(time_s, start_s)) for (time_s, value), end_s in zip(samples, ends, strict=True)
    )
    return total / (now_s - start_s) if now_s > start_s else samples[-1][1]


@dataclass(slots=True)
class _Deployment:
    """What one deployment's autoscaler remembers."""

    load: Samples
    wish: int = 0  # +1 up, -1 down, 0 none
    wish_since_s: float = 0.0


@dataclass(kw_only=True, eq=False)
class RayServePolicy(RulePolicy):
    """Ray Serve's default policy per pool; see the module for the rule.

    Attributes:
        target: ongoing requests per replica.
        look_back_s: window of the mean.
        upscale_delay_s: how long a wish to grow must last.
        downscale_delay_s: how long a wish to shrink must last.
        upscale_factor: share of the wished growth that is taken.
        downscale_factor: share of the wished shrinking that is taken.
    """

    NAME: ClassVar[str] = "ray-serve"
    READS: ClassVar[str] = "ready, asked-for, running, waiting per pool; gateway queue per class"
    RULE: ClassVar[str] = "ceil(N + factor * (load / target - N)) after 30 s of wishing to grow or 600 s to shrink"
    SOURCE: ClassVar[str] = "Ray Serve 2.60, config.py, autoscaling_policy.py, autoscaling_state.py"
    KNOB: ClassVar[Knob] = Knob(
        "target", (4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192), "ongoing requests per replica"
    )

    target: float = 40.0
    look_back_s: float = 30.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    upscale_factor: float = 1.0
    downscale_factor: float = 1.0
    _deployments: list[_Deployment] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target", "look_back_s", "upscale_factor", "downscale_factor"):
            self._check(name, getattr(self, name), low=0.0, above=True)
        for name in ("upscale_delay_s", "downscale_delay_s"):
            self._check(name, getattr(self, name), low=0.0)

    def reset(self, spec: FleetSpec) -> None:
        """Forget loads and timers."""
        super().reset(spec)
        keep_s = self.look_back_s + 2.0 * spec.control_interval_s  # the value that holds when the window begins
        self._deployments = [_Deployment(Samples(keep_s)) for _ in spec.pools]

    def decide(self, state: FleetState) -> ScalingDecision:
        """One tick of every pool's autoscaler."""
        target = self.standing_target(state)
        load = outstanding_per_pool(self.spec, state)
        now_s = float(state.time_s)
        for pool, deployment in enumerate(self._deployments):
            deployment.load.add(now_s, float(load[pool]))
            samples, ready = list(deployment.load.samples), float(state.pools.ready[pool])
            if not samples or samples[-1][0] <= now_s - self.look_back_s or np.isnan(ready):
                deployment.wish = 0
                continue
            mean = time_weighted_mean(samples, now_s, self.look_back_s)
            target[pool] = self._applied(deployment, mean, int(ready), int(target[pool]), now_s)
        return self.decision(target)

    def wished(self, load: float, running: int, asked_for: int) -> int:
        """D' for one deployment: the replicas wished for before delays."""
        if running == 0:
            return max(math.ceil(self.upscale_factor), asked_for) if load > 0 else asked_for
        desired = load / self.target
        factor = self.upscale_factor if desired > running else self.downscale_factor
        wished = ceil_replicas(running + factor * (desired - running))
        return running - 1 if desired < running and wished == running else max(wished, 0)

    def _applied(self, deployment: _Deployment, load: float, running: int, asked_for: int, now_s: float) -> int:
        wished = self.wished(load, running, asked_for)
        if running == 0 and wished > asked_for:
            return wished
        if wished < asked_for and asked_for > 1:
            wished = max(wished, 1)
        wish = int(np.sign(wished - asked_for))
        if wish == 0 or wish != deployment.wish:
            deployment.wish, deployment.wish_since_s = wish, now_s
        delay_s = self.upscale_delay_s if wish > 0 else self.downscale_delay_s
        if wish == 0 or now_s - deployment.wish_since_s < delay_s - 1e-9:
            return asked_for
        deployment.wish = 0
        return wished
