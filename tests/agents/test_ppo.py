"""PPO learns a fleet with a known best policy, resumes, and leaves training unchanged through ONNX."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from rl_autoscale.agents.export import export_policy, onnx_bytes, read_actor
from rl_autoscale.agents.learned import LearnedPolicy
from rl_autoscale.agents.ppo import CRITIC_FIRST, PpoConfig, build_ppo, load_checkpoint, policy_layers, train_ppo
from rl_autoscale.agents.registry import make_policy
from rl_autoscale.agents.sb3_fleets import SB3Fleets
from rl_autoscale.envs.constants import CONSTANTS, Constants
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.reward import PRICE_RANGE
from rl_autoscale.envs.schema import Schema
from rl_autoscale.fleet.errors import PolicyFileError, SpecError
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.sim.fleet import SimFleet
from tests.envs.toy import SHIELD, poisson_workload, sampler, toy_spec

SMALL = PpoConfig(total_timesteps=512, num_fleets=4, rollout_steps=32, num_threads=1, checkpoint_every=128)


def small_mdp(**options: object) -> FleetMdp:
    return FleetMdp(toy_spec(), SHIELD, sampler(), num_fleets=4, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    model = build_ppo([small_mdp()], SMALL)
    export_policy(policy_layers(model.policy), Schema.of(toy_spec()), folder, refuse=True, training={"seed": 0})
    return model, folder


def seen_by_critic(model: object, observations: np.ndarray, value: float = 0.0) -> np.ndarray:
    """Observations with as many features of the future as the model's critic wants."""
    missing = model.observation_space.shape[0] - observations.shape[1]  # type: ignore[attr-defined]
    return np.pad(observations, ((0, 0), (0, missing)), constant_values=value)


def test_onnx_gives_sb3s_actions(exported):
    model, folder = exported
    observations = np.random.default_rng(0).uniform(-5, 5, (1000, len(Schema.of(toy_spec()).features)))
    observations = observations.astype(np.float32)
    expected, _ = model.predict(seen_by_critic(model, observations), deterministic=True)
    actual = LearnedPolicy(folder).run_network(observations)
    assert np.abs(actual - expected).max() < 1e-5
    assert np.abs(expected).max() > 0  # not a network of zeros


def test_the_future_reaches_the_critic_and_never_the_actor(exported):
    model, _ = exported
    observations = np.random.default_rng(0).uniform(-1, 1, (50, len(Schema.of(toy_spec()).features))).astype(np.float32)
    calm, busy = (seen_by_critic(model, observations, value) for value in (0.0, 1.0))
    assert np.array_equal(model.predict(calm, deterministic=True)[0], model.predict(busy, deterministic=True)[0])
    values = [model.policy.predict_values(model.policy.obs_to_tensor(seen)[0]) for seen in (calm, busy)]
    assert not np.allclose(*(value.detach().numpy() for value in values))


def test_a_reset_in_the_middle_begins_returns_and_lengths_anew() -> None:
    fleets = SB3Fleets([small_mdp()], seed=0, gamma=0.99)
    fleets.reset()
    for _ in range(3):
        fleets.step(np.zeros((4, 3), np.float32))
    fleets.reset()
    lengths = []
    while not lengths:
        lengths = [info["episode"]["l"] for info in fleets.step(np.zeros((4, 3), np.float32))[3] if info]
    assert lengths == [20] * 4


def test_learns_that_an_idle_fleet_should_be_small():
    """Almost no traffic and cheap misses: the best policy is the smallest headroom, and PPO finds it in seconds."""
    mdp = FleetMdp(toy_spec(initial_replicas=6), SHIELD, sampler(rate_per_s=30.0, miss_price=0.01), num_fleets=8)
    config = PpoConfig(
        total_timesteps=12_000, num_fleets=8, rollout_steps=64, num_threads=1, learning_rate=3e-3, initial_log_std=-0.5
    )
    untrained = build_ppo([mdp], config)
    trained = train_ppo([mdp], config)

    def mean_headroom(model: object) -> float:
        observation, total = mdp.reset(99), 0.0
        for _ in range(19):
            action, _ = model.predict(seen_by_critic(model, observation), deterministic=True)  # type: ignore[attr-defined]
            total += float(action[:, 0].mean()) / 19
            observation = mdp.step(action).observation
        return total

    assert mean_headroom(trained) < -0.8 < mean_headroom(untrained)


def test_checkpoint_resumes_where_it_stopped(tmp_path):
    train_ppo([small_mdp()], SMALL, checkpoint_folder=tmp_path)
    fresh = build_ppo([small_mdp()], SMALL)
    assert load_checkpoint(fresh, tmp_path) == 512
    longer = SMALL.model_copy(update={"total_timesteps": 768})
    resumed = train_ppo([small_mdp()], longer, checkpoint_folder=tmp_path, resume=True)
    assert resumed.num_timesteps == 768


def test_a_resumed_run_scales_rewards_as_before(tmp_path):
    before = train_ppo([small_mdp()], SMALL, checkpoint_folder=tmp_path).get_env()
    resumed = build_ppo([small_mdp()], SMALL)
    load_checkpoint(resumed, tmp_path)
    assert resumed.get_env().spread_to_json() == before.spread_to_json()
    assert before.return_spread[0].var != 1.0


def test_the_layers_of_an_exported_network_can_be_read_back(exported):
    layers = policy_layers(exported[0].policy)
    for forecast in (None, layers):
        read = read_actor(onnx_bytes(layers, forecast))
        assert len(read) == len(layers)
        assert all(np.array_equal(a, b) for pair in zip(read, layers, strict=True) for a, b in zip(*pair, strict=True))


def test_a_given_actor_waits_for_its_critic_and_then_learns(exported):
    given = policy_layers(exported[0].policy)
    config = SMALL.model_copy(update={"total_timesteps": 40 * 128, "seed": 5})  # 40 rollouts: it waits for one
    seen = []
    model = train_ppo([small_mdp()], config, actor=given, report=seen.append)
    moved = [item.metrics["train/approx_kl"] for item in seen[1:]]  # by the update before each report
    assert 128 <= CRITIC_FIRST * config.total_timesteps == 256
    assert moved[0] == pytest.approx(0.0, abs=1e-6)
    assert min(moved[1:]) > 1e-5
    assert not np.array_equal(policy_layers(model.policy)[0][0], given[0][0])


def test_damaged_checkpoint_is_refused_clearly(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"not tensors")
    (tmp_path / "checkpoint.json").write_text(json.dumps({"timesteps": 5, "return_spread": []}))
    with pytest.raises(PolicyFileError, match="delete the folder"):
        load_checkpoint(build_ppo([small_mdp()], SMALL), tmp_path)


def test_training_is_reproducible():
    first, second = (train_ppo([small_mdp()], SMALL).policy.state_dict() for _ in range(2))
    assert all(np.array_equal(first[key].numpy(), second[key].numpy()) for key in first)


def test_reports_progress():
    seen = []
    train_ppo([small_mdp()], SMALL, report=seen.append)
    assert [item.timesteps for item in seen] == [128, 256, 384, 512]
    assert seen[-1].steps_per_s > 0
    assert 0 <= seen[-1].slo_attainment <= 1


def test_learned_policy_runs_a_fleet(exported):
    _, folder = exported
    fleet = SimFleet(toy_spec(), poisson_workload(20.0, 60.0, 0), seed=0)
    run_control_loop(fleet, LearnedPolicy(folder, miss_price=20.0))
    result = fleet.result()
    assert result.num_arrived > 0
    assert 0 < result.slo_attainment <= 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "policy.onnx").write_bytes(b"x"), "SHA-256"),
        (lambda folder: (folder / "policy.onnx").unlink(), "no such file"),
        (lambda folder: (folder / "policy.json").write_text("{"), "not a policy card"),
        (lambda folder: (folder / "policy.json").write_text("{}"), "missing format"),
        (lambda folder: (folder / "policy.json").unlink(), "rl-autoscale export"),
    ],
)
def test_damaged_policy_is_refused_with_one_clear_line(exported, tmp_path, damage, message):
    for name in ("policy.onnx", "policy.json"):
        (tmp_path / name).write_bytes((exported[1] / name).read_bytes())
    damage(tmp_path)
    with pytest.raises(PolicyFileError, match=message) as caught:
        LearnedPolicy(tmp_path)
    assert "\n" not in str(caught.value)


def test_policy_of_another_schema_is_refused(exported):
    policy = LearnedPolicy(exported[1])
    with pytest.raises(PolicyFileError, match="trained for schema"):
        policy.reset(toy_spec(role="interactive"))


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_price_is_refused(exported, price):
    with pytest.raises(SpecError, match="miss_price"):
        LearnedPolicy(exported[1], miss_price=price)


@pytest.mark.parametrize("admission", [-1.0, float("nan")])
def test_bad_admission_is_refused(exported, admission):
    with pytest.raises(SpecError, match=r"admission=.* at least 0, or inf"):
        LearnedPolicy(exported[1], admission=admission)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "schema version 3, this package reads"),
        ({"hysteresis": "much"}, "hysteresis='much' is not allowed"),
        ({"miss_price_range": None}, "constants or miss_price_range: .*export again"),
        ({"miss_price_range": [1.0]}, "constants or miss_price_range: .*export again"),
    ],
)
def test_a_card_of_another_time_or_hand_is_refused(exported, tmp_path, change, message):
    for name in ("policy.onnx", "policy.json"):
        (tmp_path / name).write_bytes((exported[1] / name).read_bytes())
    card = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps(card | change))
    with pytest.raises(PolicyFileError, match=message):
        LearnedPolicy(tmp_path).reset(toy_spec())


def test_what_is_no_network_cannot_be_trained_on():
    with pytest.raises(PolicyFileError, match="export it again"):
        read_actor(b"\xff\xffnot a network")
    with pytest.raises(PolicyFileError, match="train one anew"):
        read_actor(b"")


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, (), (0.1, -0.1), "0.1"])
def test_bad_constants_are_refused(exported, name, value):
    with pytest.raises(SpecError, match=rf"policy 'learned': {name}=.* is not allowed"):
        LearnedPolicy(exported[1], **{name: value})


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_policy_keeps_the_constants_it_was_trained_with(exported, tmp_path, name):
    layers, given = policy_layers(exported[0].policy), Constants(**{name: (0.1, 0.2, 0.4)})
    export_policy(layers, Schema.of(toy_spec()), tmp_path, refuse=True, training={}, constants=given)
    assert getattr(LearnedPolicy(tmp_path).constants, name) == (0.1, 0.2, 0.4)
    assert getattr(LearnedPolicy(tmp_path, **{name: 0.5}).constants, name) == 0.5
    assert getattr(LearnedPolicy(exported[1]).constants, name) == getattr(Constants(), name)


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_by_price_can_be_given_by_name_as_a_benchmark_does(exported, name):
    policy = make_policy("learned", path=str(exported[1]), **{name: [0.1, 0.2]})
    assert getattr(policy.constants, name) == (0.1, 0.2)
    with pytest.raises(SpecError, match=f"{name}='much' is not allowed; it must be a number, or several by price"):
        make_policy("learned", path=str(exported[1]), **{name: "much"})


def test_a_card_of_before_a_constant_does_without_it(exported, tmp_path):
    export_policy(policy_layers(exported[0].policy), Schema.of(toy_spec()), tmp_path, refuse=True, training={})
    card = json.loads((tmp_path / "policy.json").read_text())
    for name in CONSTANTS:
        del card[name]
    (tmp_path / "policy.json").write_text(json.dumps(card))
    assert LearnedPolicy(tmp_path).constants == Constants()


def test_every_decision_says_the_selectivity_at_its_price(exported, tmp_path):
    layers, by_price = policy_layers(exported[0].policy), Constants(selectivity=(0.2, 0.8))
    export_policy(layers, Schema.of(toy_spec()), tmp_path, refuse=True, training={}, constants=by_price)
    low, high = by_price.miss_price
    for knobs, expected in (({"miss_price": low}, 0.2), ({"miss_price": high}, 0.8), ({"selectivity": 0.0}, 0.0)):
        policy = LearnedPolicy(tmp_path, **knobs)
        policy.reset(toy_spec())
        decision = policy.decide(SimFleet(toy_spec(), poisson_workload(20.0, 60.0, 0), seed=0).observe())
        assert decision.selectivities.tolist() == pytest.approx([expected])
        assert policy.selectivity == pytest.approx(expected)


def test_sweep_stays_in_the_range_that_policies_are_trained_on():
    assert LearnedPolicy.KNOB is not None
    low, high = LearnedPolicy.KNOB.sweep[0], LearnedPolicy.KNOB.sweep[-1]
    assert PRICE_RANGE[0] <= low < high <= PRICE_RANGE[1]
