"""Turning the dial of a policy at work: another attainment in the configuration file, and nothing is forgotten."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from rl_autoscale.serving.assemble import build_policy
from rl_autoscale.serving.config import PolicyChoice, read_choice
from rl_autoscale.serving.dial import Dial
from rl_autoscale.serving.modes import Reread

NETWORK = "pretrained/single-pool"


class File:
    """A configuration file that somebody edits, and a show with the policy that it names."""

    def __init__(self, stage, path: Path, name: str = NETWORK, **knobs: object) -> None:
        self.path, self.edits = path, 0
        self.write(name, **knobs)
        choice = read_choice(path)
        self.dial = Dial(choice, Reread(path, read_choice))
        self.show = stage(dial=self.dial)  # for the fleet's spec
        policy = build_policy(choice, self.show.controller.spec)
        self.show = stage(policy=policy, dial=self.dial)
        self.policy = policy

    def write(self, name: str = NETWORK, **knobs: object) -> None:
        self.edits += 1
        self.path.write_text(yaml.safe_dump({"mode": "active", "policy": {"name": name, "knobs": knobs}}))
        os.utime(self.path, ns=(self.edits, self.edits))


@pytest.fixture
def file(stage, tmp_path):
    def make(*args: str, **knobs: object) -> File:
        return File(stage, tmp_path / "fleet.yaml", *args, **knobs)

    return make


def price_asked_for(file: File) -> float:
    """What the network was last told that a miss costs, as its feature."""
    column = file.policy.card["features"].index("miss_price")
    return float(file.policy.last_observation[column])


def test_another_attainment_is_in_force_at_the_next_step_and_the_averages_stay(file):
    at_work = file(attainment=0.9)
    at_work.show.steps(20)
    before, demand = price_asked_for(at_work), at_work.policy._encoder
    at_work.write(attainment=0.99)
    record = at_work.show.steps(1)
    assert record.source == "policy"
    assert "dial turned: learned(attainment=0.99)" in record.reasons
    assert price_asked_for(at_work) > before
    assert at_work.policy._encoder is demand
    assert not any("dial" in reason for reason in at_work.show.steps(1).reasons)  # said once


def test_from_an_attainment_to_a_price_and_back(file):
    at_work = file(attainment=0.9)
    at_work.write(miss_price=77.0)
    assert "dial turned: learned(miss_price=77)" in at_work.show.steps(1).reasons
    price, _ = at_work.policy.price_now(at_work.show.records[-1].state, at_work.policy.last_observation)
    assert price == 77.0
    at_work.write(attainment=0.95)
    assert "dial turned: learned(attainment=0.95)" in at_work.show.steps(1).reasons


@pytest.mark.parametrize(
    ("name", "knobs", "why"),
    [
        (NETWORK, {"attainment": 1.5}, "attainment"),
        (NETWORK, {"attainment": {"chat": 0.9, "jobs": 0.5}}, "jobs"),
        (NETWORK, {"attainment": 0.99, "hysteresis": 0.3}, "hysteresis cannot change while it runs; restart"),
        (NETWORK, {"attainmnt": 0.99}, "attainmnt"),
        ("hpa", {}, "another policy, hpa, needs a restart"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(file, name, knobs, why):
    at_work = file(attainment=0.9)
    at_work.show.steps(2)
    at_work.write(name, **knobs)
    record = at_work.show.steps(1)
    assert record.source == "policy"
    assert any(reason.startswith("dial not turned: ") and why in reason for reason in record.reasons), record.reasons
    assert at_work.policy.name == "learned(attainment=0.9)"
    at_work.write(attainment=0.95)  # mended
    assert "dial turned: learned(attainment=0.95)" in at_work.show.steps(1).reasons


def test_a_file_that_is_broken_or_says_the_same_turns_nothing(file):
    at_work = file(attainment=0.9)
    at_work.write(attainment=0.9)
    assert not any("dial" in reason for reason in at_work.show.steps(1).reasons)
    at_work.path.write_text("policy: [")
    assert not any("dial" in reason for reason in at_work.show.steps(1).reasons)


def test_the_error_budget_rule_turns_and_a_rule_without_a_dial_says_so(file):
    budget = file("headroom-budget", attainment=0.95)
    budget.write("headroom-budget", attainment=0.99)
    assert any("dial turned: headroom-budget(attainment=0.99)" in reason for reason in budget.show.steps(1).reasons)
    budget.write("headroom-budget", attainment=0.99, headroom=2.0)
    assert any("headroom cannot change while it runs" in reason for reason in budget.show.steps(1).reasons)
    hpa = file("hpa", target=40)
    hpa.write("hpa", target=60)
    assert any("has no dial that turns while it runs" in reason for reason in hpa.show.steps(1).reasons)


def test_classes_that_share_a_fleet_may_be_asked_for_others(tmp_path):
    from rl_autoscale.envs.scenario import load_scenario

    spec = load_scenario("multi-tenant").fleet
    shares = {"paid": 0.98, "free": 0.9, "api": 0.98, "jobs": 0.8}
    policy = build_policy(PolicyChoice(name="pretrained/multi-tenant", knobs={"attainment": shares}), spec)
    first = policy._dials
    policy.turn({"attainment": shares | {"jobs": 0.95}})
    assert policy._dials is not first
    policy.turn({"miss_price": 30.0, "miss_weight": {"jobs": 0.1}})
    assert policy._dials is None
    np.testing.assert_allclose(policy._weight, [1.0, 1.0, 1.0, 0.1])
