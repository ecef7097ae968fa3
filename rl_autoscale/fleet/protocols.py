"""The two protocols everything else is written against, and the control loop that joins them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from rl_autoscale.fleet.shield import Shield
from rl_autoscale.fleet.spec import FleetSpec, ShieldSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision


class Fleet(Protocol):
    """A fleet that can be observed and told what to do: simulated, replayed or live."""

    @property
    def spec(self) -> FleetSpec:
        """What the fleet is made of."""
        ...

    def observe(self) -> FleetState:
        """The newest telemetry; never waits and has no side effects."""
        ...

    def apply(self, decision: ScalingDecision) -> None:
        """Set absolute targets; takes effect from now on; applying the same decision twice is harmless."""
        ...

    def advance(self) -> bool:
        """Let one control interval pass. Returns False when there is nothing more to control."""
        ...


class Policy(Protocol):
    """Decides from telemetry alone. Reads no clock, draws no global randomness, keeps its memory in itself."""

    @property
    def name(self) -> str:
        """The registered name, knob values included where they differ from the default."""
        ...

    def reset(self, spec: FleetSpec) -> None:
        """Forget everything and prepare for a fleet; called once before the first decision."""
        ...

    def decide(self, state: FleetState) -> ScalingDecision:
        """Answer one observation of one fleet (no leading dimensions)."""
        ...


StepCallback = Callable[[FleetState, ScalingDecision, ScalingDecision], None]
"""Called each control step with the observation, the raw decision and the shielded decision."""


def run_control_loop(
    fleet: Fleet,
    policy: Policy,
    shield_spec: ShieldSpec | None = None,
    *,
    on_step: StepCallback | None = None,
) -> int:
    """Observe, decide, shield, apply, advance, until the fleet has nothing more to control.

    Returns:
        The number of control steps taken.
    """
    shield = Shield(fleet.spec, shield_spec or ShieldSpec())
    policy.reset(fleet.spec)
    num_steps = 0
    while True:
        state = fleet.observe()
        raw = policy.decide(state)
        decision = shield.clip(raw, state)
        fleet.apply(decision)
        if on_step is not None:
            on_step(state, raw, decision)
        num_steps += 1
        if not fleet.advance():
            return num_steps
