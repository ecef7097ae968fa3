from __future__ import annotations

import math

import numpy as np
import pytest

from rl_autoscale.agents.headroom import HeadroomPolicy
from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.errors import SpecError

JOBS = {"name": "jobs", "kind": "batch", "ttft_slo_s": 3600.0, "tpot_slo_s": 1.0}
CHAT = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}


def load(requests_per_s: float) -> dict[str, float]:
    return {"arrivals_per_s": requests_per_s, "arrived_prompt_tokens_per_s": 1000.0 * requests_per_s}


def demand(spec, requests_per_s: float) -> float:
    """Replicas asked for by a steady rate with the prior output length, straight from the price of one request."""
    work = DemandEstimator(spec).request_work_s(np.array([1000.0]), np.array([200.0]), np.array([0]))
    return requests_per_s * float(work[0])


def test_steady_load_gives_headroom_times_demand(make_spec, make_state):
    spec = make_spec()
    policy = HeadroomPolicy(headroom=1.3)
    policy.reset(spec)
    target = policy.decide(make_state(spec, **load(60.0))).target_replicas
    assert target[0] == math.ceil(1.3 * demand(spec, 60.0))
    assert target[0] > 5


def test_grows_on_the_fast_average_and_shrinks_on_the_slow(make_spec, make_state):
    spec = make_spec()
    policy = HeadroomPolicy(headroom=1.0, up_time_constant_s=30.0, down_time_constant_s=120.0)
    policy.reset(spec)
    policy.decide(make_state(spec, **load(10.0)))
    up = policy.decide(make_state(spec, time_s=10, **load(100.0))).target_replicas[0]
    fast = 10.0 + (1 - math.exp(-10 / 30)) * 90.0
    assert up == math.ceil(demand(spec, fast))
    down = policy.decide(make_state(spec, time_s=20, **load(0.0))).target_replicas[0]
    slow = (10.0 + (1 - math.exp(-10 / 120)) * 90.0) * math.exp(-10 / 120)
    assert down == math.ceil(demand(spec, max(fast * math.exp(-10 / 30), slow)))


def test_never_measured_is_held_and_a_gap_keeps_the_estimate(make_spec, make_state):
    spec = make_spec()
    policy = HeadroomPolicy()
    policy.reset(spec)
    blind = {"arrivals_per_s": np.nan, "arrived_prompt_tokens_per_s": np.nan}
    assert policy.decide(make_state(spec, ready=9, window_s=0.0, **load(0.0))).target_replicas[0] == 9
    assert policy.decide(make_state(spec, ready=9, **blind)).target_replicas[0] == 9
    known = policy.decide(make_state(spec, ready=9, **load(30.0))).target_replicas[0]
    assert known != 9
    for _ in range(20):
        assert policy.decide(make_state(spec, ready=9, **blind)).target_replicas[0] == known


def test_a_measured_zero_scales_to_the_minimum(make_spec, make_state):
    spec = make_spec(pool={"min_replicas": 2, "initial_replicas": 5})
    policy = HeadroomPolicy()
    policy.reset(spec)
    assert policy.decide(make_state(spec, ready=5, **load(0.0))).target_replicas[0] == 2


def test_each_pool_follows_its_own_classes(make_spec, make_state):
    spec = make_spec("interactive", "mixed", "batch", classes=(CHAT, JOBS))
    policy = HeadroomPolicy(headroom=2.0)
    policy.reset(spec)
    traffic = {"arrivals_per_s": [60.0, 30.0], "arrived_prompt_tokens_per_s": [60_000.0, 30_000.0]}
    interactive, batch = math.ceil(2.0 * demand(spec, 60.0)), math.ceil(2.0 * demand(spec, 30.0))
    started = policy.decide(make_state(spec, ready=[interactive, 4, 0], asked_for=4, **traffic))
    assert started.target_replicas.tolist() == [interactive, 0, batch]
    starting = policy.decide(make_state(spec, ready=[interactive - 2, 4, 0], asked_for=4, **traffic))
    assert starting.target_replicas.tolist() == [interactive, 2, batch]  # the mixed pool stands in


def test_one_unmeasured_class_holds_its_pool_only(make_spec, make_state):
    spec = make_spec("interactive", "batch", classes=(CHAT, JOBS))
    policy = HeadroomPolicy()
    policy.reset(spec)
    state = make_state(spec, ready=6, arrivals_per_s=[0.0, np.nan], arrived_prompt_tokens_per_s=0.0)
    assert policy.decide(state).target_replicas.tolist() == [0, 6]


@pytest.mark.parametrize("knobs", [{"headroom": 0.0}, {"up_time_constant_s": -1.0}, {"down_time_constant_s": np.nan}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(SpecError, match=next(iter(knobs))):
        HeadroomPolicy(**knobs)
