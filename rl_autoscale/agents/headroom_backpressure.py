"""The demand rule with the learned policy's backpressure: what its laws are worth without a network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from rl_autoscale.agents.headroom import HeadroomPolicy
from rl_autoscale.fleet.admission import SELECTIVITY
from rl_autoscale.fleet.corrections import CapCorrection, StrictnessCorrection
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision


@dataclass(kw_only=True, eq=False)
class HeadroomBackpressurePolicy(HeadroomPolicy):
    """`headroom`, with a batch cap that meets the SLOs, and a cap and a refusal that correct themselves.

    The batch cap is how many requests a replica may have in flight (fleet/in_flight.py), at most the knob
    ``batch_cap``; it, and ``admission`` where it refuses at all, are multiplied by what they were found to be off by
    (fleet/corrections.py). All as in `learned`: what PPO adds to that is the difference between the two.
    """

    NAME: ClassVar[str] = "headroom-backpressure"
    READS: ClassVar[str] = "as headroom; late first tokens, slow answers, refused requests and strictness per class"
    RULE: ClassVar[str] = "headroom; batch cap and strictness by the laws that a learned policy acts relative to"
    SOURCE: ClassVar[str] = "headroom, fleet/in_flight.py and fleet/corrections.py; ours"

    selectivity: float = SELECTIVITY
    _strictness: StrictnessCorrection | None = field(default=None, init=False, repr=False)
    _cap: CapCorrection | None = field(default=None, init=False, repr=False)

    def reset(self, spec: FleetSpec) -> None:
        """Forget the averages and the misses."""
        super().reset(spec)
        self._strictness, self._cap = StrictnessCorrection(spec), CapCorrection(spec)

    def decide(self, state: FleetState) -> ScalingDecision:
        """Scale as `headroom` does, then say what may be in flight and whom to refuse."""
        decision = super().decide(state)
        assert self._strictness is not None
        assert self._cap is not None
        assert self._demand is not None
        self._strictness.update(state)
        self._cap.update(state)
        cap = np.minimum(np.round(self._demand.in_flight(1) * self._cap.factor), decision.max_batch_size)
        return replace(
            decision,
            max_batch_size=np.maximum(cap, 1).astype(np.int64),
            admission=decision.admission * self._strictness.factor,
        )
