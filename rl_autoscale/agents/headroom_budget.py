"""The demand rule with feedback: asked for an attainment, it finds its headroom from the misses it sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

from rl_autoscale.agents.base import Knob
from rl_autoscale.agents.error_budget import ErrorBudget, check_attainment
from rl_autoscale.agents.headroom import HeadroomPolicy
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision

_GAIN = 0.2
_LARGEST_FACTOR = 3.0


@dataclass(kw_only=True, eq=False)
class HeadroomBudgetPolicy(HeadroomPolicy):
    """`headroom`, its factor raised while more misses than allowed are seen, and lowered while fewer are.

    The fair opponent of a learned policy that is asked for an attainment: the same feedback, on the best simple rule.

    Attributes:
        attainment: asked share of requests that meet their SLOs.
    """

    NAME: ClassVar[str] = "headroom-budget"
    READS: ClassVar[str] = "as headroom; finished, met, refused and dropped requests per class"
    RULE: ClassVar[str] = "headroom * exp(PI feedback on the error budget overspent)"
    SOURCE: ClassVar[str] = "headroom, and agents/error_budget.py; the gains are ours"
    KNOB: ClassVar[Knob] = Knob(
        "attainment", (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999), "share of requests to meet their SLOs"
    )

    attainment: float = 0.98
    _budget: ErrorBudget | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_attainment(self.NAME, self.attainment)
        self._budget = ErrorBudget(self.attainment, _GAIN, math.log(_LARGEST_FACTOR))

    def turn(self, knobs: Mapping[str, object]) -> None:
        """Another attainment; the averages of demand stay, the error budget begins anew.

        Raises:
            SpecError: another knob differs too, or a value is not allowed.
        """
        turned = HeadroomBudgetPolicy(**knobs)  # type: ignore[arg-type]  # checks them as at the start
        kept = [item.name for item in fields(self) if item.init and item.name != "attainment"]
        if changed := [name for name in kept if getattr(self, name) != getattr(turned, name)]:
            raise SpecError(f"policy '{self.NAME}': {', '.join(changed)} cannot change while it runs; restart for that")
        if turned.attainment == self.attainment:
            return
        self.attainment, self._budget = turned.attainment, turned._budget

    def decide(self, state: FleetState) -> ScalingDecision:
        """Turn the headroom, then scale as `headroom` does."""
        assert self._budget is not None
        return self.scale(state, self.headroom * math.exp(self._budget.update(state)))

    def reset(self, spec: FleetSpec) -> None:
        """Forget the averages and the misses."""
        super().reset(spec)
        assert self._budget is not None
        self._budget.reset()
