"""What a causal policy could do at best, where that can be computed: a planner that knows the generator, not its draw.

The clairvoyant plan (agents/oracle.py) knows every arrival to come, so what it saves is partly foresight that nobody
has. Here the load is a Markov chain over rates, and the planner knows its rates, its jumps and the state it is in, but
no jump to come. In the *quasi-static* model

- n ready replicas under rate k miss the share that a simulated fleet of n misses at that constant rate, with the batch
  cap and the strictness of refusal that are best for (k, n): `measure_capacity`;
- a start takes an Erlang time of the fleet's mean and spread, costs GPU time from the moment it is asked for, and can
  be called off; giving a ready replica back is free;

and the cost is GPU time plus a price per missed request: the reward of envs/reward.py. The misses that the j-th replica
avoids fall with j and depend on nothing but the rate, so the fleet falls apart into *slots*, the j-th replica each, and
every slot is a small Markov decision process of its own: off, starting (by stage), on. Their optima nest (a slot that
is worth less is started later and given up sooner), so together they are the optimum of the whole fleet, and the plan
is three thresholds by rate: start up to, keep up to, and call off starts beyond. tests/experiments/
test_causal_optimum.py compares with a dynamic programme over whole fleets.

What the model leaves out: queues carried from one rate into the next, the start of a burst within a control step, and
noise that shows where a rate is going. So a policy may beat the planner in simulation, but hardly by much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import expm

from rl_autoscale.agents.base import RulePolicy
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.rng import stream
from rl_autoscale.fleet.spec import FleetSpec, IntArray
from rl_autoscale.fleet.state import FleetState, FloatArray, ScalingDecision
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.workload.arrivals import GapLaw, RateCurve, sample_arrivals
from rl_autoscale.workload.curves import constant, markov_modulated, rate_at
from rl_autoscale.workload.lengths import LengthModel, sample_lengths
from rl_autoscale.workload.trace import Workload

MEASURED_S = 300.0
"""How long a fleet is held at a constant rate."""
NO_MISSES = 5e-4
"""From here on another replica is taken to avoid nothing."""
BATCH_CAPS = (1.0, 0.5, 0.25)
"""Shares of the engine's limit that are tried."""
STRICTNESS = (0.25, 0.5, 1.0)
"""Admission levels that are tried."""
MOST_STAGES = 25


@dataclass(frozen=True, slots=True)
class MarkovLoad:
    """A Markov chain over rates, as `workload.curves.markov_modulated` draws it.

    Attributes:
        rates_per_s: one of each state.
        mean_sojourns_s: mean stay in each; then a jump to any other, all alike.
        cv: of the gaps between arrivals.
        lengths: of the requests.
    """

    rates_per_s: tuple[float, ...]
    mean_sojourns_s: tuple[float, ...]
    cv: float
    lengths: LengthModel

    def jumps(self, step_s: float) -> FloatArray:
        """Probability of each state a step later, shape (from, to)."""
        leave = 1.0 / np.asarray(self.mean_sojourns_s)
        rates = np.repeat(leave[:, None] / (len(leave) - 1), len(leave), axis=1)
        np.fill_diagonal(rates, -leave)
        return np.asarray(expm(rates * step_s))

    def draw(self, seed: int, span_s: float, class_name: str) -> tuple[Workload, RateCurve]:
        """Requests of one class, and the rate that they were drawn at."""
        rng = stream(seed, "markov-load")
        curve = markov_modulated(rng, self.rates_per_s, self.mean_sojourns_s, span_s)
        return self._requests(rng, curve, class_name), curve

    def held(self, state: int, span_s: float, class_name: str) -> Workload:
        """Requests at the constant rate of one state."""
        return self._requests(stream(state, "held-load"), constant(self.rates_per_s[state], span_s), class_name)

    def _requests(self, rng: np.random.Generator, curve: RateCurve, class_name: str) -> Workload:
        arrival_s = sample_arrivals(rng, curve, GapLaw(self.cv))
        prompt, output = sample_lengths(rng, self.lengths, arrival_s.size)
        classes = np.zeros(arrival_s.size, dtype=np.int16)
        return Workload(arrival_s, prompt, output, classes, (class_name,), curve.span_s)


@dataclass(frozen=True, slots=True, eq=False)
class Capacity:
    """What n ready replicas miss at each rate, and how they are held to miss so little.

    Attributes:
        missed: shape (num_states, max_replicas + 1), share of the arrivals, not rising with n.
        batch_cap: of that shape, requests in flight per replica.
        admission: of that shape.
        selectivity: of refusal, everywhere.
    """

    missed: FloatArray
    batch_cap: IntArray
    admission: FloatArray
    selectivity: float = 0.0


@dataclass(kw_only=True, eq=False)
class _HeldPolicy(RulePolicy):
    """A fixed fleet with one batch cap and one strictness."""

    replicas: int

    def decide(self, state: FleetState) -> ScalingDecision:
        return self.decision(np.array([self.replicas]))


def measure_capacity(
    spec: FleetSpec,
    load: MarkovLoad,
    report: Callable[[int, int], None] | None = None,
    span_s: float = MEASURED_S,
    selectivity: float = 0.0,
) -> Capacity:
    """Hold every size of the fleet at every rate, with each batch cap and strictness, and keep the best.

    Args:
        spec: a fleet of one pool and one class.
        load: the rates, gaps and lengths.
        report: called with states done and all states.
        span_s: simulated time of each.
        selectivity: of refusal (fleet/admission.py).

    Raises:
        SpecError: another fleet.
    """
    if len(spec.pools) != 1 or len(spec.classes) != 1:
        raise SpecError(f"the planner knows one pool and one class, not {len(spec.pools)} and {len(spec.classes)}")
    pool, limit = spec.pools[0], int(spec.batch_limits[0])
    shape = len(load.rates_per_s), pool.max_replicas + 1
    missed, caps, admission = np.zeros(shape), np.full(shape, limit), np.ones(shape)
    missed[:, 0] = 1.0
    for k in range(shape[0]):
        workload = load.held(k, span_s, spec.classes[0].name)
        for n in range(1, shape[1]):
            if missed[k, n - 1] <= NO_MISSES:
                break
            fleet = spec.model_copy(update={"pools": (pool.model_copy(update={"initial_replicas": n}),)})
            best = min(
                (_misses(fleet, workload, n, round(share * limit), strict, selectivity), -share, -strict)
                for share in BATCH_CAPS
                for strict in STRICTNESS
            )
            missed[k, n] = min(best[0], missed[k, n - 1])
            caps[k, n], admission[k, n] = round(-best[1] * limit), -best[2]
        if report is not None:
            report(k + 1, shape[0])
    return Capacity(missed, caps, admission, selectivity)


def _misses(
    spec: FleetSpec, workload: Workload, replicas: int, batch_cap: int, admission: float, selectivity: float
) -> float:
    fleet = SimFleet(spec, workload, seed=0)
    held = _HeldPolicy(replicas=replicas, batch_cap=batch_cap, admission=admission, selectivity=selectivity)
    run_control_loop(fleet, held)
    return 1.0 - fleet.result().slo_attainment


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Thresholds on replicas by the load's state.

    Attributes:
        start: shape (num_states,); so many are at least asked for.
        keep: shape (num_states,); of ready replicas so many are kept at most.
        finish: shape (num_states, num_stages); a start in that stage goes on while it is among so many.
    """

    start: IntArray
    keep: IntArray
    finish: IntArray


def solve_slots(
    avoided_per_step: FloatArray, jumps: FloatArray, progress: FloatArray, gpu_s_per_step: float, num_steps: int
) -> Plan:
    """The optimal plan, slot by slot, by backward induction.

    Args:
        avoided_per_step: misses that the j-th replica avoids in a step, times the price, in GPU-seconds; shape
            (num_slots, num_states), not rising along the slots.
        jumps: of the load, shape (num_states, num_states).
        progress: of a start by a step, shape (num_stages + 1, num_stages + 1), the last stage being ready.
        gpu_s_per_step: cost of a replica, starting or ready.
        num_steps: until the end, at which nothing is worth anything.
    """
    num_slots, num_states = avoided_per_step.shape
    stages = len(progress) - 1
    off = np.zeros((num_slots, num_states))
    on = np.zeros((num_slots, num_states, stages + 1))  # by stage; the last is ready
    serves = np.concatenate((np.zeros((*avoided_per_step.shape, stages)), avoided_per_step[..., None]), axis=2)
    for _ in range(num_steps):
        stay_off = off @ jumps.T
        next_on = np.einsum("kl,jlt,st->jks", jumps, on, progress, optimize=True)
        go_on = gpu_s_per_step - serves + next_on
        starts, kept = go_on[..., 0] < stay_off, go_on < stay_off[..., None]
        off = np.where(starts, go_on[..., 0], stay_off)
        on = np.where(kept, go_on, stay_off[..., None])
    counts = kept.sum(axis=0)
    return Plan(starts.sum(axis=0), counts[:, -1], counts[:, :-1])


def start_progress(mean_s: float, cv: float, step_s: float) -> FloatArray:
    """Probability of each stage of an Erlang start a step later, shape (stages + 1, stages + 1).

    A constant start (cv 0) is taken for one of `MOST_STAGES` stages.

    Raises:
        SpecError: a start that takes no time.
    """
    if not mean_s > 0:
        raise SpecError(f"a start of {mean_s:g} s cannot be planned for; it must take longer than 0")
    stages = min(max(round(1.0 / cv**2), 1), MOST_STAGES) if cv > 0 else MOST_STAGES
    rates = np.diag(np.full(stages, stages / mean_s), k=1)
    return np.asarray(expm((rates - np.diag(rates.sum(axis=1))) * step_s))


def plan_fleet(spec: FleetSpec, load: MarkovLoad, capacity: Capacity, gpu_s_per_miss: float, span_s: float) -> Plan:
    """The optimal plan of a fleet of one pool.

    Args:
        spec: the fleet.
        load: the load.
        capacity: of that fleet at the load's rates.
        gpu_s_per_miss: price of a missed request in GPU-seconds.
        span_s: length of the episode; the plan is that of its beginning.
    """
    pool, step_s = spec.pools[0], spec.control_interval_s
    avoided = -np.diff(np.array([_convex(row) for row in capacity.missed]), axis=1)  # share, (states, slots)
    arrivals = np.asarray(load.rates_per_s)[:, None] * step_s
    mean_s = pool.startup_mean_s
    spread_s = float(np.sqrt(sum((phase.cv * phase.mean_s) ** 2 for phase in pool.startup)))
    return solve_slots(
        gpu_s_per_miss * (arrivals * avoided).T,
        load.jumps(step_s),
        start_progress(mean_s, spread_s / mean_s if mean_s > 0 else 0.0, step_s),
        pool.hardware.gpus_per_replica * step_s,
        round(span_s / step_s),
    )


def _convex(missed: FloatArray) -> FloatArray:
    """The largest convex function below: chance in what was measured would make a replica worth more than the last."""
    hull: list[int] = []
    for n in range(len(missed)):
        while len(hull) > 1 and _slope(missed, hull[-2], hull[-1]) >= _slope(missed, hull[-1], n):
            hull.pop()
        hull.append(n)
    return np.interp(np.arange(len(missed)), hull, missed[hull])


def _slope(values: FloatArray, a: int, b: int) -> float:
    return float(values[b] - values[a]) / (b - a)


class CausalPlanner:
    """The plan as a policy: it is told the load's state at every moment, and no more.

    Args:
        load: the load.
        curve: the rate that this episode's requests were drawn at.
        capacity: of the fleet.
        plan: its thresholds.
    """

    name = "causal planner"

    def __init__(self, load: MarkovLoad, curve: RateCurve, capacity: Capacity, plan: Plan) -> None:
        self._states: npt.NDArray[np.float64] = np.asarray(load.rates_per_s)
        self._curve, self._capacity, self._plan = curve, capacity, plan
        self._mean_start_s = 1.0

    def reset(self, spec: FleetSpec) -> None:
        """Prepare for a fleet of one pool."""
        self._mean_start_s = max(spec.pools[0].startup_mean_s, 1e-9)

    def decide(self, state: FleetState) -> ScalingDecision:
        """The thresholds of the state that the load is in."""
        rate = rate_at(self._curve, np.minimum(np.atleast_1d(state.time_s), self._curve.span_s))[0]
        k = int(np.abs(self._states - rate).argmin())
        plan, ready, asked = self._plan, int(state.pools.ready[0]), int(state.pools.asked_for[0])
        going_on = min(ready, int(plan.keep[k]))
        if asked > ready:
            stages = plan.finish.shape[1]
            stage = min(int(state.pools.newest_start_age_s[0] / self._mean_start_s * stages), stages - 1)
            going_on = max(going_on, min(asked, int(plan.finish[k, stage])))
        target = max(int(plan.start[k]), going_on)
        held = min(max(ready, 1), self._capacity.missed.shape[1] - 1)
        return ScalingDecision(
            target_replicas=np.array([target]),
            max_batch_size=self._capacity.batch_cap[k, held : held + 1],
            admission=self._capacity.admission[k, held : held + 1],
            selectivity=np.array([self._capacity.selectivity]),
        )
