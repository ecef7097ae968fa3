from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.llumnix import LlumnixPolicy

POOL = {"min_replicas": 1, "initial_replicas": 4, "max_replicas": 40, "kv_blocks": 1000}


@pytest.mark.parametrize(
    ("replicas", "virtual", "requests", "expected"),
    [
        (4, 3000.0, 50.0, 4),  # freeness 20
        (4, 3600.0, 50.0, 5),  # 8: (10 x 50 + 3600) / 1000 = 4.1
        (4, 6000.0, 100.0, 7),  # a blocked queue: -20
        (4, 1000.0, 30.0, 3),  # 100, and 67 with three
        (4, 1300.0, 30.0, 4),  # 90, but 57 with three
        (3, 0.0, 0.0, 2),  # idle
        (0, 100.0, 10.0, 1),
    ],
)
def test_bounds_ten_and_sixty(replicas, virtual, requests, expected):
    assert LlumnixPolicy(low=10.0).desired(replicas, 1000, virtual, requests) == expected


def test_virtual_usage_counts_what_waits(make_spec, make_state):
    spec = make_spec(pool=POOL)
    policy = LlumnixPolicy(low=10.0)
    policy.reset(spec)
    # in use 0.75 x 4 x 1000; 20 waiting in engines x 800 / 16 = 1000; queued 8000 / 16 = 500; B = 40 + 20 + 10
    state = make_state(
        spec, ready=4, kv_usage=0.75, running=40, waiting=20, queue_length=10, queued_prompt_tokens=8000.0,
        arrivals_per_s=10.0, arrived_prompt_tokens_per_s=8000.0,
    )  # fmt: skip
    assert policy.decide(state).target_replicas.tolist() == [6]  # (10 x 70 + 4500) / 1000 = 5.2


def test_one_removal_per_interval_and_unknown_is_held(make_spec, make_state):
    spec = make_spec(pool=POOL)
    policy = LlumnixPolicy(interval_s=20.0)
    policy.reset(spec)
    idle = [int(policy.decide(make_state(spec, time_s=10.0 * k, ready=8)).target_replicas[0]) for k in range(4)]
    assert idle == [7, 8, 7, 8]  # ready says 8 each time: only even steps evaluate
    unknown = make_state(spec, time_s=60.0, ready=8, kv_usage=np.nan)
    assert policy.decide(unknown).target_replicas.tolist() == [8]
