"""What the controller does when telemetry, replicas or the gateway cannot be trusted, and when load jumps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_world import World, world_spec

from rl_autoscale.fleet.spec import ShieldSpec
from rl_autoscale.fleet.state import ScalingDecision
from rl_autoscale.serving.protocols import BackendError

FAULTS = ["down", "empty", "nan", "frozen", "partial"]


# -- telemetry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_thirty_seconds_without_metrics_change_nothing(stage, fault):
    show = stage()
    show.steps(8)
    show.world.fault = fault
    show.steps(3)
    show.world.fault = None
    show.steps(4)
    assert show.target == 4
    assert show.backend.calls == []
    assert show.records[-1].source == "policy"


@pytest.mark.parametrize("fault", FAULTS)
def test_ten_minutes_without_metrics_never_shrink_whatever_policy_and_rule_say(stage, fault):
    show = stage()
    show.steps(8)
    show.world.fault = fault
    show.steps(4)
    show.policy.target = show.rule.target = 1
    record = show.steps(60)
    assert show.target == 4
    assert record.source == "hold"
    assert any("blind" in reason for reason in record.reasons)
    assert show.controller.breaker.is_open


def test_limits_of_classes_reach_the_gateway_and_stay_in_force_while_blind(stage):
    show = stage(gateway=True)
    show.policy.answer = ScalingDecision(
        np.array([4]), np.array([8]), np.array([np.inf]), np.array([5]), np.array([0.5])
    )
    show.steps(8)
    assert show.records[-1].source == "policy"
    assert list(show.world.gateway.decision.max_in_flight.values()) == [5]
    assert list(show.world.gateway.decision.selectivity.values()) == [0.5]
    show.world.fault = "down"
    show.rule.error = RuntimeError("no rule either")
    assert show.steps(12).source == "hold"
    assert list(show.world.gateway.decision.max_in_flight.values()) == [5]
    assert list(show.world.gateway.decision.selectivity.values()) == [0.5]


def test_a_rule_that_stands_in_for_a_step_lifts_no_limit_and_one_in_charge_does(stage):
    show = stage(gateway=True, steps_to_close=1000)
    show.policy.answer = ScalingDecision(
        np.array([4]), np.array([8]), np.array([np.inf]), np.array([5]), np.array([0.5])
    )
    show.steps(8)
    show.policy.error = RuntimeError("boom")
    assert (show.steps(1).source, show.controller.breaker.is_open) == ("rule", False)
    assert list(show.world.gateway.decision.max_in_flight.values()) == [5]
    assert list(show.world.gateway.decision.selectivity.values()) == [0.5]
    show.steps(10)
    assert show.controller.breaker.is_open
    assert list(show.world.gateway.decision.max_in_flight.values()) == [None]
    assert list(show.world.gateway.decision.selectivity.values()) == [0.0]


def test_a_restart_that_can_only_hold_leaves_the_gateways_limits(stage):
    show = stage(gateway=True)
    show.policy.error = show.rule.error = RuntimeError("boom")
    assert show.steps(2).source == "hold"
    assert show.world.gateway.decision.max_in_flight == show.world.gateway.decision.selectivity == {}


def test_blind_long_enough_the_rule_may_add(stage):
    show = stage(blind_hold_s=60.0)
    show.steps(8)
    show.world.fault = "down"
    show.rule.target = 6
    show.steps(8)
    assert show.target == 4
    show.steps(4)
    assert show.target == 6
    assert show.records[-1].source in ("rule", "hold")


def test_after_an_outage_the_policy_gets_the_fleet_back_only_when_it_has_behaved(stage):
    show = stage(steps_to_close=10)
    show.steps(8)
    show.world.fault = "down"
    show.steps(12)
    show.world.fault = None
    show.policy.target = 8
    assert show.steps(6).source == "rule"
    assert show.steps(8).source == "policy"
    assert show.target == 8


def test_with_a_gateway_the_load_is_known_though_replicas_are_silent(stage):
    show = stage(gateway=True)
    show.steps(6)
    show.world.fault = "down"
    record = show.steps(8)
    assert np.isnan(record.state.pools.running[0])
    assert record.state.classes.arrivals_per_s[0] == pytest.approx(4.0, rel=0.05)


# -- the gateway -------------------------------------------------------------------------------------------------------


def silence(show):
    """Kill the gateway, and look once, in vain; the decision before that look knows nothing of it."""
    show.world.gateway.error = BackendError("connection refused", retryable=True)
    show.steps(1)


def test_a_gateway_that_was_killed_costs_no_replica_however_long_it_is_away(stage):
    show = stage(gateway=True, down_cooldown_s=0.0)
    show.steps(8)
    silence(show)
    show.world.rate_per_s = 0.0  # nobody reaches the replicas any more
    show.policy.target = show.rule.target = 1
    assert any("cannot be told where not to send" in reason for reason in show.steps(1).reasons)
    away = show.steps(60)
    assert (show.target, away.source) == (4, "hold")
    assert show.controller.breaker.is_open
    show.world.gateway.error, show.world.rate_per_s = None, 4.0
    show.world.gateway.restart()
    show.policy.target = show.rule.target = 4
    back = show.steps(4)
    assert [item.replica_id for item in show.world.gateway.replicas.replicas] == [f"gpu-{n}" for n in range(4)]
    assert back.state.classes.arrivals_per_s[0] == pytest.approx(4.0, rel=0.05)


def test_a_replica_leaves_only_when_the_gateway_takes_the_list_of_replicas(stage):
    show = stage(gateway=True, down_cooldown_s=0.0)
    show.steps(8)
    show.world.gateway.refuses_lists = True
    show.steps(1)
    show.policy.target = 2
    show.steps(3)
    assert show.target == 4
    show.world.gateway.refuses_lists = False
    show.steps(2)
    assert show.target == 2


def test_an_old_word_of_the_gateway_does_not_make_idle_replicas_look_frozen(stage):
    show = stage(gateway=True)
    show.steps(8)
    silence(show)
    show.world.rate_per_s = 0.0
    record = show.steps(8)
    assert record.report.coverage["gpu"] == 1.0
    assert record.state.pools.running[0] == 0.0


# -- replicas ----------------------------------------------------------------------------------------------------------


def test_a_replica_that_never_becomes_ready_draws_no_further_ones(stage):
    world = World(world_spec(pool={"initial_replicas": 4}), rate_per_s=4.0, startup_s=1e9)
    show = stage(world=world, target=10, shield=ShieldSpec(max_pending_starts=2))
    show.steps(60)
    assert show.target == 6
    assert show.records[-1].state.pools.starting[0] == 2


def test_a_start_of_ten_minutes_does_not_cascade(stage):
    world = World(world_spec(pool={"initial_replicas": 4}), rate_per_s=4.0, startup_s=600.0)
    show = stage(world=world, target=10, shield=ShieldSpec(max_pending_starts=2))
    pending = []
    for _ in range(75):
        pending.append(float(show.steps(1).state.pools.starting[0]))
    assert max(pending) == 2
    assert show.records[-1].state.pools.ready[0] == 6
    assert show.target == 8


def test_a_crash_loop_stops_growth_and_says_why(stage):
    show = stage(target=6)
    show.steps(2)
    show.backend.crash_loop = True
    show.steps(8)
    show.policy.target = 10
    record = show.steps(8)
    assert show.target == 6
    assert any("replicas failed (exit code 1)" in reason for reason in record.reasons)


def test_metrics_of_deleted_replicas_are_no_load(stage):
    show = stage()
    show.steps(5)
    show.backend.retire("gpu-0")
    record = show.steps(3)
    assert "gpu-0" not in {name for name in show.world.scraped[-4:]}
    assert record.report.coverage["gpu"] == 1.0


# -- load --------------------------------------------------------------------------------------------------------------


def test_a_tenfold_burst_is_answered_within_two_steps(stage, headroom):
    world = World(world_spec(), rate_per_s=10.0)
    show = stage(world=world, policy=headroom(headroom=1.5), rule=headroom())
    before = show.steps(20).final.target_replicas[0]
    world.rate_per_s = 100.0
    show.steps(3)
    assert show.target >= before + 2


def test_an_idle_hour_is_served_by_the_minimum_and_ends_with_the_first_burst(stage, headroom):
    world = World(world_spec(pool={"initial_replicas": 4}), rate_per_s=0.0)
    show = stage(world=world, policy=headroom(), rule=headroom())
    show.steps(360)
    assert show.target == 1
    assert all(record.source == "policy" for record in show.records[2:])
    world.rate_per_s = 100.0
    show.steps(3)
    assert show.target >= 3


# -- laws --------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(
        st.tuples(st.sampled_from([None, *FAULTS]), st.integers(0, 30), st.integers(0, 30), st.booleans()),
        min_size=4,
        max_size=12,
    )
)
def test_blind_pools_never_shrink_and_bounds_always_hold(stage, script):
    show = stage(down_cooldown_s=0.0, blind_hold_s=0.0)
    for fault, wanted, rule, broken in script:
        show.world.fault = fault
        show.policy.target, show.rule.target = wanted, rule
        show.policy.error = RuntimeError() if broken else None
        record = show.steps(1)
        assert 1 <= record.final.target_replicas[0] <= 10
        if "stale" in record.faults:
            assert record.final.target_replicas[0] >= record.current[0]
