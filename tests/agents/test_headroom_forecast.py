from __future__ import annotations

import math

import numpy as np
import pytest

from rl_autoscale.agents.headroom import HeadroomPolicy
from rl_autoscale.agents.headroom_forecast import HeadroomForecastPolicy
from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.errors import SpecError


def load(requests_per_s: float) -> dict[str, float]:
    return {"arrivals_per_s": requests_per_s, "arrived_prompt_tokens_per_s": 1000.0 * requests_per_s}


def demand(spec, requests_per_s: float) -> float:
    work = DemandEstimator(spec).request_work_s(np.array([1000.0]), np.array([200.0]), np.array([0]))
    return requests_per_s * float(work[0])


def test_by_hand_over_one_start_up(make_spec, make_state):
    spec = make_spec(pool={"startup": [{"mean_s": 20.0}]})
    policy = HeadroomForecastPolicy(
        headroom=1.0, level_time_constant_s=10 / math.log(2), trend_time_constant_s=10 / math.log(2), trend_damping=1.0
    )  # alpha = beta = 0.5, no damping
    policy.reset(spec)
    assert policy.decide(make_state(spec, **load(40.0))).target_replicas[0] == math.ceil(demand(spec, 40.0))
    target = policy.decide(make_state(spec, time_s=10, **load(80.0))).target_replicas[0]
    # level 60, trend 10 per step, three steps until a replica asked for now has served one
    assert target == math.ceil(demand(spec, 90.0))


def test_a_falling_trend_does_not_go_below_the_level(make_spec, make_state):
    spec = make_spec()
    policy = HeadroomForecastPolicy(
        headroom=1.0, level_time_constant_s=10 / math.log(2), trend_time_constant_s=10 / math.log(2), trend_damping=1.0
    )
    policy.reset(spec)
    policy.decide(make_state(spec, **load(80.0)))
    target = policy.decide(make_state(spec, time_s=10, **load(40.0))).target_replicas[0]
    assert target == math.ceil(demand(spec, 60.0))


def test_on_a_ramp_it_is_ahead_of_headroom(make_spec, make_state):
    spec = make_spec()
    ahead, behind = HeadroomForecastPolicy(headroom=1.2), HeadroomPolicy(headroom=1.2)
    targets = []
    for policy in (ahead, behind):
        policy.reset(spec)
        states = (make_state(spec, time_s=10.0 * k, **load(20.0 + 4.0 * k)) for k in range(40))
        targets.append([int(policy.decide(state).target_replicas[0]) for state in states][-1])
    assert targets[0] > targets[1]


def test_unmeasured_is_held_and_gaps_change_nothing(make_spec, make_state):
    spec = make_spec()
    policy = HeadroomForecastPolicy()
    policy.reset(spec)
    blind = {"arrivals_per_s": np.nan, "arrived_prompt_tokens_per_s": np.nan}
    assert policy.decide(make_state(spec, ready=9, **blind)).target_replicas[0] == 9
    known = policy.decide(make_state(spec, time_s=10, ready=9, **load(30.0))).target_replicas[0]
    assert known != 9
    assert policy.decide(make_state(spec, time_s=20, ready=9, **blind)).target_replicas[0] == known


@pytest.mark.parametrize("knobs", [{"headroom": 0.0}, {"trend_damping": 1.5}, {"season_s": -1.0}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(SpecError, match=next(iter(knobs))):
        HeadroomForecastPolicy(**knobs)
