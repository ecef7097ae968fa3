"""The dial is measured again on the traffic at hand, from what a policy's network says it would miss at each price."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_autoscale.agents.policy_file import price_sweep
from rl_autoscale.agents.running_dial import OPENING_S, TIME_CONSTANT_S, RunningDial, price_at
from rl_autoscale.envs.schema import Schema
from rl_autoscale.fleet.errors import PolicyFileError, SpecError

DIAL = [
    {"miss_price": 2.0, "slo_attainment": 0.90},
    {"miss_price": 20.0, "slo_attainment": 0.98},
    {"miss_price": 60.0, "slo_attainment": 0.99},
]
ONLY = np.array([0])


def test_a_dial_is_interpolated_in_the_logarithm_of_misses() -> None:
    prices, missed = np.array([2.0, 20.0, 60.0]), np.array([0.1, 0.02, 0.01])
    assert price_at(0.98, prices, missed) == pytest.approx(20.0)
    assert price_at(1 - math.sqrt(0.1 * 0.02), prices, missed) == pytest.approx(math.sqrt(2.0 * 20.0))
    assert price_at(0.999, prices, missed) == pytest.approx(60.0)
    assert price_at(0.5, prices, missed) == pytest.approx(2.0)


def test_noise_does_not_turn_the_dial_round_and_a_plateau_is_left_at_its_beginning() -> None:
    prices, missed = np.array([3.0, 30.0, 100.0, 600.0]), np.array([0.021, 0.02, 0.03, 0.01])
    assert price_at(0.98, prices, missed) == pytest.approx(30.0)
    assert 100.0 < price_at(0.985, prices, missed) < 600.0


def test_a_sweep_begins_where_the_policy_is_of_use() -> None:
    card = {"miss_price_range": [2.0, 60.0], "dial": DIAL}
    assert price_sweep(card)[::6] == (2.0, 60.0)
    assert price_sweep({"miss_price_range": [2.0, 60.0]})[::6] == (2.0, 60.0)
    poor = [{"miss_price": 2.0, "slo_attainment": 0.4}, {"miss_price": 6.0, "slo_attainment": 0.79}, *DIAL[1:]]
    assert price_sweep(card | {"dial": poor})[::6] == (6.0, 60.0)


@pytest.fixture
def observe(make_state: Any, make_spec: Any) -> Any:
    spec = make_spec("mixed")
    return lambda arrivals_per_s: make_state(spec, arrivals_per_s=arrivals_per_s)


def test_it_begins_as_the_cards_and_moves_to_that_of_the_traffic(observe: Any) -> None:
    dial = RunningDial(DIAL)
    assert dial.price_for(0.98) == pytest.approx(20.0)
    easy = np.array([[0.01], [0.004], [0.001]])
    prices = []
    for _ in range(int(4 * TIME_CONSTANT_S / 10.0)):
        dial.update(observe(5.0), easy, ONLY)
        prices.append(dial.price_for(0.98))
    assert prices == sorted(prices, reverse=True)
    assert 15.0 < prices[0] < 20.0
    own = TIME_CONSTANT_S / (TIME_CONSTANT_S + OPENING_S)  # of the say, in the end
    before = 1.0 - np.array([point["slo_attainment"] for point in DIAL])
    mixed = before ** (1.0 - own) * easy[:, 0] ** own
    assert prices[-1] == pytest.approx(price_at(0.98, dial.prices, mixed), rel=0.05)
    dial.reset()
    assert dial.price_for(0.98) == pytest.approx(20.0)


def test_busy_moments_count_by_their_arrivals(observe: Any) -> None:
    """A tenth of the time has nine times the arrivals: half of all that counts."""
    dial = RunningDial(DIAL)
    for step in range(int(10 * TIME_CONSTANT_S / 10.0)):
        busy = step % 10 == 0
        share = np.array([[0.2], [0.04], [0.03]]) if busy else np.zeros((3, 1))
        dial.update(observe(9.0 if busy else 1.0), share, ONLY)
    assert dial.price_for(0.98) == pytest.approx(20.0, rel=0.05)


@pytest.mark.parametrize("arrivals_per_s", [0.0, np.nan])
def test_a_window_without_arrivals_or_known_ones_changes_nothing(observe: Any, arrivals_per_s: float) -> None:
    dial, fresh = RunningDial(DIAL), RunningDial(DIAL)
    for _ in range(200):
        dial.update(observe(arrivals_per_s), np.zeros((3, 1)), ONLY)
    for one in (dial, fresh):
        one.update(observe(0.1), np.array([[0.3], [0.2], [0.1]]), ONLY)
    assert dial.price_for(0.98) == fresh.price_for(0.98) > 20.0


def test_a_forecast_that_is_no_number_changes_nothing(observe: Any) -> None:
    dial = RunningDial(DIAL)
    dial.update(observe(5.0), np.array([[0.1], [np.nan], [0.0]]), ONLY)
    assert dial.price_for(0.98) == pytest.approx(20.0)


@pytest.mark.parametrize(("logit", "price"), [(-9.0, 2.0), (9.0, 60.0)])
def test_a_policy_asked_for_an_attainment_follows_its_forecast(
    tmp_path: Path, make_state: Any, make_spec: Any, logit: float, price: float
) -> None:
    """A network that says nobody, or everybody, misses at any price."""
    pytest.importorskip("onnx")
    from rl_autoscale.agents.export import export_policy
    from rl_autoscale.agents.learned import LearnedPolicy

    spec = make_spec("mixed")
    schema = Schema.of(spec)
    num_features, num_actions = len(schema.features), len(schema.actions)
    layers = [(np.zeros((num_actions, num_features), np.float32), np.zeros(num_actions, np.float32))]
    forecast = [(np.zeros((1, num_features), np.float32), np.full(1, logit, np.float32))]
    export_policy(
        layers, schema, tmp_path, refuse=True, training={}, miss_price_range=(2.0, 60.0), dial=DIAL, forecast=forecast
    )
    policy = LearnedPolicy(tmp_path, attainment=0.98)
    policy.reset(spec)
    for step in range(600):  # it delivers just what is asked: the error budget has nothing to say
        state = make_state(
            spec, 10.0 * step, arrivals_per_s=5.0, finished_per_s=5.0, met_per_s=0.98 * 5.0, class_admission=1.0
        )
        policy.decide(state)
    assert policy.last_observation is not None
    assert 10 ** (2 * policy.last_observation[schema.features.index("miss_price")]) == pytest.approx(price, rel=0.05)


def test_a_policy_may_be_told_to_leave_its_forecast(tmp_path: Path, make_state: Any, make_spec: Any) -> None:
    pytest.importorskip("onnx")
    from rl_autoscale.agents.export import export_policy
    from rl_autoscale.agents.learned import LearnedPolicy

    schema = Schema.of(make_spec("mixed"))
    layers = [
        (np.zeros((len(schema.actions), len(schema.features)), np.float32), np.zeros(len(schema.actions), np.float32))
    ]
    nobody_misses = [(np.zeros((1, len(schema.features)), np.float32), np.full(1, -9.0, np.float32))]
    for folder, forecast in (("with", nobody_misses), ("without", None)):
        export_policy(
            layers, schema, tmp_path / folder, refuse=True, training={}, miss_price_range=(2.0, 60.0), dial=DIAL,
            forecast=forecast,
        )  # fmt: skip
    state = make_state(make_spec("mixed"), arrivals_per_s=5.0, finished_per_s=5.0, met_per_s=4.9)
    prices = []
    for folder, told in (("with", True), ("with", False), ("without", True)):
        policy = LearnedPolicy(tmp_path / folder, attainment=0.98, forecast=told)
        policy.reset(make_spec("mixed"))
        policy.decide(state)
        assert policy.last_observation is not None
        prices.append(policy.last_observation[schema.features.index("miss_price")])
    assert prices[0] < prices[1] == prices[2]
    with pytest.raises(SpecError, match="forecast='no' is not allowed"):
        LearnedPolicy(tmp_path / "with", forecast="no")  # type: ignore[arg-type]
    card = json.loads((tmp_path / "without" / "policy.json").read_text())
    (tmp_path / "without" / "policy.json").write_text(json.dumps(card | {"miss_forecast": True}))
    with pytest.raises(PolicyFileError, match="does not match its card"):
        LearnedPolicy(tmp_path / "without")
    del card["miss_forecast"]  # a card from before there were any
    (tmp_path / "without" / "policy.json").write_text(json.dumps(card))
    LearnedPolicy(tmp_path / "without", attainment=0.98)
