from __future__ import annotations

import math

import numpy as np

from rl_autoscale.agents.inferline import InferlinePolicy, largest_window_mean
from rl_autoscale.fleet.demand import DemandEstimator


def test_largest_window_mean():
    assert largest_window_mean([1.0, 5.0, 3.0, 2.0], 2) == 4.0
    assert largest_window_mean([1.0, 5.0], 3) == 3.0
    assert math.isnan(largest_window_mean([], 2))


def rate_for(spec, replicas: float) -> dict[str, float]:
    """Arrivals that are so many replicas of work, at the prior output length."""
    work = float(DemandEstimator(spec).request_work_s(np.array([1000.0]), np.array([200.0]), np.array([0]))[0])
    return {"arrivals_per_s": replicas / work, "arrived_prompt_tokens_per_s": 1000.0 * replicas / work}


def play(policy, spec, make_state, works, start=1):
    policy.reset(spec)
    target, seen = start, []
    for k, work in enumerate(works):
        given = rate_for(spec, work) if not math.isnan(work) else dict.fromkeys(rate_for(spec, 1.0), np.nan)
        state = make_state(spec, time_s=10.0 * k, ready=target, **given)
        target = int(policy.decide(state).target_replicas[0])
        seen.append(target)
    return seen


def test_up_at_once_and_down_with_the_look_back(make_spec, make_state):
    policy = InferlinePolicy(utilisation=0.5, look_back_up_s=40.0, look_back_down_s=40.0)
    # largest two-reading means over four readings, doubled: 1, 3, 5, 5, 5, 3, 1, 1; at 60 s the last change is 10 s old
    works = [1, 5, 5, 1, 1, 1, 1, 1]
    assert play(policy, make_spec(), make_state, works) == [2, 6, 10, 10, 10, 6, 6, 2]


def test_removal_waits_for_the_stabilisation(make_spec, make_state):
    policy = InferlinePolicy(
        utilisation=1.0, window_up_s=10.0, window_down_s=10.0, look_back_up_s=10.0, look_back_down_s=10.0,
        stabilisation_s=30.0,
    )  # fmt: skip
    assert play(policy, make_spec(), make_state, [4, 2, 2, 2, 2]) == [4, 4, 4, 2, 2]


def test_gaps_hold(make_spec, make_state):
    policy = InferlinePolicy(utilisation=1.0, look_back_up_s=20.0, look_back_down_s=20.0)
    assert play(policy, make_spec(), make_state, [4] + [math.nan] * 6) == [4] * 7
    assert play(policy, make_spec(), make_state, [math.nan] * 3, start=5) == [5] * 3
