"""The dial is measured again on the traffic at hand, from what a policy's network says it would miss at each price."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_autoscale.agents.running_dial import HORIZON_S, OPENING_S, RunningDial, price_for
from rl_autoscale.envs.schema import Schema

DIAL = [
    {"miss_price": 2.0, "slo_attainment": 0.90},
    {"miss_price": 20.0, "slo_attainment": 0.98},
    {"miss_price": 60.0, "slo_attainment": 0.99},
]


def test_a_dial_is_interpolated_in_the_logarithm_of_misses() -> None:
    assert price_for(0.98, DIAL, 7.0) == pytest.approx(20.0)
    assert 2.0 < price_for(0.95, DIAL, 7.0) < 20.0
    assert price_for(0.999, DIAL, 7.0) == pytest.approx(60.0)
    assert price_for(0.5, DIAL, 7.0) == pytest.approx(2.0)
    assert price_for(0.98, [], 7.0) == 7.0
    noisy = [*DIAL, {"miss_price": 40.0, "slo_attainment": 0.979}]
    assert price_for(0.985, noisy, 7.0) > 20.0


@pytest.fixture
def observe(make_state: Any, make_spec: Any) -> Any:
    spec = make_spec("mixed")
    return lambda arrivals_per_s: make_state(spec, arrivals_per_s=arrivals_per_s)


def test_it_begins_as_the_cards_and_becomes_that_of_the_traffic(observe: Any) -> None:
    dial = RunningDial(DIAL)
    assert dial.price_for(0.98) == pytest.approx(20.0)
    easy = np.array([0.01, 0.004, 0.001])
    prices = []
    for _ in range(int(4 * HORIZON_S / 10.0)):
        dial.update(observe(5.0), easy)
        prices.append(dial.price_for(0.98))
    assert prices == sorted(prices, reverse=True)
    assert 15.0 < prices[0] < 20.0
    assert prices[-1] == pytest.approx(2.0, rel=0.05)
    dial.reset()
    assert dial.price_for(0.98) == pytest.approx(20.0)


def test_busy_moments_count_by_their_arrivals(observe: Any) -> None:
    """A tenth of the time has nine times the arrivals: half of all that counts."""
    dial = RunningDial(DIAL)
    for step in range(int(10 * HORIZON_S / 10.0)):
        busy = step % 10 == 0
        dial.update(observe(9.0 if busy else 1.0), np.array([0.2, 0.04, 0.03]) if busy else np.zeros(3))
    assert dial.price_for(0.98) == pytest.approx(20.0, rel=0.05)


def test_a_window_without_arrivals_or_known_ones_changes_nothing(observe: Any) -> None:
    dial = RunningDial(DIAL)
    for arrivals_per_s in (0.0, np.nan):
        dial.update(observe(arrivals_per_s), np.zeros(3))
        assert dial.price_for(0.98) == pytest.approx(20.0)
    assert OPENING_S > 0


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
