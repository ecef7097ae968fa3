"""What is asked of a policy by class becomes a price for each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_autoscale.agents import running_dial
from rl_autoscale.agents.dials import Dials
from rl_autoscale.agents.running_dial import TIME_CONSTANT_S
from rl_autoscale.envs.reward import LEAST_WEIGHT
from rl_autoscale.envs.schema import Schema
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.state import FloatArray

KEYS = ("class0.interactive", "class1.batch")
CHAT = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
JOBS = {"name": "jobs", "kind": "batch", "ttft_slo_s": 600.0, "tpot_slo_s": 1.0}
CARD = [
    {"miss_price": price, "slo_attainment": both, f"slo_attainment/{KEYS[0]}": chat, f"slo_attainment/{KEYS[1]}": jobs}
    for price, both, chat, jobs in ((3.0, 0.90, 0.88, 0.95), (30.0, 0.97, 0.96, 0.99), (300.0, 0.995, 0.99, 0.999))
]
RANGE = (3.0, 300.0)


@pytest.fixture
def observe(make_state: Any, make_spec: Any) -> Any:
    """Both classes send 5 requests/s and are served just as asked, unless told otherwise."""
    spec = make_spec("mixed", classes=(CHAT, JOBS))

    def make(met: tuple[float, float]) -> Any:
        return make_state(spec, arrivals_per_s=5.0, finished_per_s=5.0, met_per_s=5.0 * np.array(met))

    return make


def at_first(dials: Dials, state: Any) -> tuple[float, FloatArray]:
    """Price and weights by the card alone: nothing forecast, all served as asked."""
    return dials.turn(state, None)


def test_the_card_has_a_dial_for_each_class(observe: Any) -> None:
    together, _ = at_first(Dials(CARD, 0.97, KEYS, RANGE, 20.0), observe((0.97, 0.97)))
    assert together == pytest.approx(30.0)
    price, weight = at_first(Dials(CARD, (0.96, 0.95), KEYS, RANGE, 20.0), observe((0.96, 0.95)))
    assert price == pytest.approx(30.0)
    assert weight == pytest.approx([1.0, 0.1])
    assert at_first(Dials((), (0.96, 0.95), KEYS, RANGE, 20.0), observe((0.96, 0.95)))[0] == pytest.approx(20.0)


def test_a_card_that_does_not_tell_classes_apart_gives_all_its_own_dial(observe: Any) -> None:
    card = [{name: point[name] for name in ("miss_price", "slo_attainment")} for point in CARD]
    price, weight = at_first(Dials(card, (0.97, 0.90), KEYS, RANGE, 20.0), observe((0.97, 0.90)))
    assert price == pytest.approx(30.0)
    assert weight == pytest.approx([1.0, 0.1])


def test_each_class_finds_its_own_price_in_the_forecast(observe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chats miss 0.6/price of theirs, jobs 0.06/price of theirs and a little more where chats are dear."""
    monkeypatch.setattr(running_dial, "OPENING_S", 120.0)  # the forecast alone, nearly
    dials = Dials(CARD, (0.98, 0.99), KEYS, RANGE, 20.0)
    asked = []

    def forecast(price: FloatArray, weight: FloatArray) -> FloatArray:
        assert weight.shape == (6, 2)
        assert (weight.max(axis=1) == 1.0).all()
        by_class = price[:, None] * weight
        asked.append(by_class)
        return np.stack([0.6 / by_class[:, 0], 0.06 / by_class[:, 1] + 1e-5 * by_class[:, 0]], axis=1)

    for _ in range(int(4 * TIME_CONSTANT_S / 10.0)):
        price, weight = dials.turn(observe((0.98, 0.99)), forecast)
    assert price == pytest.approx(30.0, rel=0.06)
    assert price * weight[1] == pytest.approx(0.06 / (0.01 - 1e-5 * 30.0), rel=0.15)
    # A row changes one class's price and leaves the other's where it is.
    assert np.unique(np.round(asked[-1][:3, 1], 6)).size == 1
    assert np.unique(np.round(asked[-1][3:, 0], 6)).size == 1


def test_the_error_budget_of_a_class_turns_its_own_price(observe: Any) -> None:
    dials = Dials(CARD, (0.96, 0.95), KEYS, RANGE, 20.0)
    for _ in range(60):
        price, weight = dials.turn(observe((0.96, 0.80)), None)
    assert price * weight == pytest.approx([30.0, 30.0 * 3.0], rel=0.01)  # the jobs' as dear as a budget makes it


def test_weights_end_where_training_ended(observe: Any) -> None:
    _, weight = at_first(Dials(CARD, (0.99, 0.5), KEYS, (0.1, 300.0), 20.0), observe((0.99, 0.5)))
    assert weight.tolist() == [1.0, LEAST_WEIGHT]


@pytest.fixture
def make_policy(tmp_path: Path, make_spec: Any) -> Any:
    """A network that never misses; knobs to a policy that has been reset."""
    pytest.importorskip("onnx")
    from rl_autoscale.agents.export import export_policy
    from rl_autoscale.agents.learned import LearnedPolicy

    spec = make_spec("mixed", classes=(CHAT, JOBS))
    schema = Schema.of(spec)
    num_features, num_actions = len(schema.features), len(schema.actions)
    layers = [(np.zeros((num_actions, num_features), np.float32), np.zeros(num_actions, np.float32))]
    forecast = [(np.zeros((2, num_features), np.float32), np.full(2, -9.0, np.float32))]
    export_policy(
        layers, schema, tmp_path, refuse=True, training={}, miss_price_range=RANGE, dial=CARD, forecast=forecast
    )

    def make(**knobs: Any) -> LearnedPolicy:
        policy = LearnedPolicy(tmp_path, **knobs)
        policy.reset(spec)
        return policy

    return make


def seen(policy: Any, state: Any) -> tuple[float, list[float]]:
    """Price and weights that the network saw."""
    policy.decide(state)
    features = policy.card["features"]
    columns = [features.index("miss_price"), *(features.index(f"{key}.miss_weight") for key in KEYS)]
    price, *weight = 10.0 ** (2.0 * policy.last_observation[columns])
    return float(price), weight


def test_the_network_sees_what_was_asked(make_policy: Any, observe: Any) -> None:
    state = observe((0.98, 0.98))
    price, weight = seen(make_policy(miss_price=40.0, miss_weight={"jobs": 0.1}), state)
    assert price == pytest.approx(40.0, rel=1e-4)
    assert weight == pytest.approx([1.0, 0.1], rel=1e-4)
    price, weight = seen(make_policy(attainment={"chat": 0.96, "jobs": 0.95}, forecast=False), state)
    assert 25.0 < price < 35.0
    assert weight[0] == 1.0
    assert 0.05 < weight[1] < 0.2
    policy = make_policy(attainment={"chat": 0.96, "jobs": 0.95})
    for _ in range(500):  # nobody misses at any price
        last, weight = seen(policy, observe((0.96, 0.95)))
    assert last == pytest.approx(3.0, rel=0.05)
    assert math.isclose(weight[1], 1.0, rel_tol=0.05)
    assert policy.name == "learned(attainment=chat:0.96 jobs:0.95)"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"attainment": {"chat": 0.98}}, "attainment of jobs is missing"),
        ({"attainment": {"chat": 0.98, "jobs": 0.9, "x": 0.9}}, "names x; the classes of this fleet: chat, jobs"),
        ({"attainment": {"chat": 0.98, "jobs": 1.0}}, "must be between 0 and 1"),
        ({"miss_weight": {"jobs": 2.0}}, r"miss_weight.jobs=2.0 is not allowed; it must be 0.02 to 1"),
        ({"miss_weight": 0.5}, "miss_weight=0.5 is not allowed; give one by class"),
        ({"attainment": {"chat": "most", "jobs": 0.9}}, "attainment='most' is not allowed"),
        ({"miss_weight": {"jobs": 0.5, "chat": 0.5}}, "leaves no class at 1"),
        ({"miss_weight": {"job": 0.5}}, "miss_weight names job"),
        ({"attainment": {"chat": 0.98, "jobs": 0.9}, "miss_weight": {"jobs": 0.5}}, "give one of the two"),
    ],
)
def test_what_cannot_be_asked_is_refused(make_policy: Any, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_policy(**knobs)
