"""Observation, action and faults: dimensionless, absolute, and never blind."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from rl_autoscale.envs.action import NEUTRAL_HEADROOM, ActionDecoder
from rl_autoscale.envs.constants import Constants
from rl_autoscale.envs.faults import TelemetryFaults
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.observation import Anchors, ObservationEncoder
from rl_autoscale.envs.schema import Schema, pool_actions
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


def observed_in(spec: FleetSpec) -> FleetState:
    mdp = FleetMdp(spec, SHIELD, sampler())
    mdp.reset(0)
    assert mdp.state is not None
    return mdp.state


def decide(mdp: FleetMdp, state: FleetState, action: list[float]) -> ScalingDecision:
    return mdp.decoder.decode(np.array([action]), mdp.encoder.anchors(), state)


def anchored(
    replicas: list[float], peak: list[float] | float = 0.0, in_flight: float = 16.0, admission: float = 1.0
) -> Anchors:
    """Of one fleet, as if it had been measured."""
    base = np.array([replicas])
    return Anchors(
        base,
        peak=np.broadcast_to(peak, base.shape),
        in_flight=np.full_like(base, in_flight),
        admission=np.full((1, 1), admission),
        found=np.zeros_like(base),
    )


def side_by_side() -> FleetSpec:
    """Two pools for one class, the second of which is cheaper."""
    spec = toy_spec()
    pools = [{**spec.pools[0].model_dump(), "name": name, "price_usd_per_gpu_hour": usd} for name, usd in PRICES]
    return FleetSpec.from_dict({**spec.model_dump(), "pools": pools})


def test_schema_follows_the_layout_and_nothing_else():
    same = Schema.of(toy_spec(profile="llama-3.1-8b_h100_tp1", max_replicas=40, startup=[{"mean_s": 300}]))
    assert Schema.of(toy_spec()).digest == same.digest
    assert Schema.of(toy_spec(role="interactive")).digest != same.digest
    assert len(same.features) == len(set(same.features))


def test_neutral_action_is_headroom_times_demand():
    mdp, state = observed()
    anchors = mdp.encoder.anchors()
    base = anchors.replicas
    decision = decide(mdp, state, [0.0, 0.0, 0.0])
    assert 0.5 * anchors.peak[0, 0] < NEUTRAL_HEADROOM * base[0, 0]
    assert decision.target_replicas[0, 0] == int(np.ceil(NEUTRAL_HEADROOM * base[0, 0]))
    assert decision.max_batch_size[0, 0] == round(anchors.in_flight[0, 0])
    assert decision.admission[0, 0] == 1.0


def test_headroom_that_a_pool_may_not_hold_goes_to_the_one_beside_it():
    two = side_by_side()
    rows = np.zeros((1, 2, len(fields(PoolTelemetry)))), np.zeros((1, 1, len(fields(ClassTelemetry))))
    both = FleetState(
        np.zeros(1), np.full(1, 5.0), PoolTelemetry.from_matrix(rows[0]), ClassTelemetry.from_matrix(rows[1])
    )
    demand, decoder = [0.0, 5.0], ActionDecoder(two)
    measured, peaked = anchored(demand), anchored(demand, [0.0, 7.5])
    neutral, most = (np.full((1, decoder.num_actions), value) for value in (0.0, 1.0))
    most[:, [0, len(pool_actions(two))]] = 2.0 / 3.0  # an octave of headroom
    assert decoder.decode(neutral, measured, both).target_replicas[0].tolist() == [1, 7]  # 1.4 x 5
    assert decoder.decode(most, measured, both).target_replicas[0].tolist() == [6, 8]  # 2.8 x 5, of which 8 fit
    assert decoder.decode(most, peaked, both).target_replicas[0].tolist() == [7, 8]  # twice the peak, 15


@pytest.mark.parametrize(("action", "admission"), [(1.0, np.inf), (0.5, 2.0), (0.0, 1.0), (-1.0, 0.25)])
def test_admission_action(action, admission):
    mdp, state = observed()
    decision = decide(mdp, state, [0.0, 0.0, action])
    assert decision.admission[0, 0] == pytest.approx(admission)
    corrected = mdp.decoder.decode(np.array([[0.0, 0.0, action]]), anchored([1.0], admission=0.5), state)
    assert corrected.admission[0, 0] == pytest.approx(0.5 * admission)


@pytest.mark.parametrize(("action", "cap"), [(-1.0, 2), (-0.5, 4), (0.0, 8), (0.5, 16), (1.0, 32), (9.0, 32)])
def test_batch_cap_is_a_multiple_of_what_may_be_in_flight(action: float, cap: int):
    spec = side_by_side()
    decoder, state = ActionDecoder(spec), observed_in(spec)
    raw = np.zeros((1, decoder.num_actions))
    raw[:, [2, 5]] = action
    for in_flight, most in ((8.0, cap), (16.0, min(2 * cap, 32))):
        decision = decoder.decode(raw, anchored([1.0, 1.0], in_flight=in_flight), state)
        assert decision.max_batch_size[0].tolist() == [most, most]


def test_where_one_pool_serves_one_class_the_batch_cap_is_the_law():
    mdp, state = observed()
    assert not [name for name in mdp.encoder.schema.actions if name.endswith("batch_cap")]
    for in_flight, cap in ((0.3, 1), (8.4, 8), (99.0, 32)):
        decision = mdp.decoder.decode(np.ones((1, 3)), anchored([1.0], in_flight=in_flight), state)
        assert decision.max_batch_size[0, 0] == cap


def test_without_refusal_admission_is_always_open():
    _, state = observed()
    decision = ActionDecoder(toy_spec(), refuse=False).decode(np.full((1, 3), -1.0), anchored([1.0], 1.0), state)
    assert np.isinf(decision.admission).all()


def test_actions_are_clipped_and_monotone():
    mdp, state = observed()
    anchors = anchored([3.0], 3.0)
    targets = [
        int(mdp.decoder.decode(np.array([[a, -1.0, 0.0]]), anchors, state).target_replicas[0, 0])
        for a in (-7.0, -1.0, 0.0, 1.0, 7.0)
    ]
    assert targets == sorted(targets)
    assert targets[0] == targets[1]
    assert targets[3] == targets[4]


@pytest.mark.parametrize(("action", "replicas"), [(-1.0, 1), (-0.5, 2), (0.0, 4), (1.0, 8)])
def test_floor_is_a_multiple_of_the_peak(action, replicas):
    """Demand is nearly gone, a peak of four replicas is remembered; the fleet's least is one."""
    mdp, state = observed()
    decision = mdp.decoder.decode(np.array([[0.0, action, 0.0]]), anchored([0.1], 4.0), state)
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
    before = mdp.encoder.anchors().replicas
    features = mdp.encoder.encode(blind(state), 10.0)
    names = mdp.encoder.schema.features
    assert np.isfinite(features).all()
    assert features[0, names.index("pool0.mixed.missing")] == 1.0
    assert features[0, names.index("class0.interactive.missing")] == 1.0
    assert np.array_equal(mdp.encoder.anchors().replicas, before)
    assert before[0, 0] > 0


def test_unmet_is_the_share_of_what_finished_however_little_that_is() -> None:
    mdp, state = observed()
    column = mdp.encoder.schema.features.index("class0.interactive.unmet")
    for finished, met, unmet in ((1.0 / 30.0, 1.0 / 30.0, 0.0), (0.1, 0.05, 0.5), (0.02, 0.0, 1.0), (0.0, 0.0, 0.0)):
        rates = {"finished_per_s": np.full((1, 1), finished), "met_per_s": np.full((1, 1), met)}
        seen = mdp.encoder.encode(replace(state, classes=replace(state.classes, **rates)), 20.0)
        assert seen[0, column] == pytest.approx(unmet)


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
    decoder = ActionDecoder(mdp.spec)
    neutral = np.zeros((1, decoder.num_actions))
    decision = decoder.decode(neutral, anchored([2.0]), asked, Constants(hysteresis=hysteresis).at(20.0))
    assert decision.target_replicas.tolist() == [[target]]


def test_a_pool_beside_keeps_what_it_has_until_the_first_choice_has_started():
    """Six replicas of the interactive pool are wanted; of the mixed pool's five, as many stay as are not ready yet."""
    spec = toy_spec()
    pool = spec.pools[0].model_dump()
    beside = FleetSpec.from_dict({**spec.model_dump(), "pools": [{**pool, "name": "own", "role": "interactive"}, pool]})
    decoder = ActionDecoder(beside)
    action = np.zeros((1, decoder.num_actions))
    for ready, kept in ((1.0, 5), (4.0, 2), (6.0, 1), (8.0, 1), (np.nan, 5)):
        rows = np.zeros((1, 2, len(fields(PoolTelemetry)))), np.zeros((1, 1, len(fields(ClassTelemetry))))
        pools = replace(
            PoolTelemetry.from_matrix(rows[0]), ready=np.array([[ready, 5.0]]), asked_for=np.array([[1.0, 5.0]])
        )
        state = FleetState(np.zeros(1), np.full(1, 5.0), pools, ClassTelemetry.from_matrix(rows[1]))
        assert decoder.decode(action, anchored([4.0, 0.0]), state).target_replicas[0].tolist() == [6, kept]


def test_for_a_batch_pool_nobody_stands_in():
    spec = with_batch_pool()
    decoder = ActionDecoder(spec)
    state = arrivals(spec, (0.0, 1.0), 9.0)
    state = replace(state, pools=replace(state.pools, ready=np.array([[5.0, 0.0]]), asked_for=np.array([[5.0, 0.0]])))
    decision = decoder.decode(np.zeros((1, decoder.num_actions)), anchored([0.5, 3.0]), state)
    assert decision.target_replicas[0].tolist() == [1, 4]


def with_batch_pool() -> FleetSpec:
    spec = toy_spec()
    pool, chat = spec.pools[0].model_dump(), spec.classes[0].model_dump()
    jobs = {**chat, "name": "jobs", "kind": "batch", "ttft_slo_s": 600.0}
    batch = {**pool, "name": "batch", "role": "batch", "min_replicas": 0}
    return FleetSpec.from_dict({**spec.model_dump(), "pools": [pool, batch], "classes": [chat, jobs]})


def arrivals(spec: FleetSpec, rate_per_s: tuple[float, float], queue: float, wait_s: float = 0.0) -> FleetState:
    """One fleet after one window of 5 s; the queue is that of the batch class."""
    pools = np.zeros((1, len(spec.pools), len(fields(PoolTelemetry))))
    classes = ClassTelemetry.from_matrix(np.zeros((1, len(spec.classes), len(fields(ClassTelemetry)))))
    rates = np.array([rate_per_s])
    classes = replace(
        classes,
        arrivals_per_s=rates,
        arrived_prompt_tokens_per_s=500.0 * rates,
        mean_output_tokens=np.full((1, 2), 100.0),
        queue_length=np.array([[0.0, queue]]),
        oldest_wait_s=np.array([[0.0, wait_s]]),
    )
    return FleetState(np.zeros(1), np.full(1, 5.0), PoolTelemetry.from_matrix(pools), classes)


def test_a_batch_pool_follows_its_queue_and_its_floor_what_arrives():
    spec = with_batch_pool()
    encoder = ObservationEncoder(spec, (1,))
    assert np.isnan(encoder.anchors().replicas).all()
    features = encoder.encode(arrivals(spec, (20.0, 300.0), 4000.0, 100.0), 10.0)
    demand, backlog = encoder.demand_replicas(), encoder.demand.backlog_replicas(arrivals(spec, (0, 0), 4000.0, 100.0))
    assert encoder.anchors().replicas[0].tolist() == [demand[0, 0], backlog[0, 1]]
    assert encoder.anchors().peak[0].tolist() == [demand[0, 0], demand[0, 1]]
    assert features[0, encoder.schema.features.index("pool1.batch.backlog")] == pytest.approx(
        np.log2(backlog[0, 1] + 1.0) / 3.0
    )
    encoder.encode(arrivals(spec, (20.0, 0.0), np.nan, 100.0), 10.0)
    assert encoder.anchors().replicas[0, 1] == backlog[0, 1]  # an unknown queue is as it was
    encoder.encode(arrivals(spec, (20.0, 0.0), 0.0), 10.0)
    assert encoder.anchors().replicas[0, 1] == 0.0


def test_only_a_batch_pool_has_a_backlog_among_its_features():
    spec = with_batch_pool()
    names = [name for name in Schema.of(spec).features if name.endswith(".backlog")]
    assert names == ["pool1.batch.backlog"]
    encoder = ObservationEncoder(spec)
    features = encoder.encode(arrivals(spec, (1.0, 1.0), 10.0)[0], 10.0)
    assert features.shape == (len(encoder.schema.features),)
    assert features[encoder.schema.features.index("startup")] == pytest.approx(np.log2(10.0 / 5.0) / 5.0)


@pytest.mark.parametrize(("backlog", "replicas"), [(0.3, 0), (0.4, 1), (1.0, 1), (1.2, 2), (9.0, 8)])
def test_replicas_for_a_queue_are_rounded_to_the_nearest(backlog: float, replicas: int):
    """1.4 times what it needs; of an interactive pool every bit counts."""
    spec = with_batch_pool()
    decoder = ActionDecoder(spec)
    neutral = np.zeros((1, decoder.num_actions))
    neutral[:, 1] = neutral[:, len(pool_actions(spec)) + 1] = -1.0  # no floor
    decision = decoder.decode(neutral, anchored([0.1, backlog], 1.0), arrivals(spec, (1.0, 1.0), 10.0))
    assert decision.target_replicas[0].tolist() == [1, replicas]


def test_one_job_that_waits_gets_a_replica_in_time():
    """The least headroom, no floor, and work of a fraction of a second: due after 600 s, starts take 10 s."""
    spec = with_batch_pool()
    encoder, decoder = ObservationEncoder(spec, (1,)), ActionDecoder(spec)
    action = np.full((1, decoder.num_actions), -1.0)

    def replicas(wait_s: float) -> int:
        state = arrivals(spec, (1.0, 0.0), 1.0, wait_s)
        encoder.encode(state, 10.0)
        decision = decoder.decode(action, encoder.anchors(), state)
        return int(decision.target_replicas[0, 1])

    assert [replicas(wait_s) for wait_s in (0.0, 300.0, 579.0, 580.0, 5000.0)] == [0, 0, 0, 1, 1]


def test_a_batch_pool_without_a_queue_is_given_up():
    """Nothing queued is not nothing measured."""
    spec = with_batch_pool()
    encoder, decoder = ObservationEncoder(spec, (1,)), ActionDecoder(spec)
    state = arrivals(spec, (0.0, 30.0), 0.0)
    state = replace(state, pools=replace(state.pools, asked_for=np.array([[3.0, 3.0]])))
    action = np.full((1, decoder.num_actions), -1.0)
    held = decoder.decode(action, encoder.anchors(), state)
    assert held.target_replicas[0].tolist() == [3, 3]
    encoder.encode(state, 10.0)
    given_up = decoder.decode(action, encoder.anchors(), state)
    assert given_up.target_replicas[0].tolist() == [1, 0]


def test_what_refusal_was_off_by_is_seen_and_divided_out():
    """Strictness as the policy said it is what it sees, whatever its correction was when it said so."""
    mdp, state = observed()
    names = mdp.encoder.schema.features
    classes = replace(
        state.classes,
        arrivals_per_s=np.full((1, 1), 50.0), finished_per_s=np.full((1, 1), 40.0), met_per_s=np.full((1, 1), 30.0),
        late_first_tokens_per_s=np.full((1, 1), 10.0), slow_answers_per_s=np.zeros((1, 1)),
        refused_per_s=np.zeros((1, 1)), admission=np.ones((1, 1)), age_s=np.zeros((1, 1)),
    )  # fmt: skip
    mdp.encoder.reset()
    features = mdp.encoder.encode(replace(state, classes=classes), 10.0)
    corrected = mdp.encoder.strictness.octaves[0, 0]
    assert corrected > 0.0
    assert features[0, names.index("class0.interactive.admission")] == 0.0
    assert features[0, names.index("class0.interactive.correction")] == pytest.approx(0.5 * corrected)
    assert mdp.encoder.anchors().admission[0, 0] == pytest.approx(2.0**-corrected)
    decided = decide(mdp, state, [0.0, 0.0, 0.3])
    again = replace(classes, admission=decided.admission, met_per_s=classes.finished_per_s)
    features = mdp.encoder.encode(replace(state, classes=again), 10.0)
    assert features[0, names.index("class0.interactive.admission")] == pytest.approx(2.0 * 0.3 / 3.0)
