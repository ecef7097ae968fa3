from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.keda import KedaPolicy
from rl_autoscale.fleet.errors import SpecError

POOL = {"min_replicas": 1, "initial_replicas": 4, "max_replicas": 40}


def make(spec, **knobs):
    policy = KedaPolicy(**({"down_stabilisation_s": 0.0} | knobs))
    policy.reset(spec)
    return policy


def step(policy, state):
    return int(policy.decide(state).target_replicas[0])


@pytest.mark.parametrize(
    ("running", "waiting", "queued", "expected"),
    [(96, 0, 0, 6), (64, 0, 0, 4), (64, 12, 20, 7), (70, 0, 0, 4), (20, 3, 0, 2), (0, 0, 0, 1)],
    # 96/16; exactly on target; 32/5 wins over 64/16; 9 % above is tolerated; 20/16 and 3/5; never below one
)
def test_the_larger_trigger_counts(make_spec, make_state, running, waiting, queued, expected):
    spec = make_spec(pool=POOL)
    state = make_state(spec, ready=4, running=running, waiting=waiting, queue_length=queued)
    assert step(make(spec), state) == expected


def test_a_sync_every_fifteen_seconds_with_hpa_limits(make_spec, make_state):
    spec = make_spec(pool=POOL)
    policy, target, seen = make(spec), 4, []
    for k in range(5):
        target = step(policy, make_state(spec, time_s=10.0 * k, ready=target, running=640))
        seen.append(target)
    assert seen == [8, 8, 16, 16, 32]  # 40 wanted; at most doubled per sync


def test_zero_only_after_the_cool_down_and_back_at_once(make_spec, make_state):
    spec = make_spec(pool=POOL | {"min_replicas": 0})
    policy, target, seen = make(spec, cooldown_s=60.0), 4, []
    for k in range(5):
        target = step(policy, make_state(spec, time_s=20.0 * k, ready=target))
        seen.append(target)
    assert seen == [1, 1, 1, 0, 0]
    assert step(policy, make_state(spec, time_s=100.0, ready=0, queue_length=1)) == 1


def test_a_missing_trigger_allows_growth_only(make_spec, make_state):
    spec = make_spec(pool=POOL)
    assert step(make(spec), make_state(spec, ready=4, running=np.nan, queue_length=30)) == 6
    assert step(make(spec), make_state(spec, ready=4, running=np.nan)) == 4
    assert step(make(spec), make_state(spec, ready=4, running=np.nan, queue_length=np.nan)) == 4


@pytest.mark.parametrize("knobs", [{"queue": 0.0}, {"cooldown_s": -1.0}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(SpecError, match=next(iter(knobs))):
        KedaPolicy(**knobs)
