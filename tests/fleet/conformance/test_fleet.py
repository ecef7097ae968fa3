"""What every `Fleet` promises, asked of the compiled simulator, its reference and the live fleet alike.

The live fleet runs on make-believe servers and a make-believe clock (tests/live_world.py), with and without a gateway.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from live_world import OUTPUT_TOKENS, PROMPT_TOKENS, World, decide, world_spec

from rl_autoscale.agents.registry import make_policy
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.state import ClassTelemetry, PoolTelemetry
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.workload.trace import Workload

RATE_PER_S = 2.0
SPAN_S = 300.0


def steady_workload(spec):
    num = int(RATE_PER_S * SPAN_S)
    arrival_s = (np.arange(num) + 0.5) / RATE_PER_S
    tokens = np.full(num, 1)
    return Workload(arrival_s, PROMPT_TOKENS * tokens, OUTPUT_TOKENS * tokens, 0 * tokens, spec.class_names, SPAN_S)


def simulated(kind):
    return lambda spec: kind(spec, steady_workload(spec), seed=3)


def live(*, gateway):
    return lambda spec: World(spec, rate_per_s=RATE_PER_S).fleet(gateway=gateway)


MAKERS = {
    "engine": simulated(SimFleet),
    "reference": simulated(ReferenceFleet),
    "live": live(gateway=False),
    "live+gateway": live(gateway=True),
}


@pytest.fixture(params=MAKERS, ids=list(MAKERS))
def make_fleet(request):
    return lambda **changes: MAKERS[request.param](world_spec(**changes))


def hold(fleet, target, steps):
    """Hold a target for some steps; returns the observations after each."""
    seen = []
    for _ in range(steps):
        fleet.apply(decide(fleet, target))
        assert fleet.advance()
        seen.append(fleet.observe())
    return seen


def assert_same(one, other):
    np.testing.assert_array_equal(one.pools.to_matrix(), other.pools.to_matrix())
    np.testing.assert_array_equal(one.classes.to_matrix(), other.classes.to_matrix())
    assert one.time_s == other.time_s


def test_every_field_is_a_float_per_pool_and_per_class(make_fleet):
    state = hold(make_fleet(), 2, 1)[-1]
    for telemetry, kind in ((state.pools, PoolTelemetry), (state.classes, ClassTelemetry)):
        for item in fields(kind):
            column = getattr(telemetry, item.name)
            assert column.shape == (1,), item.name
            assert column.dtype == np.float64, item.name


def test_the_first_observation_has_replicas_but_no_window(make_fleet):
    state = make_fleet().observe()
    assert (state.pools.ready[0], state.pools.asked_for[0], state.pools.starting[0]) == (2, 2, 0)
    assert state.window_s == 0
    assert np.isnan(state.classes.arrivals_per_s[0])
    assert np.isnan(state.pools.generation_tokens_per_s[0])


def test_looking_twice_changes_nothing(make_fleet):
    fleet = make_fleet()
    hold(fleet, 2, 2)
    assert_same(fleet.observe(), fleet.observe())


def test_time_moves_by_the_control_interval(make_fleet):
    times = [float(state.time_s) for state in hold(make_fleet(control_interval_s=5.0), 2, 4)]
    np.testing.assert_allclose(times, [5.0, 10.0, 15.0, 20.0])


def test_the_window_is_the_interval_and_the_age_the_telemetry_age(make_fleet):
    states = hold(make_fleet(), 2, 4)
    assert [float(state.window_s) for state in states] == pytest.approx([9.0, 10.0, 10.0, 10.0])
    for state in states:
        np.testing.assert_allclose(state.pools.age_s, 1.0)
        np.testing.assert_allclose(state.classes.age_s, 1.0)


def test_a_target_is_seen_at_the_next_step(make_fleet):
    fleet = make_fleet()
    assert hold(fleet, 4, 1)[-1].pools.asked_for[0] == 4
    assert hold(fleet, 1, 1)[-1].pools.asked_for[0] == 1


def test_asking_twice_is_asking_once(make_fleet):
    once, twice = make_fleet(), make_fleet()
    hold(once, 2, 1), hold(twice, 2, 1)
    once.apply(decide(once, 5))
    twice.apply(decide(twice, 5))
    twice.apply(decide(twice, 5))
    once.advance(), twice.advance()
    assert_same(once.observe(), twice.observe())


def test_new_replicas_start_and_then_serve(make_fleet):
    states = hold(make_fleet(), 4, 4)
    assert [int(state.pools.starting[0]) for state in states] == [2, 2, 0, 0]
    assert [int(state.pools.ready[0]) for state in states] == [2, 2, 4, 4]
    assert states[1].pools.oldest_start_age_s[0] == pytest.approx(19.0)
    assert states[3].pools.oldest_start_age_s[0] == 0.0


def test_fewer_replicas_drain_and_leave(make_fleet):
    fleet = make_fleet()
    hold(fleet, 2, 3)
    states = hold(fleet, 1, 4)
    assert states[0].pools.ready[0] == 1
    assert states[-1].pools.draining[0] == 0
    assert all(state.pools.ready[0] + state.pools.draining[0] >= 1 for state in states)


def test_what_arrives_is_what_is_reported(make_fleet):
    state = hold(make_fleet(), 2, 6)[-1]
    pools, classes = state.pools, state.classes
    assert classes.arrivals_per_s[0] == pytest.approx(RATE_PER_S, abs=0.11)
    assert classes.arrived_prompt_tokens_per_s[0] == pytest.approx(RATE_PER_S * PROMPT_TOKENS, rel=0.06)
    assert classes.finished_per_s[0] == pytest.approx(RATE_PER_S, abs=0.21)
    assert classes.mean_output_tokens[0] == pytest.approx(OUTPUT_TOKENS)
    assert pools.generation_tokens_per_s[0] == pytest.approx(RATE_PER_S * OUTPUT_TOKENS, rel=0.15)
    assert pools.prompt_tokens_per_s[0] == pytest.approx(RATE_PER_S * PROMPT_TOKENS, rel=0.15)
    assert 0 < classes.ttft_mean_s[0] <= 1.0
    assert 0 < classes.ttft_p95_s[0] <= 1.0
    assert 0 < pools.itl_s[0] <= 0.1
    assert 0 < pools.kv_usage[0] < 1
    assert pools.running[0] > 0
    assert pools.in_flight[0] >= pools.running[0]


def test_nothing_is_negative_or_infinite_but_open_admission(make_fleet):
    for state in hold(make_fleet(), 3, 5):
        for matrix in (state.pools.to_matrix(), state.classes.to_matrix()[:, :-2]):
            known = matrix[~np.isnan(matrix)]
            assert (known >= 0).all()
            assert np.isfinite(known).all()
        assert state.classes.admission[0] == np.inf


@pytest.mark.parametrize("policy", ["headroom", "hpa", "static", "chiron-robust"])
def test_the_same_policies_run_on_it(make_fleet, policy):
    fleet = make_fleet()
    targets = []

    def stop_after_eight(state, raw, decision):
        targets.append(int(decision.target_replicas[0]))
        if len(targets) == 8:
            raise StopIteration

    with pytest.raises(StopIteration):
        run_control_loop(fleet, make_policy(policy), on_step=stop_after_eight)
    assert all(1 <= target <= 10 for target in targets)
