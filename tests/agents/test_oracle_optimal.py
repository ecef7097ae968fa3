"""Nothing does better than the oracle in the model it claims: every replica plan of small cases is tried.

The judge below is written from the docstrings alone, request by request and in seconds, and shares no code with the
planner, which counts quanta on a grid and searches by dynamic programming. Arrivals lie on the grid, so that both speak
of the same case. A last test tries every plan in the simulator itself, where the oracle claims nothing, to say how far
its front is from the cheapest plan there.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_autoscale.agents.fluid import solve_fluid
from rl_autoscale.agents.oracle import OraclePolicy
from rl_autoscale.agents.oracle_work import KnownWork, fluid_problem
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NEVER_REFUSE, FleetState, ScalingDecision
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.workload.trace import Workload

STEP_S = 10.0
UTILISATION = 0.8
QUANTUM_S = UTILISATION * STEP_S / 20.0
"""The planner's finest unit of work; amounts below are multiples of it."""

Case = tuple[list[tuple[int, float]], list[tuple[int, float, int]], int, int, int]
"""Urgent (step, seconds of work), patient (step, seconds of work, steps to wait), start-up steps, initial, most."""


def serves_in_time(plan: tuple[int, ...], case: Case) -> bool:
    """Whether a plan serves every request in time, by following each of them."""
    urgent, patient, startup, initial, _ = case
    waiting: list[list[float]] = []  # [work left, due at the end of this step], first come first served
    for t in range(len(plan)):
        asked = min(plan[max(0, t - startup) : t + 1])
        ready = asked if t >= startup else min(initial, asked)
        arriving = sum(work for step, work in urgent if step == t)
        if arriving > ready * UTILISATION * 1.0 + 1e-9:  # it must be done within its allowed wait of one second
            return False
        capacity = ready * UTILISATION * STEP_S - arriving
        waiting += [[work, step + wait - 1] for step, work, wait in patient if step == t]
        for request in waiting:
            done = min(request[0], capacity)
            request[0] -= done
            capacity -= done
        if any(left > 1e-9 and (t >= due or t == len(plan) - 1) for left, due in waiting):
            return False
    return True


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, int]:
    steps, most = draw(st.integers(3, 6)), draw(st.integers(1, 3))
    place = st.integers(0, steps - 1)
    urgent = draw(st.lists(st.tuples(place, st.integers(1, 4)), max_size=3))
    # one allowed wait per case: with several, first come first served is not what "in time" asks for
    wait = draw(st.integers(2, steps))
    patient = draw(st.lists(st.tuples(place, st.integers(1, 30)), min_size=1, max_size=4))
    case = (
        [(step, amount * QUANTUM_S) for step, amount in urgent],
        [(step, amount * QUANTUM_S, wait) for step, amount in sorted(patient)],
        draw(st.integers(0, 2)),
        draw(st.integers(0, most)),
        most,
    )
    return case, steps


def planned(case: Case, steps: int) -> tuple[int, ...]:
    """The oracle's own plan, from requests to replicas."""
    urgent, patient, startup, initial, most = case
    wait_s = [1.0] * len(urgent) + [wait * STEP_S for _, _, wait in patient]
    work = KnownWork(
        arrival_s=np.array([item[0] * STEP_S for item in (*urgent, *patient)]),
        prefill_s=np.array([item[1] for item in (*urgent, *patient)]),
        decode_s=np.zeros(len(wait_s)),
        duration_s=np.full(len(wait_s), 1e-6),
        wait_s=np.array(wait_s),
    )
    (pool,) = fleet(most, initial).pools
    problem = fluid_problem(
        work, pool, step_s=STEP_S, utilisation=UTILISATION, startup_s=startup * STEP_S, horizon_s=steps * STEP_S
    )
    assert problem.quanta_per_replica_step == 20
    return tuple(int(n) for n in solve_fluid(problem).asked_for)


def fleet(most: int, initial: int, startup_s: float = 20.0) -> FleetSpec:
    pool = {"name": "a", "profile": "llama-3.1-8b_a100_tp1", "min_replicas": 0, "max_replicas": most}
    pool |= {"initial_replicas": initial, "startup": [{"mean_s": startup_s, "cv": 0}]}
    return FleetSpec.from_dict({"pools": [pool], "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}]})


@settings(max_examples=60, deadline=None)
@given(cases())
def test_no_replica_plan_serves_known_work_for_less(drawn: tuple[Case, int]) -> None:
    case, steps = drawn
    every_plan = itertools.product(range(case[4] + 1), repeat=steps)
    costs = [sum(plan) for plan in every_plan if serves_in_time(plan, case)]
    mine = planned(case, steps)
    if costs:
        assert serves_in_time(mine, case)
        assert sum(mine) == min(costs)
    else:
        assert not serves_in_time(mine, case)


class Replay:
    """A policy that plays a given plan."""

    name = "replay"

    def __init__(self, plan: tuple[int, ...]) -> None:
        self._plan = plan

    def reset(self, spec: FleetSpec) -> None:
        self._spec = spec

    def decide(self, state: FleetState) -> ScalingDecision:
        step = round(float(state.time_s) / self._spec.control_interval_s)
        target = self._plan[step] if step < len(self._plan) else 0
        return ScalingDecision(np.array([target]), self._spec.batch_limits, np.array([NEVER_REFUSE]))


@pytest.mark.slow
def test_in_the_simulator_every_plan_costs_about_as_much_as_the_oracle() -> None:
    """Two quiet stretches around a burst: every plan of one to three replicas that may change every 20 s."""
    rng = np.random.default_rng(0)
    arrival_s = np.sort(np.concatenate([rng.uniform(0, 140, 420), rng.uniform(60, 100, 600)]))
    n = len(arrival_s)
    columns = (np.full(n, 1000, dtype=np.int32), np.full(n, 120, dtype=np.int32), np.zeros(n, dtype=np.int16))
    workload, spec = Workload(arrival_s, *columns, ("chat",), 140.0), fleet(3, initial=1)

    def outcome(policy: object) -> tuple[float, float]:
        simulated = SimFleet(spec, workload, seed=0)
        run_control_loop(simulated, policy)  # type: ignore[arg-type]
        result = simulated.result()
        return float(result.summary()["slo_attainment"]), result.gpu_hours

    future = dict(zip(("prompt_tokens", "output_tokens", "class_index"), columns, strict=True))
    front = [outcome(OraclePolicy(arrival_s=arrival_s, **future, utilisation=u)) for u in OraclePolicy.KNOB.sweep]
    plans = itertools.product((1, 2, 3), repeat=7)
    tried = [outcome(Replay(tuple(np.repeat(plan, 2)))) for plan in plans if plan[5] >= plan[6]]
    attainment = max(a for a, _ in front)
    assert attainment > 0.95
    mine = min(hours for a, hours in front if a >= attainment - 0.01)
    best = min(hours for a, hours in tried if a >= attainment - 0.01)
    assert mine == pytest.approx(best, rel=0.25)
