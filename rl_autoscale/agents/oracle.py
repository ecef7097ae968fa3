"""The clairvoyant planner: the cheapest replica plan for work that is known in advance.

It is given the true future (every arrival with its output length) and the mean start-up time, builds a fluid problem
per pool and solves it exactly (`rl_autoscale.agents.fluid`).

Optimal: total replica-seconds over the horizon, start-up time included, in the fluid model, for the utilisation target
given. Approximated, so that a lucky policy may beat it in simulation:

- capacity: a ready replica does ``utilisation`` replica-seconds of full-batch work per second, whatever the batch is;
- urgent classes (allowed wait up to one control interval): prefill work counts at arrival, decode work is spread over
  the output at the pace of a full batch; the peak over sub-steps as long as the shortest allowed wait must fit (at most
  ten sub-steps per control step);
- deferrable classes (a longer allowed wait): all work counts at arrival, first come first served, done within the wait;
  urgent work goes first; several classes share one backlog whose bound is the sum of theirs;
- each class is served by its first-choice pool alone; pools are planned one by one; start-up takes its mean; drains
  cost nothing.

The front it draws is its knob's: a low utilisation buys slack for what the fluid does not see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from rl_autoscale.agents.base import Knob, RulePolicy
from rl_autoscale.agents.fluid import FluidPlan, solve_fluid
from rl_autoscale.agents.oracle_work import KnownWork, fluid_problem, known_work
from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision


@dataclass(kw_only=True, eq=False)
class OraclePolicy(RulePolicy):
    """Replay the optimal plan of the known future; reads nothing but the clock.

    Attributes:
        arrival_s: shape (n,), seconds from the start of control.
        prompt_tokens: shape (n,).
        output_tokens: shape (n,), the true ones.
        class_index: shape (n,), into the fleet's classes.
        utilisation: share of a replica's full-batch capacity that is planned with.
        startup_s: from asking to serving; None takes each pool's mean.
        horizon_s: when control ends, and by when all work must be done; None plans up to the last allowed moment.
    """

    NAME: ClassVar[str] = "oracle"
    READS: ClassVar[str] = "the true future arrivals and lengths; of the fleet, only the clock"
    RULE: ClassVar[str] = (
        "cheapest replica plan that serves the known work in time (fluid model, exact dynamic programme)"
    )
    SOURCE: ClassVar[str] = "ours; rl_autoscale/agents/fluid.py states the model"
    KNOB: ClassVar[Knob] = Knob(
        "utilisation",
        (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.1, 1.2),
        "planned share of a replica's full-batch capacity",
    )

    arrival_s: npt.ArrayLike
    prompt_tokens: npt.ArrayLike
    output_tokens: npt.ArrayLike
    class_index: npt.ArrayLike
    utilisation: float = 0.8
    startup_s: float | None = None
    horizon_s: float | None = None
    _plans: dict[int, FluidPlan] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("utilisation", self.utilisation, low=0.0, high=2.0, above=True)
        if self.startup_s is not None:
            self._check("startup_s", self.startup_s, low=0.0)
        if self.horizon_s is not None:
            self._check("horizon_s", self.horizon_s, low=0.0, above=True)
        columns = self._columns()
        if len({column.shape for column in columns.values()}) != 1 or columns["arrival_s"].ndim != 1:
            shapes = ", ".join(f"{name} {column.shape}" for name, column in columns.items())
            raise SpecError(f"policy 'oracle': the workload's arrays must be flat and equally long; got {shapes}")
        for name, column in columns.items():
            if not np.all(np.isfinite(column)) or (column < 0).any():
                raise SpecError(f"policy 'oracle': {name} holds a negative or non-finite entry")

    def _columns(self) -> dict[str, npt.NDArray[Any]]:
        names = ("arrival_s", "prompt_tokens", "output_tokens", "class_index")
        return {name: np.asarray(getattr(self, name)) for name in names}

    def reset(self, spec: FleetSpec) -> None:
        """Plan the whole horizon for a fleet; raises SpecError when ``class_index`` does not fit its classes."""
        super().reset(spec)
        columns = self._columns()
        classes = columns["class_index"].astype(np.int64)
        if len(classes) and classes.max() >= len(spec.classes):
            raise SpecError(
                f"policy 'oracle': class_index {classes.max()} is outside the fleet's {len(spec.classes)} classes"
            )
        demand = DemandEstimator(spec)
        self._plans = {}
        for p, pool in enumerate(spec.pools):
            work = known_work(spec, p, columns, which=demand.classes_asking(p)[classes])
            if len(work.arrival_s):
                self._plans[p] = self._plan(spec, pool, work)

    def _plan(self, spec: FleetSpec, pool: PoolSpec, work: KnownWork) -> FluidPlan:
        affordable = pool.max_replicas
        if spec.gpu_budget is not None:
            affordable = min(affordable, spec.gpu_budget // pool.hardware.gpus_per_replica)
        bounded = pool.model_copy(update={"max_replicas": affordable})
        startup_s = pool.startup_mean_s if self.startup_s is None else self.startup_s
        return solve_fluid(
            fluid_problem(
                work,
                bounded,
                step_s=spec.control_interval_s,
                utilisation=self.utilisation,
                startup_s=startup_s,
                horizon_s=self.horizon_s,
            )
        )

    def decide(self, state: FleetState) -> ScalingDecision:
        """The plan's entry for this step; the pools' minimum once the known work is over."""
        spec = self.spec
        step = round(float(state.time_s) / spec.control_interval_s)
        target = spec.min_replicas.copy()
        for pool, plan in self._plans.items():
            if step < len(plan.asked_for):
                target[pool] = plan.asked_for[step]
        return self.decision(target)
