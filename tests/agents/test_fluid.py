from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_autoscale.agents.fluid import FluidProblem, ready_replicas, shortage_quanta, solve_fluid
from rl_autoscale.fleet.errors import SpecError


def problem(least_ready, *, deferrable=None, bound=None, urgent=None, m=1, startup=2, initial=0, least=0, most=4):
    zeros = np.zeros(len(least_ready), dtype=np.int64)
    arrays = [zeros if array is None else np.array(array) for array in (urgent, deferrable, bound)]
    return FluidProblem(np.array(least_ready), *arrays, m, startup, initial, least, most)


class TestPlans:
    def test_start_is_asked_for_one_start_up_ahead(self):
        plan = solve_fluid(problem([0, 0, 0, 2, 2, 0]))
        assert plan.asked_for.tolist() == [0, 2, 2, 2, 2, 0]
        assert plan.ready.tolist() == [0, 0, 0, 2, 2, 0]
        assert (plan.cost_replica_steps, plan.shortage_quanta) == (8, 0)

    def test_short_gaps_are_bridged_and_long_ones_not(self):
        assert solve_fluid(problem([0, 0, 1, 0, 1], startup=2)).asked_for.tolist() == [1] * 5
        long_gap = solve_fluid(problem([0, 0, 1, 0, 0, 0, 1], startup=2))
        assert long_gap.asked_for.tolist() == [1, 1, 1, 0, 1, 1, 1]

    def test_work_before_anything_can_start_is_a_shortage(self):
        plan = solve_fluid(problem([2, 2, 2, 2], startup=2, initial=1, m=3))
        assert plan.shortage_quanta == 6
        assert plan.ready.tolist() == [1, 1, 2, 2]

    def test_deferrable_work_waits_for_spare_capacity(self):
        # one replica is there for urgent work in steps 2 and 3; the job of step 0 may wait until then
        patient = problem([0, 0, 1, 1], deferrable=[1, 0, 0, 0], bound=[1, 1, 0, 0], initial=0)
        assert solve_fluid(patient).cost_replica_steps == 4
        assert solve_fluid(patient).shortage_quanta == 0
        hurried = problem([0, 0, 1, 1], deferrable=[1, 0, 0, 0], bound=[0, 0, 0, 0], initial=1)
        assert solve_fluid(hurried).asked_for.tolist() == [1, 1, 1, 1]

    def test_urgent_work_goes_first(self):
        taken = problem([1, 1, 1], urgent=[2, 2, 0], deferrable=[2, 0, 0], bound=[2, 2, 0], m=2, initial=1)
        assert solve_fluid(taken).cost_replica_steps == 3
        assert solve_fluid(taken).shortage_quanta == 0


@st.composite
def small_problems(draw):
    num_steps, most, m = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    least = draw(st.integers(0, most))

    def column(high: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(0, high), min_size=num_steps, max_size=num_steps)))

    return FluidProblem(
        least_ready=column(most + 1),
        urgent_quanta=column(m),
        deferrable_quanta=column(2 * m),
        backlog_bound=column(3 * m),
        quanta_per_replica_step=m,
        startup_steps=draw(st.integers(0, 3)),
        initial=draw(st.integers(least, most)),
        min_replicas=least,
        max_replicas=most,
    )


@settings(max_examples=150)
@given(small_problems())
def test_brute_force_over_every_plan_finds_nothing_better(case):
    choices = range(case.min_replicas, case.max_replicas + 1)

    def score(asked_for: tuple[int, ...]) -> tuple[int, int]:
        ready = ready_replicas(np.array(asked_for), case.startup_steps, case.initial)
        return shortage_quanta(case, ready), sum(asked_for)

    best = min(score(asked_for) for asked_for in itertools.product(choices, repeat=len(case.least_ready)))
    plan = solve_fluid(case)
    assert (plan.shortage_quanta, plan.cost_replica_steps) == best
    assert score(tuple(plan.asked_for)) == best


def test_ready_is_what_was_asked_for_throughout_the_start_up():
    asked_for = np.array([3, 1, 4, 4, 4, 2])
    assert ready_replicas(asked_for, startup_steps=2, initial=2).tolist() == [2, 1, 1, 1, 4, 2]
    assert ready_replicas(asked_for, startup_steps=0, initial=2).tolist() == asked_for.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"least_ready": []}, r"one length >= 1"),
        ({"least_ready": [1], "deferrable": [1, 2]}, r"lengths \[1, 2\]"),
        ({"least_ready": [-1]}, r"negative"),
        ({"least_ready": [1], "initial": 9}, r"initial=9 must be within"),
        ({"least_ready": [1], "m": 0}, r"quanta_per_replica_step=0"),
    ],
)
def test_nonsense_is_refused(changes, message):
    with pytest.raises(SpecError, match=message):
        problem(**changes)
