"""A fixed number of replicas: what is bought when nothing scales, and the yardstick of every other policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.base import Knob, RulePolicy
from rl_autoscale.fleet.errors import SpecError, did_you_mean
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision


@dataclass(kw_only=True, eq=False)
class StaticPolicy(RulePolicy):
    """Hold n replicas in every pool, whatever happens.

    With ``admission=1`` and a ``batch_cap`` this is "static + admission cap": a fixed fleet protected by backpressure
    alone.

    Attributes:
        replicas: for every pool, or a mapping from pool name to replicas (pools left out stay at their initial count);
            clipped to each pool's min and max.
    """

    NAME: ClassVar[str] = "static"
    READS: ClassVar[str] = "nothing"
    RULE: ClassVar[str] = "n replicas in every pool, constant batch cap"
    SOURCE: ClassVar[str] = "common practice: provision for the peak"
    KNOB: ClassVar[Knob] = Knob(
        "replicas", (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 50), "replicas per pool"
    )

    replicas: int | Mapping[str, int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for pool, count in self.replicas.items() if isinstance(self.replicas, Mapping) else [("", self.replicas)]:
            self._check(f"replicas[{pool}]" if pool else "replicas", count, low=0)
            if count != int(count):
                raise SpecError(f"policy 'static': replicas={count!r} is not allowed; it must be a whole number")

    def reset(self, spec: FleetSpec) -> None:
        """Prepare for a fleet; raises SpecError when ``replicas`` names a pool the fleet does not have."""
        super().reset(spec)
        for pool in self.replicas if isinstance(self.replicas, Mapping) else ():
            if pool not in spec.pool_names:
                raise SpecError(
                    f"policy 'static': replicas names pool '{pool}'{did_you_mean(pool, spec.pool_names)}; "
                    f"pools: {', '.join(spec.pool_names)}"
                )

    def decide(self, state: FleetState) -> ScalingDecision:
        """The same answer every time."""
        target = self.spec.initial_replicas.copy()
        if isinstance(self.replicas, Mapping):
            for pool, count in self.replicas.items():
                target[self.spec.pool_names.index(pool)] = count
        else:
            target = np.full_like(target, int(self.replicas))
        return self.decision(target)
