from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.kpa import KpaPolicy
from rl_autoscale.fleet.errors import SpecError

POOL = {"min_replicas": 1, "initial_replicas": 1, "max_replicas": 40}


def play(policy, spec, make_state, loads, ready=None, start=1):
    """Targets for loads given every 10 s; replicas are ready at once unless ``ready`` fixes them."""
    policy.reset(spec)
    target, seen = start, []
    for k, load in enumerate(loads):
        serving = target if ready is None else ready
        state = make_state(spec, time_s=10.0 * k, ready=serving, asked_for=target, running=load)
        target = int(policy.decide(state).target_replicas[0])
        seen.append(target)
    return seen


def test_stable_mode_follows_the_mean_of_the_window(make_spec, make_state):
    policy = KpaPolicy(target=10.0, panic_threshold=100.0)
    # means of the last six readings: 10, 15, 20, 25, 28, 30, 34
    loads = [10, 20, 30, 40, 40, 40, 34]
    assert play(policy, make_spec(pool=POOL), make_state, loads) == [1, 2, 2, 3, 3, 3, 4]


def test_panic_takes_the_newest_reading_and_never_shrinks(make_spec, make_state):
    policy = KpaPolicy(target=10.0)
    loads = [10, 50, 5, 5, 5, 5, 5, 5, 5]
    # at 10 s five wanted against one ready: panic; it ends at 70 s, 60 s later, with a mean of 5 -> 1, halved at most
    assert play(policy, make_spec(pool=POOL), make_state, loads) == [1, 5, 5, 5, 5, 5, 5, 2, 1]


def test_a_fleet_of_several_begins_in_panic(make_spec, make_state):
    loads = [10] * 8
    assert play(KpaPolicy(target=10.0), make_spec(pool=POOL), make_state, loads, start=6) == [6] * 6 + [3, 1]


def test_scale_down_delay_holds_the_largest_answer(make_spec, make_state):
    policy = KpaPolicy(target=10.0, panic_threshold=100.0, stable_window_s=10.0, scale_down_delay_s=30.0)
    assert play(policy, make_spec(pool=POOL), make_state, [40, 10, 10, 10, 10, 10]) == [4, 4, 4, 2, 2, 2]


def test_zero_needs_an_idle_window_and_grace(make_spec, make_state):
    spec = make_spec(pool=POOL | {"min_replicas": 0})
    seen = play(KpaPolicy(target=10.0), spec, make_state, [10] + [0] * 10)
    assert seen == [1] * 9 + [0, 0]  # 60 s and 30 s after the last load at 0 s


def test_tokens_as_load(make_spec, make_state):
    spec = make_spec(pool=POOL | {"kv_blocks": 1000})
    policy = KpaPolicy(target=8000.0, metric="tokens")
    policy.reset(spec)
    state = make_state(spec, ready=1, kv_usage=1.0, queued_prompt_tokens=4000)
    assert policy.decide(state).target_replicas.tolist() == [3]


def test_a_gap_holds_and_does_not_enter_the_window(make_spec, make_state):
    policy = KpaPolicy(target=10.0, panic_threshold=100.0)
    assert play(policy, make_spec(pool=POOL), make_state, [40, np.nan, np.nan, 40]) == [4, 4, 4, 4]


def test_an_unknown_metric_is_refused():
    with pytest.raises(SpecError, match=r"metric='token' is not allowed; did you mean 'tokens'"):
        KpaPolicy(metric="token")
