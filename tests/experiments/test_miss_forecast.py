"""What a policy will miss at each price: counted in play, learned, exported beside the policy."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from rl_autoscale.agents.export import onnx_bytes
from rl_autoscale.agents.ppo import build_ppo, policy_layers
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.observation import price_feature
from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.experiments import miss_forecast
from rl_autoscale.experiments.miss_forecast import Outcomes
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.store import TraceStore
from tests.agents.test_ppo import SMALL, small_mdp
from tests.envs.toy import SHIELD, sampler, toy_spec


def predicted(layers: list[tuple[np.ndarray, np.ndarray]], observation: np.ndarray) -> np.ndarray:
    value = observation
    for weight, bias in layers[:-1]:
        value = np.tanh(value @ weight.T + bias)
    weight, bias = layers[-1]
    return 1.0 / (1.0 + np.exp(-(value @ weight.T + bias)))[:, 0]


def test_misses_count_until_the_horizon_while_the_price_stays() -> None:
    """Two fleets, six steps, horizon 2, prices kept for 4: the second fleet's changes at step 2, and it ends early."""
    seen = np.arange(12.0).reshape(6, 2, 1)
    missed = np.array([[0, 1], [1, 0], [2, 0], [0, 3], [0, 9], [4, 9]], dtype=float)[..., None]
    arrived = np.full((6, 2, 1), 4.0)
    playing = np.array([[1, 1]] * 4 + [[1, 0]] * 2, dtype=float)
    since_change = np.array([[0, 2], [1, 3], [2, 0], [3, 1], [0, 2], [1, 3]])
    outcomes = miss_forecast._outcomes(seen, missed, arrived, playing, since_change, 4, 2)
    assert outcomes.observation[:, 0].tolist() == [0.0, 1.0, 2.0, 4.0, 5.0, 8.0]
    assert outcomes.share[:, 0].tolist() == [1 / 8, 1 / 8, 3 / 8, 2 / 8, 3 / 8, 4 / 8]
    assert outcomes.weight[:, 0].tolist() == [1.0] * 6


def test_classes_are_counted_apart_and_weigh_the_same() -> None:
    """One fleet, two classes, one step ahead: the rare class is late, once as the only one that came."""
    missed = np.array([[[0, 1]], [[3, 1]], [[0, 0]]], dtype=float)
    arrived = np.array([[[30, 1]], [[30, 1]], [[30, 0]]], dtype=float)
    outcomes = miss_forecast._outcomes(
        np.zeros((3, 1, 1)), missed, arrived, np.ones((3, 1)), np.array([[0], [1], [2]]), 4, 1
    )
    assert outcomes.share.tolist() == [[0.0, 1.0], [0.1, 1.0], [0.0, 0.0]]
    assert outcomes.weight.tolist() == [[1.0, 1.5], [1.0, 1.5], [1.0, 0.0]]


def test_it_learns_shares_weighted_with_arrivals() -> None:
    """Of the first kind of observation the one with nine times the arrivals misses ten times as much."""
    rng = np.random.default_rng(0)
    kind = rng.choice([-1.0, 1.0], 4000)
    busy = rng.random(4000) < 0.5
    share = np.where(kind < 0, np.where(busy, 0.3, 0.03), 0.05)
    outcomes = Outcomes(
        np.stack([kind, rng.normal(size=4000)], axis=1).astype(np.float32),
        share[:, None],
        np.where(busy, 1.8, 0.2)[:, None],
        np.arange(4000) % 4 == 3,
    )
    layers = miss_forecast.learn_misses(outcomes, seed=0)
    first, second = predicted(layers, np.array([[-1.0, 0.0], [1.0, 0.0]], dtype=np.float32))
    assert first == pytest.approx(0.9 * 0.3 + 0.1 * 0.03, abs=0.03)
    assert second == pytest.approx(0.05, abs=0.02)
    again = miss_forecast.learn_misses(outcomes, seed=0)
    assert all(np.array_equal(a, b) for pair in zip(layers, again, strict=True) for a, b in zip(*pair, strict=True))


def test_the_price_changes_on_the_way_and_is_the_one_that_the_actor_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watch(layers: object, observation: np.ndarray) -> np.ndarray:
        seen.append(observation.copy())
        return np.zeros((len(observation), 4), dtype=np.float32)

    monkeypatch.setattr(miss_forecast, "forward", watch)
    mdp = FleetMdp(toy_spec(), SHIELD, sampler(span_s=2400.0), num_fleets=1)
    outcomes = miss_forecast.play_at_changing_prices([], mdp, (2.0, 60.0), seed=0)
    prices = np.concatenate(seen)[:, mdp.encoder.schema.features.index("miss_price")]
    changes = np.flatnonzero(np.diff(prices)) + 1
    per_horizon = round(600.0 / mdp.spec.control_interval_s)
    assert len(seen) == 4 * per_horizon
    assert len(changes) == 2
    assert changes[1] - changes[0] == 2 * per_horizon
    assert ((price_feature(2.0) <= prices) & (prices <= price_feature(60.0))).all()
    played = {tuple(row) for row in np.concatenate(seen)}
    assert all(tuple(row) in played for row in outcomes.observation)
    assert ((outcomes.share >= 0) & (outcomes.share <= 1)).all()


def test_nothing_is_learned_from_traffic_shorter_than_a_horizon() -> None:
    layers = policy_layers(build_ppo([small_mdp()], SMALL).policy)

    def short(scenario: object, sampler_of: object, num_fleets: int) -> FleetMdp:
        return FleetMdp(toy_spec(), SHIELD, sampler(span_s=100.0), num_fleets=num_fleets)

    chatbot, store = load_scenario("chatbot"), TraceStore(())
    found = miss_forecast.play_policy(layers, [chatbot], store, short, (2.0, 60.0), timesteps=100, seed=0)
    assert found == (None, set())


def test_traffic_that_cannot_be_drawn_is_noted_and_left_out() -> None:
    layers = policy_layers(build_ppo([small_mdp()], SMALL).policy)

    def empty(seed: int) -> object:
        raise SpecError("no requests")

    def make(scenario: object, sampler_of: object, num_fleets: int) -> FleetMdp:
        return FleetMdp(toy_spec(), SHIELD, empty, num_fleets=num_fleets)  # type: ignore[arg-type]

    chatbot, store = load_scenario("chatbot"), TraceStore(())
    outcomes, notes = miss_forecast.play_policy(layers, [chatbot], store, make, (2.0, 60.0), timesteps=100, seed=0)
    assert outcomes is None
    assert notes == {"miss forecast: traffic of chatbot was left out (no requests)"}


def test_onnx_gives_the_forecast_beside_the_action() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    actor = [(rng.normal(size=(2, 5)).astype(np.float32), np.zeros(2, np.float32))]
    forecast = [
        (rng.normal(size=(8, 5)).astype(np.float32), rng.normal(size=8).astype(np.float32)),
        (rng.normal(size=(1, 8)).astype(np.float32), np.full(1, -2.0, np.float32)),
    ]
    session = onnxruntime.InferenceSession(onnx_bytes(actor, forecast), providers=["CPUExecutionProvider"])
    observation = rng.normal(size=(100, 5)).astype(np.float32)
    action, share = session.run(["action", "miss_share"], {"observation": observation})
    assert np.abs(action - np.clip(observation @ actor[0][0].T, -1, 1)).max() < 1e-5
    assert np.abs(share[:, 0] - predicted(forecast, observation)).max() < 1e-5
