"""The controller's promises, fault by fault; docs/live.md lists the same table for operators."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_world import World, world_spec

from rl_autoscale.agents.envelope import Envelope
from rl_autoscale.fleet.spec import ShieldSpec
from rl_autoscale.fleet.state import ScalingDecision
from rl_autoscale.serving.budget import OutOfTimeError, ThreadCaller
from rl_autoscale.serving.modes import ModeInFile, ModeSwitch
from rl_autoscale.serving.protocols import BackendError

FAULTS = ["down", "empty", "nan", "frozen", "partial"]


# -- modes -------------------------------------------------------------------------------------------------------------


def test_shadow_decides_and_touches_nothing(stage):
    show = stage(target=7, mode="shadow")
    record = show.steps(3)
    assert record.final.target_replicas.tolist() == [7]
    assert (record.applied, record.source, show.backend.calls) == (False, "policy", [])


def test_active_acts_once_per_change(stage):
    show = stage(target=7)
    show.steps(5)
    assert show.backend.calls == [7]


def test_the_kill_file_pauses_at_the_next_step_and_only_while_it_is_there(stage, tmp_path):
    show = stage(target=7, kill_file=tmp_path / "stop")
    (tmp_path / "stop").touch()
    assert show.steps(3).mode == "paused"
    assert show.backend.calls == []
    (tmp_path / "stop").unlink()
    assert show.steps(2).mode == "active"
    assert show.target == 7


def test_a_pause_by_signal_or_http_and_its_end(stage):
    show = stage(target=7)
    show.modes.pause("SIGUSR1")
    assert "SIGUSR1" in show.steps(2).mode_reason
    assert show.backend.calls == []
    show.modes.resume()
    show.steps(2)
    assert show.target == 7


def test_environment_and_file_can_lower_the_mode_but_not_raise_it(tmp_path):
    assert ModeSwitch("active", environment="shadow").current()[0] == "shadow"
    assert ModeSwitch("shadow", environment="active").current()[0] == "shadow"
    path = tmp_path / "fleet.yaml"
    path.write_text("active")
    reread = ModeInFile(path, lambda file: file.read_text())
    modes = ModeSwitch("active", reread=reread)
    assert modes.current()[0] == "active"
    path.write_text("paused")
    import os

    os.utime(path, ns=(1, 1))
    assert modes.current() == ("paused", "configuration file")


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


# -- writers and back ends ---------------------------------------------------------------------------------------------


def test_a_manual_scale_is_respected_for_the_hold_time_and_then_taken_over(stage):
    show = stage(manual_hold_s=300.0)
    show.steps(8)
    show.backend.target = 9
    record = show.steps(20)
    assert show.target == 9
    assert any("someone else set 9 replicas (we had 4)" in r for rec in show.records for r in rec.reasons)
    assert any("left alone" in reason for reason in record.reasons)
    show.steps(30)
    assert show.target == 4


def test_two_writers_do_not_fight(stage):
    show = stage(target=7)
    for _ in range(40):
        show.steps(1)
        show.backend.target = 3  # an HPA that wants three, whatever we say
    assert len(show.backend.calls) <= 1


@pytest.mark.parametrize("status", ["409", "429", "500", "timeout"])
def test_calls_that_may_work_later_are_tried_again_with_pauses(stage, status):
    show = stage(target=7)
    attempts = []
    set_target = show.backend.set_target

    def failing(num):
        attempts.append(show.world.clock.now_s)
        raise BackendError(status, retryable=True)

    show.backend.set_target = failing
    show.steps(30)
    gaps = np.diff(attempts)
    assert 3 <= len(attempts) <= 8
    assert (np.diff(gaps) >= 0).all()
    show.backend.set_target = set_target
    show.steps(25)
    assert show.target == 7


def test_a_forbidden_call_waits_longest_at_once(stage):
    show = stage(target=7)
    show.backend.write_error = BackendError("403 forbidden", retryable=False)
    record = show.steps(20)
    assert sum("gpu" in r.failures for r in show.records) == 1
    assert any("calls failed" in reason for reason in record.reasons)


def test_a_call_that_timed_out_but_worked_is_not_taken_for_a_stranger(stage):
    show = stage(target=7)
    set_target = show.backend.set_target

    def late(num):
        set_target(num)
        raise BackendError("timeout", retryable=True)

    show.backend.set_target = late
    show.steps(4)
    show.backend.set_target = set_target
    show.steps(4)
    assert not any("someone else" in reason for record in show.records for reason in record.reasons)


# -- the policy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        ScalingDecision(np.array([np.nan]), np.array([8]), np.array([1.0])),
        ScalingDecision(np.array([-(2**62)]), np.array([8]), np.array([1.0])),
        ScalingDecision(np.array([3]), np.array([0]), np.array([1.0])),
        ScalingDecision(np.array([3]), np.array([8]), np.array([np.nan])),
        ScalingDecision(np.array([3, 3]), np.array([8]), np.array([1.0])),
    ],
)
def test_nonsense_is_not_obeyed(stage, answer):
    show = stage(rule_target=5)
    show.policy.answer = answer
    record = show.steps(3)
    assert (record.source, show.target) == ("rule", 5)
    assert any("nonsense" in reason for reason in record.reasons)


def test_a_policy_that_raises_is_replaced_and_asked_again_until_it_has_recovered(stage):
    show = stage(target=7, rule_target=5, steps_to_close=5, down_cooldown_s=0.0)
    show.policy.error = RuntimeError("boom")
    record = show.steps(5)
    assert (record.source, show.target, show.controller.breaker.open_reason) == ("rule", 5, "error for 5 steps")
    show.policy.error = None
    show.steps(8)
    assert show.records[-1].source == "policy"
    assert show.target == 7


def test_a_late_policy_does_not_delay_the_step(stage):
    caller, release = ThreadCaller(), threading.Event()
    show = stage(rule_target=5, caller=caller, policy_time_budget_s=0.02)
    show.policy.decide = lambda state: release.wait(10.0)
    record = show.steps(2)
    assert (record.source, show.target) == ("rule", 5)
    assert record.faults == ("timeout",)
    release.set()


def test_a_caller_that_hangs_refuses_further_calls_and_passes_errors_on():
    caller, release = ThreadCaller(), threading.Event()
    assert caller(lambda: 3, 5.0) == 3
    with pytest.raises(ZeroDivisionError):
        caller(lambda: 1 / 0, 5.0)
    with pytest.raises(OutOfTimeError, match="no answer within"):
        caller(lambda: release.wait(10.0), 0.01)
    with pytest.raises(OutOfTimeError, match="still not come back"):
        caller(lambda: 3, 5.0)
    release.set()


def test_features_outside_training_hand_the_step_to_the_rule_and_then_open_the_breaker(stage):
    envelope = Envelope(("a", "b"), np.zeros(2), np.ones(2), usually_outside=0)
    show = stage(target=7, rule_target=5, envelope=envelope)
    show.policy.last_observation = np.array([0.5, 0.5])
    assert show.steps(3).source == "policy"
    show.policy.last_observation = np.array([0.5, 9.0])
    record = show.steps(3)
    assert record.outside == ("b",)
    assert record.source == "rule"
    assert show.controller.breaker.open_reason == "envelope for 3 steps"


def test_a_policy_the_shield_overrules_all_the_time_loses_the_fleet(stage):
    show = stage(target=60, rule_target=5, override_window=10, max_override_share=0.8, down_cooldown_s=0.0)
    show.steps(14)
    assert "overruled" in show.controller.breaker.open_reason
    assert show.target == 5


def test_steps_and_waits_of_the_shield_are_no_overrides(stage):
    show = stage(target=1, override_window=5, shield=ShieldSpec(down_stabilisation_s=600.0, max_step_down=1))
    show.steps(12)
    assert not show.controller.breaker.is_open


def test_when_the_rule_fails_too_everything_is_held(stage):
    show = stage()
    show.steps(3)
    show.policy.error = show.rule.error = RuntimeError("boom")
    assert show.steps(10).source == "hold"
    assert show.target == 4


# -- time --------------------------------------------------------------------------------------------------------------


def test_a_restart_holds_what_it_finds_and_cools_down_first(stage):
    world = World(world_spec(pool={"initial_replicas": 6}), rate_per_s=4.0)
    show = stage(world=world, target=1, rule_target=1, shield=ShieldSpec(down_stabilisation_s=120.0))
    show.steps(12)
    assert show.target == 6
    show.steps(6)
    assert show.target == 1


def test_a_restart_may_scale_up_at_once(stage):
    show = stage(target=8, up_cooldown_s=300.0)
    show.steps(2)
    assert show.target == 8


def test_a_jump_of_the_wall_clock_changes_nothing(stage):
    calm, jumped = stage(target=7), stage(target=7)
    for show in (calm, jumped):
        show.steps(4)
    jumped.world.clock.wall_offset_s -= 7200.0
    for show in (calm, jumped):
        show.policy.target = 3
        show.steps(10)
    assert jumped.backend.calls == calm.backend.calls
    assert [r.time_s for r in jumped.records] == [r.time_s for r in calm.records]


def test_a_suspended_controller_starts_its_cool_downs_again(stage):
    show = stage(down_cooldown_s=60.0)
    show.steps(8)
    show.policy.target = show.rule.target = 1
    show.world.clock.now_s += 3600.0
    show.fleet.advance()
    show.steps(3)
    assert show.target == 4
    assert any("since the last look" in reason for record in show.records for reason in record.reasons)
    show.steps(6)
    assert show.target == 1


def test_what_changed_while_suspended_is_held_for_the_stabilisation_window(stage):
    show = stage(down_cooldown_s=0.0, manual_hold_s=0.0, shield=ShieldSpec(down_stabilisation_s=120.0))
    show.steps(20)
    show.world.clock.now_s += 600.0
    show.backend.target = 8
    show.fleet.advance()
    show.steps(8)
    assert show.target == 8
    show.steps(8)
    assert show.target == 4


# -- load --------------------------------------------------------------------------------------------------------------


def test_a_tenfold_burst_is_answered_within_two_steps(stage, headroom):
    world = World(world_spec(), rate_per_s=10.0)
    show = stage(world=world, policy=headroom(headroom=1.5), rule=headroom())
    before = show.steps(20).final.target_replicas[0]
    world.rate_per_s = 100.0
    show.steps(3)
    assert show.target >= before + 2


def test_idle_time_is_served_by_the_minimum_and_ends_with_the_first_burst(stage, headroom):
    world = World(world_spec(pool={"initial_replicas": 4}), rate_per_s=0.0)
    show = stage(world=world, policy=headroom(), rule=headroom())
    show.steps(120)  # twenty minutes; the rest of the hour is the same
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
