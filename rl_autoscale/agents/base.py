"""What every policy declares, and what every hand-written rule shares.

A new policy is one file with one class and one line in `rl_autoscale.agents.registry.POLICIES`. The class says what
it reads, which rule it follows, where the rule comes from and which knob trades cost for attainment, so that the
benchmark can sweep it and `docs/policies.md` can be checked against it. Its knobs are its keyword arguments.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

import numpy as np

from rl_autoscale.fleet.demand import StandIns
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import FleetSpec, IntArray
from rl_autoscale.fleet.state import NEVER_REFUSE, FleetState, FloatArray, ScalingDecision


@dataclass(frozen=True, slots=True)
class Knob:
    """The one number that moves a policy along its cost/attainment front.

    Attributes:
        name: the keyword argument of the policy.
        sweep: the values the benchmark tries, in increasing order.
        meaning: one phrase with the unit.
    """

    name: str
    sweep: tuple[float, ...]
    meaning: str


class RegisteredPolicy(ABC):
    """A policy that can be made by name; satisfies `fleet.protocols.Policy`.

    Attributes:
        selectivity: of its refusal (fleet/admission.py), never changed.
    """

    NAME: ClassVar[str]
    READS: ClassVar[str]
    RULE: ClassVar[str]
    SOURCE: ClassVar[str]
    KNOB: ClassVar[Knob | None]

    selectivity: float

    @property
    @abstractmethod
    def name(self) -> str:
        """The registered name, knob values included where they differ from the default."""

    @property
    @abstractmethod
    def usual_admission(self) -> float:
        """The admission level of a rule in its place: its own, 1 where it sets one anew at each step, inf for never."""

    @abstractmethod
    def reset(self, spec: FleetSpec) -> None:
        """Forget everything and prepare for a fleet."""

    @abstractmethod
    def decide(self, state: FleetState) -> ScalingDecision:
        """Answer one observation of one fleet (no leading dimensions)."""

    def turn(self, knobs: Mapping[str, object]) -> None:
        """Go on with another setting of the dial, without forgetting what was seen.

        Args:
            knobs: all of the policy's, as when it was made; only those of its dial may differ.

        Raises:
            SpecError: this policy has no dial, another knob differs too, or a value is not allowed; nothing is changed.
        """
        raise SpecError(f"policy '{self.NAME}' has no dial that turns while it runs; restart for other knobs")

    @classmethod
    def knob_names(cls) -> tuple[str, ...]:
        """The keyword arguments the policy takes."""
        return tuple(inspect.signature(cls).parameters)

    @classmethod
    def required_knob_names(cls) -> tuple[str, ...]:
        """Those without a default."""
        parameters = inspect.signature(cls).parameters
        return tuple(name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty)


@dataclass(kw_only=True, eq=False)
class RulePolicy(RegisteredPolicy):
    """A rule written by hand: its keyword arguments are the dataclass fields.

    Attributes:
        admission: early refusal, the same for all classes and never changed: a request is refused when its estimated
            time to first token exceeds ``admission * ttft_slo_s``; inf (the default) never refuses, 1 refuses what
            would miss.
        selectivity: how much more readily requests of much work are refused (fleet/admission.py), the same for all
            classes; 0 treats all alike.
        batch_cap: requests in flight the gateway allows per replica; None leaves the engine's ``max_num_seqs``.
        least_replicas: of each pool, whatever the rule says: ``minReplicas`` of an HPA, ``min-scale`` of Knative.
    """

    admission: float = NEVER_REFUSE
    selectivity: float = 0.0
    batch_cap: int | None = None
    least_replicas: int = 0
    _spec: FleetSpec | None = field(default=None, init=False, repr=False)
    _stand_ins: StandIns | None = field(default=None, init=False, repr=False)
    _last_target: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.admission != NEVER_REFUSE:
            self._check("admission", self.admission, low=0.0)
        self._check("selectivity", self.selectivity, low=0.0)
        if self.batch_cap is not None:
            self._check("batch_cap", self.batch_cap, low=1)
        self._check("least_replicas", self.least_replicas, low=0)

    @property
    def name(self) -> str:
        """The registered name and, in brackets, the knobs that differ from their defaults."""
        changed = []
        for knob in fields(self):
            value = getattr(self, knob.name)
            if knob.init and isinstance(value, int | float | str | Mapping) and value != knob.default:
                changed.append(f"{knob.name}={value:g}" if isinstance(value, int | float) else f"{knob.name}={value}")
        return f"{self.NAME}({', '.join(changed)})" if changed else self.NAME

    @property
    def usual_admission(self) -> float:
        """Its knob: a rule's level never changes."""
        return float(self.admission)

    @property
    def spec(self) -> FleetSpec:
        """The fleet given to `reset`."""
        if self._spec is None:
            raise RuntimeError(f"policy '{self.NAME}' was asked to decide before reset(spec)")
        return self._spec

    @property
    def stand_ins(self) -> StandIns:
        """Pools that nobody prefers, for rules that size the others."""
        if self._stand_ins is None:
            raise RuntimeError(f"policy '{self.NAME}' was asked to decide before reset(spec)")
        return self._stand_ins

    def reset(self, spec: FleetSpec) -> None:
        """Forget everything and prepare for a fleet."""
        self._spec = spec
        self._stand_ins = StandIns(spec)
        self._last_target = spec.initial_replicas.copy()

    def standing_target(self, state: FleetState) -> IntArray:
        """Replicas asked for now, shape (num_pools,); where that is missing, what this policy last asked for."""
        asked_for = state.pools.asked_for
        assert asked_for.shape == (len(self.spec.pools),), "one fleet at a time, the one given to reset"
        return np.where(np.isnan(asked_for), self._last_target, asked_for).astype(np.int64)

    def decision(
        self, target_replicas: IntArray | FloatArray, max_batch_size: IntArray | None = None
    ) -> ScalingDecision:
        """Turn replica targets into a decision inside the pools' bounds, and remember it.

        Args:
            target_replicas: shape (num_pools,), whole numbers.
            max_batch_size: shape (num_pools,); None takes ``batch_cap``, or the engine's limit where that is None.
        """
        spec = self.spec
        if max_batch_size is None:
            max_batch_size = self.batch_ceiling()
        target = np.maximum(target_replicas, math.ceil(self.least_replicas))
        target = np.clip(target, spec.min_replicas, spec.max_replicas).astype(np.int64)
        self._last_target = target
        return ScalingDecision(
            target_replicas=target.copy(),
            max_batch_size=np.clip(max_batch_size, 1, spec.batch_limits).astype(np.int64),
            admission=np.full(len(spec.classes), float(self.admission)),
            selectivity=np.full(len(spec.classes), float(self.selectivity)),
        )

    def batch_ceiling(self) -> IntArray:
        """The largest batch cap allowed, shape (num_pools,): ``batch_cap``, never above the engine's limit."""
        limits = self.spec.batch_limits
        return limits.copy() if self.batch_cap is None else np.minimum(limits, self.batch_cap)

    def _check(self, name: str, value: object, *, low: float, high: float = math.inf, above: bool = False) -> None:
        """Refuse a knob that is no finite number in [low, high], or in (low, high] if ``above``."""
        if (
            isinstance(value, int | float)
            and low <= value <= high
            and math.isfinite(value)
            and not (above and value == low)
        ):
            return
        bounds = f"{'greater than' if above else 'at least'} {low:g}"
        bounds += f" and at most {high:g}" if high < math.inf else ""
        raise SpecError(f"policy '{self.NAME}': {name}={value!r} is not allowed; it must be a finite number {bounds}")


def ceil_replicas(replicas: float) -> int:
    """Round a replica count up, forgiving the last bits of floating point (1 / (1 / 3) is 3, not 4)."""
    return math.ceil(replicas - 1e-9)
