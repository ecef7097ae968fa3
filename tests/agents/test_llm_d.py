from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.llm_d import LlmdPolicy

POOL = {"min_replicas": 1, "initial_replicas": 10, "max_replicas": 60}


@pytest.mark.parametrize(
    ("saturation", "replicas", "ready", "expected"),
    [
        (0.50, 10, 10, 10),  # inside the band 0.40 .. 0.55
        (0.66, 10, 10, 12),  # 10 x 0.2
        (2.00, 10, 10, 37),  # 10 + ceil(10 x 2.636)
        (2.00, 20, 10, 37),  # half are starting: 20 x (1 / 0.55 - 1) = 16.4
        (0.66, 20, 10, 20),  # those that start are enough
        (0.30, 10, 10, 8),  # 10 - floor(10 x 0.25)
        (0.39, 10, 10, 10),  # floor(10 x 0.025) is none
        (0.00, 10, 10, 0),
    ],
)
def test_the_law(saturation, replicas, ready, expected):
    assert LlmdPolicy().desired(saturation, replicas, ready) == expected


def play(policy, spec, make_state, ttfts, start=10):
    policy.reset(spec)
    target, seen = start, []
    for k, ttft in enumerate(ttfts):
        state = make_state(spec, time_s=15.0 * k, ready=target, ttft_p95_s=ttft, tpot_p95_s=0.01, class_in_flight=10)
        target = int(policy.decide(state).target_replicas[0])
        seen.append(target)
    return seen


def test_growth_waits_thirty_seconds_and_doubles_at_most_per_minute(make_spec, make_state):
    seen = play(LlmdPolicy(), make_spec(pool=POOL), make_state, [9.0] * 7)
    # wishes 37 from the start; the window still holds the initial 10 until 30 s; then 20, the limit of the minute
    assert seen[:6] == [10, 10, 20, 20, 20, 20]
    assert seen[6] == 40


def test_shrinking_walks_one_per_two_minutes_after_its_window(make_spec, make_state):
    seen = play(LlmdPolicy(), make_spec(pool=POOL), make_state, [0.1] * 29)
    assert seen == [10] * 12 + [9] * 8 + [8] * 8 + [7]


def test_the_clamp_keeps_one_spike_from_staying(make_spec, make_state):
    policy = LlmdPolicy(up_stabilisation_s=0.0)
    # mean of three readings: (0.5 + 0.5 + 2) / 3 = 1.0 although the spike is 90 times the SLO
    assert play(policy, make_spec(pool=POOL), make_state, [0.5, 0.5, 90.0])[-1] == 19  # 10 + ceil(10 (1 / 0.55 - 1))


def test_no_data_with_work_is_held_and_idle_shrinks(make_spec, make_state):
    spec = make_spec(pool=POOL)
    policy = LlmdPolicy(down_stabilisation_s=0.0)
    policy.reset(spec)
    stuck = make_state(spec, ready=10, class_in_flight=50)
    assert policy.decide(stuck).target_replicas.tolist() == [10]
    policy.reset(spec)
    assert policy.decide(make_state(spec, ready=10)).target_replicas.tolist() == [9]
    policy.reset(spec)
    blind = make_state(spec, ready=10, class_in_flight=np.nan, queue_length=np.nan)
    assert policy.decide(blind).target_replicas.tolist() == [10]
