from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.apa import ApaPolicy
from rl_autoscale.fleet.errors import SpecError

POOL = {"min_replicas": 1, "initial_replicas": 4, "max_replicas": 40}


@pytest.mark.parametrize(
    ("use", "current", "ready", "expected"),
    [
        (10.5, 4, 4, 4),  # inside the tolerance
        (15.0, 4, 4, 6),
        (90.0, 4, 4, 8),  # at most doubled
        (9.5, 4, 4, 4),
        (7.0, 4, 4, 3),
        (1.0, 9, 9, 4),  # at most halved
        (15.0, 6, 4, 6),  # two pending count as unused: 4 x 1.5 = 6
        (20.0, 6, 4, 8),
        (5.0, 6, 4, 4),  # two pending count as at target: 4 x 0.5 + 2
    ],
)
def test_ratio_tolerances_rates_and_pending(use, current, ready, expected):
    assert ApaPolicy(target=10.0).desired(use, current, ready) == expected


def test_use_is_outstanding_per_ready_replica_or_kv(make_spec, make_state):
    spec = make_spec(pool=POOL)
    policy = ApaPolicy(target=10.0)
    policy.reset(spec)
    state = make_state(spec, ready=4, running=40, waiting=10, queue_length=10)
    assert policy.decide(state).target_replicas.tolist() == [6]
    policy = ApaPolicy(target=0.5, metric="kv_usage")
    policy.reset(spec)
    assert policy.decide(make_state(spec, ready=4, kv_usage=0.75)).target_replicas.tolist() == [6]


def test_shrinking_waits_for_the_cool_down_and_gaps_change_nothing(make_spec, make_state):
    spec = make_spec(pool=POOL)
    policy = ApaPolicy(target=10.0, down_cooldown_s=30.0)
    policy.reset(spec)
    seen, target = [], 8
    for k, running in enumerate([80, 40, np.nan, 40, 40]):
        state = make_state(spec, time_s=10.0 * k, ready=target, running=running)
        target = int(policy.decide(state).target_replicas[0])
        seen.append(target)
    assert seen == [8, 8, 8, 4, 4]


def test_an_unknown_metric_is_refused():
    with pytest.raises(SpecError, match=r"metric='kv'.*must be one of concurrency, kv_usage"):
        ApaPolicy(metric="kv")
