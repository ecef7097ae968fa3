"""Observation, action and faults: dimensionless, absolute, and never blind."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from rl_autoscale.envs.action import NEUTRAL_HEADROOM, ActionDecoder
from rl_autoscale.envs.faults import TelemetryFaults
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.observation import ObservationEncoder
from rl_autoscale.envs.schema import POOL_ACTIONS, Schema
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import ClassTelemetry, FleetState, PoolTelemetry, ScalingDecision
from tests.envs.toy import SHIELD, sampler, toy_spec

PRICES = (("dear", 3.0), ("cheap", 1.0))


def observed(num_steps: int = 4, **changes: object) -> tuple[FleetMdp, FleetState]:
    mdp = FleetMdp(toy_spec(**changes), SHIELD, sampler())
    mdp.reset(0)
    for _ in range(num_steps):
        mdp.step(np.zeros((1, mdp.decoder.num_actions)))
    assert mdp.state is not None
    return mdp, mdp.state


def decide(mdp: FleetMdp, state: FleetState, action: list[float]) -> ScalingDecision:
    return mdp.decoder.decode(np.array([action]), mdp.encoder.base_replicas(), mdp.encoder.peak_replicas(), state)


def test_schema_follows_the_layout_and_nothing_else():
    same = Schema.of(toy_spec(profile="llama-3.1-8b_h100_tp1", max_replicas=40, startup=[{"mean_s": 300}]))
    assert Schema.of(toy_spec()).digest == same.digest
    assert Schema.of(toy_spec(role="interactive")).digest != same.digest
    assert len(same.features) == len(set(same.features))


def test_neutral_action_is_headroom_times_demand():
    mdp, state = observed()
    base = mdp.encoder.base_replicas()
    decision = decide(mdp, state, [0.0, 0.0, 0.0, 0.0])
    assert 0.5 * mdp.encoder.peak_replicas()[0, 0] < NEUTRAL_HEADROOM * base[0, 0]
    assert decision.target_replicas[0, 0] == int(np.ceil(NEUTRAL_HEADROOM * base[0, 0]))
    assert decision.max_batch_size[0, 0] == 16
    assert decision.admission[0, 0] == 1.0


def test_headroom_that_a_pool_may_not_hold_goes_to_the_one_beside_it():
    spec = toy_spec()
    pools = [{**spec.pools[0].model_dump(), "name": name, "price_usd_per_gpu_hour": usd} for name, usd in PRICES]
    two = FleetSpec.from_dict({**spec.model_dump(), "pools": pools})
    rows = np.zeros((1, 2, len(fields(PoolTelemetry)))), np.zeros((1, 1, len(fields(ClassTelemetry))))
    both = FleetState(
        np.zeros(1), np.full(1, 5.0), PoolTelemetry.from_matrix(rows[0]), ClassTelemetry.from_matrix(rows[1])
    )
    demand = np.array([[0.0, 5.0]])
    decoder, nothing = ActionDecoder(two), np.zeros((1, 2))
    neutral, most = (np.full((1, decoder.num_actions), value) for value in (0.0, 1.0))
    most[:, [0, len(POOL_ACTIONS)]] = 2.0 / 3.0  # an octave of headroom
    assert decoder.decode(neutral, demand, nothing, both).target_replicas[0].tolist() == [1, 7]  # 1.4 x 5
    assert decoder.decode(most, demand, nothing, both).target_replicas[0].tolist() == [6, 8]  # 2.8 x 5, of which 8 fit
    assert decoder.decode(most, demand, 1.5 * demand, both).target_replicas[0].tolist() == [7, 8]  # twice the peak, 15


@pytest.mark.parametrize(("action", "admission"), [(1.0, np.inf), (0.5, 2.0), (0.0, 1.0), (-1.0, 0.25)])
def test_admission_action(action, admission):
    mdp, state = observed()
    decision = decide(mdp, state, [0.0, 0.0, 1.0, action])
    assert decision.admission[0, 0] == pytest.approx(admission)
    assert decision.max_batch_size[0, 0] == 32


def test_without_refusal_admission_is_always_open():
    _, state = observed()
    decision = ActionDecoder(toy_spec(), refuse=False).decode(
        np.full((1, 4), -1.0), np.ones((1, 1)), np.ones((1, 1)), state
    )
    assert np.isinf(decision.admission).all()


def test_actions_are_clipped_and_monotone():
    mdp, state = observed()
    base = np.array([[3.0]])
    targets = [
        int(mdp.decoder.decode(np.array([[a, -1.0, 0.0, 0.0]]), base, base, state).target_replicas[0, 0])
        for a in (-7.0, -1.0, 0.0, 1.0, 7.0)
    ]
    assert targets == sorted(targets)
    assert targets[0] == targets[1]
    assert targets[3] == targets[4]


@pytest.mark.parametrize(("action", "replicas"), [(-1.0, 1), (-0.5, 2), (0.0, 4), (1.0, 8)])
def test_floor_is_a_multiple_of_the_peak(action, replicas):
    """Demand is nearly gone, a peak of four replicas is remembered; the fleet's least is one."""
    mdp, state = observed()
    decision = mdp.decoder.decode(np.array([[0.0, action, 0.0, 0.0]]), np.array([[0.1]]), np.array([[4.0]]), state)
    assert decision.target_replicas[0, 0] == replicas


def blind(state: FleetState) -> FleetState:
    return FleetState(
        state.time_s,
        state.window_s,
        PoolTelemetry.from_matrix(np.full_like(state.pools.to_matrix(), np.nan)),
        ClassTelemetry.from_matrix(np.full_like(state.classes.to_matrix(), np.nan)),
    )


def test_missing_telemetry_is_flagged_and_demand_is_held():
    mdp, state = observed()
    before = mdp.encoder.base_replicas().copy()
    features = mdp.encoder.encode(blind(state), 10.0)
    names = mdp.encoder.schema.features
    assert np.isfinite(features).all()
    assert features[0, names.index("pool0.mixed.missing")] == 1.0
    assert features[0, names.index("class0.interactive.missing")] == 1.0
    assert np.array_equal(mdp.encoder.base_replicas(), before)
    assert before[0, 0] > 0


def test_unmeasured_demand_holds_what_is_asked_for():
    mdp, state = observed(num_steps=0)
    decision = decide(mdp, state, [1.0, 1.0, 1.0, 1.0])
    assert decision.target_replicas[0, 0] == 2


def test_encoder_of_one_fleet_equals_a_row_of_a_batch():
    spec = toy_spec()
    mdp = FleetMdp(spec, SHIELD, sampler(), num_fleets=3)
    single = ObservationEncoder(spec)
    batch_features = mdp.reset(0)
    assert mdp.state is not None
    assert np.array_equal(batch_features[1], single.encode(mdp.state[1], mdp.miss_price[1]))
    for _ in range(5):
        step = mdp.step(np.zeros((3, 4)))
        assert np.array_equal(step.observation[1], single.encode(step.state[1], mdp.miss_price[1]))


def test_reset_of_some_fleets_leaves_the_others_memory_alone():
    mdp = FleetMdp(toy_spec(), SHIELD, sampler(), num_fleets=2)
    undisturbed = FleetMdp(toy_spec(), SHIELD, sampler(), num_fleets=2)
    mdp.reset(0)
    undisturbed.reset(0)
    for _ in range(3):
        mdp.step(np.zeros((2, 3)))
        undisturbed.step(np.zeros((2, 3)))
    mdp.reset_fleets(np.array([True, False]))
    left, right = mdp.step(np.zeros((2, 3))), undisturbed.step(np.zeros((2, 3)))
    assert np.array_equal(left.observation[1], right.observation[1])
    assert not np.array_equal(left.observation[0], right.observation[0])


def test_faults_are_seeded_and_reach_the_observation():
    def run() -> np.ndarray:
        mdp = FleetMdp(toy_spec(), SHIELD, sampler(), num_fleets=4, faults=TelemetryFaults(missing=0.3, frozen=0.3))
        seen = [mdp.reset(1)] + [mdp.step(np.zeros((4, 3))).observation for _ in range(15)]
        return np.stack(seen)

    first = run()
    names = Schema.of(toy_spec()).features
    missing = first[:, :, names.index("pool0.mixed.missing")]
    age = first[:, :, names.index("pool0.mixed.age")]
    assert 0 < missing.mean() < 1
    assert age.max() > 1.0  # frozen rows are older than one interval
    assert np.array_equal(first, run())


@pytest.mark.parametrize(("asked_for", "hysteresis", "target"), [(4, 0.0, 3), (4, 0.2, 4), (5, 0.2, 4), (2, 0.2, 3)])
def test_hysteresis_keeps_what_is_a_little_more_than_wanted(asked_for: int, hysteresis: float, target: int):
    """2.8 replicas are wanted: 3, or up to 4 with a fifth more."""
    mdp, state = observed()
    asked = replace(state, pools=replace(state.pools, asked_for=np.full_like(state.pools.asked_for, asked_for)))
    decoder = ActionDecoder(mdp.spec, hysteresis=hysteresis)
    neutral = np.zeros((1, decoder.num_actions))
    decision = decoder.decode(neutral, np.array([[2.0]]), np.array([[0.0]]), asked)
    assert decision.target_replicas.tolist() == [[target]]
