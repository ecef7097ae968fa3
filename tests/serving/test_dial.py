"""Turning the dial of a policy at work: another attainment in the configuration file, and nothing is forgotten."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.fleet.errors import SpecError
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
        self.write_policy({"name": name, "knobs": knobs})

    def write_policy(self, policy: object) -> None:
        self.put(yaml.safe_dump({"mode": "active", "policy": policy}))

    def put(self, text: str) -> None:
        self.edits += 1
        self.path.write_text(text)
        os.utime(self.path, ns=(self.edits, self.edits))

    def said(self) -> list[str]:
        """Of the dial, in the two steps after an edit; the first sees it, the second believes it."""
        before = len(self.show.records)
        self.show.steps(2)
        return [why for record in self.show.records[before:] for why in record.reasons if why.startswith("dial")]


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
    assert at_work.said() == ["dial turned: learned(attainment=0.99)"]
    record = at_work.show.steps(1)
    assert record.source == "policy"
    assert price_asked_for(at_work) > before
    assert at_work.policy._encoder is demand
    assert at_work.said() == []  # once


def test_from_an_attainment_to_a_price_and_back(file):
    at_work = file(attainment=0.9)
    at_work.write(miss_price=77.0)
    assert at_work.said() == ["dial turned: learned(miss_price=77)"]
    price, _ = at_work.policy.price_now(at_work.show.records[-1].state, at_work.policy.last_observation)
    assert price == 77.0
    at_work.write(attainment=0.95)
    assert at_work.said() == ["dial turned: learned(attainment=0.95)"]


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({"name": NETWORK, "knobs": {"attainment": 1.5}}, "attainment"),
        ({"name": NETWORK, "knobs": {"attainment": {"chat": 0.9, "jobs": 0.5}}}, "jobs"),
        ({"name": NETWORK, "knobs": {"attainment": 0.99, "hysteresis": 0.3}}, "hysteresis cannot change while it runs"),
        ({"name": NETWORK, "knobs": {"attainment": 0.99, "hysteresis": "a tenth"}}, "hysteresis='a tenth'"),
        ({"name": NETWORK, "knobs": {"attainmnt": 0.99}}, "attainmnt"),
        ({"name": NETWORK, "knob": {"attainment": 0.99}}, "unknown key 'knob'"),
        ({"name": NETWORK, "knobs": 0.99}, "knobs"),
        ({"name": "hpa"}, "another policy, hpa, needs a restart"),
        (None, "policy"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(file, policy, why):
    at_work = file(attainment=0.9)
    at_work.show.steps(2)
    dials = at_work.policy._dials
    at_work.write_policy(policy)
    (said,) = at_work.said()
    assert said.startswith("dial not turned: ")
    assert why in said
    assert at_work.show.records[-1].source == "policy"
    assert at_work.policy.name == "learned(attainment=0.9)"
    at_work.write(attainment=0.9)  # as it was: the error budget goes on
    assert at_work.said() == []
    assert at_work.policy._dials is dials
    at_work.write(attainment=0.95)
    assert at_work.said() == ["dial turned: learned(attainment=0.95)"]


def test_a_file_that_is_being_written_waits_for_the_next_look(file):
    at_work = file(attainment=0.9)
    at_work.write(attainment=0.99)
    whole = at_work.path.read_text()
    at_work.put(whole[: whole.index("knobs")])
    at_work.show.steps(1)
    at_work.put(whole)
    assert at_work.said() == ["dial turned: learned(attainment=0.99)"]
    at_work.put("")
    assert ["'policy' is missing" in said for said in at_work.said()] == [True]
    at_work.put("policy: [")
    assert [said.startswith("dial not turned: ") for said in at_work.said()] == [True]
    assert at_work.policy.name == "learned(attainment=0.99)"


def test_whatever_a_policy_raises_the_controller_goes_on(file):
    at_work = file(attainment=0.9)

    def turn(knobs: object) -> None:
        raise ZeroDivisionError("no idea")

    at_work.policy.turn = turn
    at_work.write(attainment=0.99)
    assert at_work.said() == ["dial not turned: no idea"]


def test_the_error_budget_rule_turns_and_a_rule_without_a_dial_says_so(file):
    budget = file("headroom-budget", attainment=0.95)
    budget.show.steps(5)
    budget.write("headroom-budget", attainment=0.99)
    assert ["dial turned: headroom-budget(attainment=0.99)" in said for said in budget.said()] == [True]
    budget.write("headroom-budget", attainment=0.99, headroom=2.0)
    assert ["headroom cannot change while it runs" in said for said in budget.said()] == [True]
    hpa = file("hpa", target=40)
    hpa.write("hpa", target=60)
    assert ["has no dial that turns while it runs" in said for said in hpa.said()] == [True]


def test_classes_that_share_a_fleet_may_be_asked_for_others():
    spec = load_scenario("multi-tenant").fleet
    shares = {"paid": 0.98, "free": 0.9, "api": 0.98, "jobs": 0.8}
    policy = build_policy(PolicyChoice(name="pretrained/multi-tenant", knobs={"attainment": shares}), spec)
    first = policy._dials
    policy.turn({"attainment": shares | {"jobs": 0.95}})
    assert policy._dials is not first
    kept = policy._dials
    with pytest.raises(SpecError, match="path"):
        policy.turn({"path": "pretrained/single-pool", "attainment": shares})
    assert policy._dials is kept
    policy.turn({"miss_price": 30.0, "miss_weight": {"jobs": 0.1}})
    assert policy._dials is None
    np.testing.assert_allclose(policy._weight, [1.0, 1.0, 1.0, 0.1])
