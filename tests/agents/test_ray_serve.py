from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.ray_serve import RayServePolicy, time_weighted_mean

POOL = {"min_replicas": 1, "initial_replicas": 2, "max_replicas": 40}


def play(policy, spec, make_state, loads, start=2):
    policy.reset(spec)
    target, seen = start, []
    for k, load in enumerate(loads):
        state = make_state(spec, time_s=10.0 * k, ready=target, running=load)
        target = int(policy.decide(state).target_replicas[0])
        seen.append(target)
    return seen


def test_time_weighted_mean_of_a_step_function():
    samples = [(0.0, 10.0), (10.0, 20.0), (25.0, 40.0)]
    assert time_weighted_mean(samples, 30.0, 30.0) == pytest.approx((10 * 10 + 15 * 20 + 5 * 40) / 30)
    assert time_weighted_mean(samples, 30.0, 10.0) == pytest.approx((5 * 20 + 5 * 40) / 10)
    assert time_weighted_mean([(5.0, 7.0)], 5.0, 30.0) == 7.0


@pytest.mark.parametrize(
    ("load", "running", "factors", "expected"),
    [
        (80.0, 2, {}, 8),
        (80.0, 2, {"upscale_factor": 0.5}, 5),  # 2 + 0.5 x 6
        (35.0, 4, {}, 3),  # 3.5 rounds up to 4, so one fewer
        (10.0, 4, {"downscale_factor": 0.5}, 3),  # 4 - 0.5 x 3 = 2.5
        (0.0, 3, {}, 0),
    ],
)
def test_wish(load, running, factors, expected):
    assert RayServePolicy(target=10.0, **factors).wished(load, running, asked_for=running) == expected


def test_growth_after_its_delay_with_the_wish_at_expiry(make_spec, make_state):
    policy = RayServePolicy(target=10.0, look_back_s=10.0)
    # the mean lags one reading: 20 at 0 and 10 s, then 60, 90, 50; the wish begins at 20 s and is applied at 50 s
    loads = [20, 60, 90, 50, 50, 50, 50]
    assert play(policy, make_spec(pool=POOL), make_state, loads) == [2, 2, 2, 2, 2, 5, 5]


def test_a_break_starts_the_delay_anew(make_spec, make_state):
    policy = RayServePolicy(target=10.0, look_back_s=10.0)
    loads = [40, 40, 20, 20, 40, 40, 40, 40, 40]
    assert play(policy, make_spec(pool=POOL), make_state, loads) == [2] * 8 + [4]


def test_shrinking_waits_longer_and_stops_at_one(make_spec, make_state):
    spec = make_spec(pool=POOL | {"min_replicas": 0})
    policy = RayServePolicy(target=10.0, look_back_s=10.0, downscale_delay_s=20.0)
    assert play(policy, spec, make_state, [0] * 6, start=3) == [3, 3, 1, 1, 1, 0]


def test_from_zero_at_once(make_spec, make_state):
    spec = make_spec(pool=POOL | {"min_replicas": 0})
    policy = RayServePolicy(target=10.0)
    policy.reset(spec)
    state = make_state(spec, ready=0, asked_for=0, queue_length=1)
    assert policy.decide(state).target_replicas.tolist() == [1]


def test_a_gap_holds_the_last_reading_then_the_replicas(make_spec, make_state):
    policy = RayServePolicy(target=10.0, look_back_s=20.0, upscale_delay_s=40.0)
    loads = [20, 50] + [np.nan] * 8
    assert play(policy, make_spec(pool=POOL), make_state, loads) == [2] * 10
