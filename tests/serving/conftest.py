"""A controller on make-believe servers, with a policy that does what the test says."""

from __future__ import annotations

import numpy as np
import pytest
from live_world import World, world_spec

from rl_autoscale.agents.registry import make_policy
from rl_autoscale.fleet.spec import ShieldSpec
from rl_autoscale.fleet.state import ScalingDecision
from rl_autoscale.serving.controller import Controller
from rl_autoscale.serving.modes import ModeSwitch
from rl_autoscale.serving.safety import SafetyConfig
from rl_autoscale.serving.telemetry import Limits


class Scripted:
    """Wants ``target`` replicas (a list: by pool); or raises, or answers with ``answer``."""

    name = "scripted"

    def __init__(self, target: int | list[int]) -> None:
        self.target = target
        self.error: Exception | None = None
        self.answer: ScalingDecision | None = None
        self.seen = 0

    def reset(self, spec) -> None:
        self.spec = spec

    def decide(self, state) -> ScalingDecision:
        self.seen += 1
        if self.error is not None:
            raise self.error
        if self.answer is not None:
            return self.answer
        return ScalingDecision(np.atleast_1d(self.target), self.spec.batch_limits, np.array([np.inf]))


class Stage:
    """A world, a fleet, a controller, and their history."""

    def __init__(
        self,
        *,
        target=4,
        rule_target=4,
        mode="active",
        world=None,
        policy=None,
        rule=None,
        shield=None,
        gateway=False,
        envelope=None,
        caller=None,
        kill_file=None,
        dial=None,
        **safety,
    ) -> None:
        self.world = world or World(world_spec(pool={"initial_replicas": 4}), rate_per_s=4.0)
        self.backend = self.world.backends["gpu"]
        self.fleet = self.world.fleet(gateway=gateway)
        self.policy = policy or Scripted(target)
        self.rule = rule or Scripted(rule_target)
        self.modes = ModeSwitch(mode, kill_file=kill_file)
        self.records = []
        self.controller = Controller(
            self.fleet,
            self.policy,
            self.rule,
            shield or ShieldSpec(),
            Limits(stale_after_s=30.0, min_coverage=0.5),
            SafetyConfig(**safety),
            self.modes,
            self.world.clock,
            envelope=envelope,
            listeners=[self.records.append],
            caller=caller or (lambda function, limit_s: function()),
            dial=dial,
        )

    def steps(self, count):
        """Take some steps; returns the last record."""
        for _ in range(count):
            self.controller.step()
            self.fleet.advance()
        return self.records[-1]

    @property
    def target(self):
        return self.backend.target


@pytest.fixture
def stage():
    return Stage


@pytest.fixture
def headroom():
    return lambda **knobs: make_policy("headroom", **knobs)
