"""Policies that answer nonsense, late, not at all, or about what they never saw: who decides then."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from rl_autoscale.agents.envelope import Envelope
from rl_autoscale.fleet.spec import ShieldSpec
from rl_autoscale.fleet.state import ScalingDecision
from rl_autoscale.serving.budget import OutOfTimeError, ThreadCaller


@pytest.mark.parametrize(
    "answer",
    [
        ScalingDecision(np.array([np.nan]), np.array([8]), np.array([1.0])),
        ScalingDecision(np.array([-(2**62)]), np.array([8]), np.array([1.0])),
        ScalingDecision(np.array([3]), np.array([0]), np.array([1.0])),
        ScalingDecision(np.array([3]), np.array([8]), np.array([np.nan])),
        ScalingDecision(np.array([3, 3]), np.array([8]), np.array([1.0])),
        ScalingDecision(np.array([3]), np.array([8]), np.array([1.0]), np.array([-1])),
        ScalingDecision(np.array([3]), np.array([8]), np.array([1.0]), np.array([3, 3])),
        ScalingDecision(np.array([3]), np.array([8]), np.array([1.0]), np.array([np.nan])),
        ScalingDecision(np.array([3]), np.array([8]), np.array([1.0]), None, np.array([np.inf])),
        ScalingDecision(np.array([3]), np.array([8]), np.array([1.0]), None, np.array([-0.5])),
        ScalingDecision(np.array([3]), np.array([8]), np.array([1.0]), [3]),
        ScalingDecision([3], [8], [1.0]),
        ScalingDecision(3, 8, 1.0),
        ScalingDecision(np.array(["3"]), np.array([8]), np.array([1.0])),
        ScalingDecision(np.array([None]), np.array([8]), np.array([1.0])),
        ScalingDecision(np.array([3.7]), np.array([8]), np.array([1.0])),
        ScalingDecision(np.array([3]), np.array([8.5]), np.array([1.0])),
        ScalingDecision(np.array([3]), np.array([8]), np.array([1.0]), np.array([0.5])),
        {"target_replicas": [3]},
        [3],
        3,
    ],
)
def test_nonsense_is_not_obeyed(stage, answer):
    show = stage(rule_target=5)
    show.policy.answer = answer
    record = show.steps(3)
    assert (record.source, show.target) == ("rule", 5)
    assert any("nonsense" in reason for reason in record.reasons)
    assert record.faults == ("invalid",)


@pytest.mark.parametrize("answer", [None, [3]])
def test_a_policy_and_a_rule_that_answer_no_decision_end_nothing(stage, answer):
    show = stage(target=4)
    show.steps(3)
    show.policy.decide = show.rule.decide = lambda state: answer
    record = show.steps(3)
    assert (record.source, show.target) == ("hold", 4)
    assert f"rule answered nonsense: a {type(answer).__name__} is no ScalingDecision" in record.reasons
    assert show.controller.breaker.open_reason == "invalid for 3 steps"


def test_whole_numbers_may_be_floats(stage):
    show = stage(rule_target=5)
    show.policy.answer = ScalingDecision(np.array([7.0]), np.array([8.0]), np.array([1.0]), np.array([3.0]))
    assert (show.steps(3).source, show.target) == ("policy", 7)


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
