"""Asked for an attainment: the budget's arithmetic, its silence without data, and that it steers a fleet."""

from __future__ import annotations

import math

import pytest

from rl_autoscale.agents.error_budget import HORIZON_S, ErrorBudget
from rl_autoscale.agents.headroom_budget import HeadroomBudgetPolicy
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import SimFleet
from tests.envs.toy import poisson_workload


@pytest.fixture
def observe(make_state, make_spec):
    """A window of ten seconds in which so many requests per second met their SLOs, and so many did not."""
    spec = make_spec("mixed")
    return lambda met_per_s, missed_per_s: make_state(
        spec, finished_per_s=met_per_s + missed_per_s / 2, met_per_s=met_per_s, refused_per_s=missed_per_s / 2
    )


def feed(budget: ErrorBudget, state, steps: int) -> float:
    answer = 0.0
    for _ in range(steps):
        answer = budget.update(state)
    return answer


def test_exactly_as_asked_changes_nothing(observe):
    assert feed(ErrorBudget(0.98, gain=1.0, bound=3.0), observe(98.0, 2.0), 500) == pytest.approx(0.0, abs=1e-9)


def test_overspending_is_counted_in_budgets(observe):
    budget = ErrorBudget(0.98, gain=1.0, bound=100.0)
    feed(budget, observe(97.0, 3.0), 3000)
    # Long after the start: (3 - 2) / 2 of the horizon, diluted by the opening of 300 s that counts as kept.
    assert budget.overspent == pytest.approx(0.5 * HORIZON_S / (HORIZON_S + 300.0), rel=0.01)
    feed(budget, observe(100.0, 0.0), 3000)
    assert budget.overspent == pytest.approx(-HORIZON_S / (HORIZON_S + 300.0), rel=0.01)


def test_answers_stay_within_the_bound_and_unwind(observe):
    budget = ErrorBudget(0.98, gain=2.0, bound=1.5)
    assert feed(budget, observe(0.0, 100.0), 2000) == 1.5
    back = next(k for k in range(2000) if budget.update(observe(100.0, 0.0)) < 0)
    assert back * 10 < 4 * HORIZON_S


def test_missing_counts_change_nothing(observe):
    budget = ErrorBudget(0.98, gain=1.0, bound=3.0)
    before = feed(budget, observe(90.0, 10.0), 20)
    assert feed(budget, observe(math.nan, 10.0), 50) == pytest.approx(before)


@pytest.mark.parametrize("asked", [0.0, 1.0, 98.0, -0.5, math.nan])
def test_an_impossible_attainment_is_refused(asked):
    with pytest.raises(SpecError, match="between 0 and 1"):
        HeadroomBudgetPolicy(attainment=asked)


@pytest.mark.parametrize("headroom", [0.6, 2.5])
def test_the_rule_with_feedback_delivers_what_is_asked(headroom):
    """Begun far too lean and far too fat, later hours are near what was asked."""
    pool = {"name": "gpu", "profile": "llama-3.1-8b_a100_tp1", "max_replicas": 60, "initial_replicas": 15}
    chat = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1, "timeout_s": 20}
    spec = FleetSpec.from_dict({"pools": [pool], "classes": [chat]})
    fleet = SimFleet(spec, poisson_workload(150.0, 3 * 3600.0, 0), seed=1)
    run_control_loop(fleet, HeadroomBudgetPolicy(headroom=headroom, attainment=0.95, admission=1.0))
    records = fleet.batch.requests()
    late = records["arrival_s"] > 1.5 * 3600.0
    attained = records["slo_met"][late].mean()
    assert attained == pytest.approx(0.95, abs=0.02)
