"""What a miss costs by class: drawn in training, seen by the policy, paid in the reward; and batch work put off."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rl_autoscale.envs.mdp import EpisodeSetup, FleetMdp
from rl_autoscale.envs.observation import price_feature
from rl_autoscale.envs.reward import LEAST_WEIGHT, step_reward
from rl_autoscale.envs.sampler import draw_weights
from rl_autoscale.envs.schema import Schema
from rl_autoscale.fleet.rng import stream
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NO_LIMIT
from rl_autoscale.workload.trace import Workload
from tests.envs.toy import SHIELD, toy_spec

CLASSES = [
    {"name": "chat", "kind": "interactive", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1, "timeout_s": 20},
    {"name": "jobs", "kind": "batch", "ttft_slo_s": 600.0, "tpot_slo_s": 1.0, "priority": 1},
]


def shared_spec() -> FleetSpec:
    single = toy_spec().model_dump(mode="json", exclude_defaults=True)
    return FleetSpec.from_dict({**single, "classes": CLASSES})


def both_classes(seed: int, span_s: float = 100.0) -> Workload:
    """Ten chats a second, and two hundred jobs handed in at 20 s."""
    rng = stream(seed, "shared")
    arrival_s = np.concatenate([np.sort(rng.uniform(0, span_s, 1000)), np.full(200, 20.0)])
    order = np.argsort(arrival_s, kind="stable")
    classes = np.repeat(np.array([0, 1], dtype=np.int16), [1000, 200])[order]
    prompt, output = np.full(1200, 400, dtype=np.int32), np.full(1200, 100, dtype=np.int32)
    return Workload(arrival_s[order], prompt, output, classes, ("chat", "jobs"), span_s)


def shared_mdp(**setup: object) -> FleetMdp:
    def sample(seed: int) -> EpisodeSetup:
        return replace(EpisodeSetup(both_classes(seed), miss_price=20.0), **setup)  # type: ignore[arg-type]

    return FleetMdp(shared_spec(), SHIELD, sample)


def played(mdp: FleetMdp, admission: float = 1.0, num_steps: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Cost and misses of each step with the whole fleet ready and refusal (-1 strict, 1 off) held."""
    mdp.reset(0)
    action = np.array([[1.0, 1.0, 1.0, admission, admission, 1.0]])
    steps = [mdp.step(action) for _ in range(num_steps)]
    return np.array([step.reward.cost[0] for step in steps]), np.array([step.reward.misses[0] for step in steps])


@pytest.mark.parametrize(("action", "limit"), [(1.0, NO_LIMIT), (0.0, 8), (-1.0, 1), (0.9, 52)])
def test_batch_work_in_flight_is_a_share_of_what_ready_replicas_take(action: float, limit: int) -> None:
    """Two replicas with a batch of 32 each are ready; what of the chats is in flight is nobody's to hold."""
    mdp = shared_mdp()
    mdp.reset(0)
    assert mdp.state is not None
    actions = np.array([[0.0, 0.0, 0.0, 0.0, 0.0, action]])
    decision = mdp.decoder.decode(actions, mdp.encoder.anchors(), mdp.state)
    assert Schema.of(shared_spec()).actions[-1] == "class1.batch.in_flight"
    assert decision.in_flight_limits.tolist() == [[NO_LIMIT, limit]]
    assert not any(name.endswith("in_flight") for name in Schema.of(toy_spec()).actions)


def test_weights_are_seen_where_there_is_something_to_weigh() -> None:
    assert not any(name.endswith("miss_weight") for name in Schema.of(toy_spec()).features)
    mdp = shared_mdp(miss_weight=(1.0, 0.1))
    features = Schema.of(shared_spec()).features
    observation = mdp.reset(0)[0]
    assert observation[features.index("class0.interactive.miss_weight")] == 0.0
    assert observation[features.index("class1.batch.miss_weight")] == pytest.approx(price_feature(0.1))


def test_a_miss_costs_its_class_weight() -> None:
    one, hundred = np.ones(1), np.full(1, 100.0)
    missed, weight = np.array([[3.0, 40.0]]), np.array([[1.0, 0.1]])
    reward = step_reward(one, np.zeros(1), missed, one, hundred, np.array([20.0]), weight)
    assert reward.misses == pytest.approx(0.07)
    assert reward.total == pytest.approx(-(1.0 + 20.0 * 0.07) / 2.0)


def test_weighted_misses_are_those_of_the_books() -> None:
    weighted, plain = shared_mdp(miss_weight=(0.5, 1.0)), shared_mdp()
    _, misses = played(weighted, admission=-1.0)
    books, usual = weighted.books(0), (played(plain, admission=-1.0), plain.books(0))[1]
    assert books["slo_attainment"] == usual["slo_attainment"] < 1.0
    assert misses.sum() / 20 == pytest.approx(books["weighted_misses"])
    assert books["weighted_misses"] < usual["weighted_misses"] == pytest.approx(1.0 - usual["slo_attainment"])
    missed = [1.0 - books[f"slo_attainment/{name}"] for name in ("class0.interactive", "class1.batch")]
    assert books["weighted_misses"] == pytest.approx((0.5 * 1000 * missed[0] + 200 * missed[1]) / 1200)


def test_batch_work_is_charged_when_it_arrives_and_given_back_when_done() -> None:
    """The bill of an episode in which all is done is its GPU time, whenever the work was charged."""
    mdp = shared_mdp()
    cost, _ = played(mdp, num_steps=20)
    gpu_s = mdp.batch.gpu_s().sum()
    assert int(mdp.batch.ledger("finished")[0, 1]) == 200
    assert cost.sum() * mdp._ideal_gpu_s[0] == pytest.approx(gpu_s)
    assert cost[3] > cost[2] + 1.0  # the jobs are handed in
    assert cost[4] < cost[2] - 1.0


def test_work_left_undone_is_in_the_books_as_in_the_reward() -> None:
    mdp = shared_mdp()
    cost, _ = played(mdp, num_steps=4)  # the jobs have just been handed in
    book = mdp.books(0)
    assert book["put_off_over_ideal"] > 0.1
    assert cost.mean() == pytest.approx(book["cost_over_ideal"] + book["put_off_over_ideal"])
    played(mdp, num_steps=20)
    assert mdp.books(0)["put_off_over_ideal"] == 0.0


def test_drawn_weights_have_a_dearest_class_and_are_often_equal() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([draw_weights(rng, 3) for _ in range(2000)])
    assert (drawn.max(axis=1) == 1.0).all()
    assert drawn.min() == pytest.approx(LEAST_WEIGHT, rel=0.05)
    assert 0.38 < (drawn == 1.0).all(axis=1).mean() < 0.46  # a third, and an eighth of the rest
