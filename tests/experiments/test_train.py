"""Training's own decisions: what the dial is measured on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("stable_baselines3")

from rl_autoscale.agents.export import Layer, export_policy, forward
from rl_autoscale.agents.policy_file import read_card
from rl_autoscale.agents.ppo import PpoConfig
from rl_autoscale.agents.pretrained import pretrained_names
from rl_autoscale.envs.constants import Constants
from rl_autoscale.envs.mdp import EpisodeSampler, FleetMdp
from rl_autoscale.envs.reward import PRICE_RANGE
from rl_autoscale.envs.sampler import ScenarioSampler
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.dial import DIAL_PRICES, measure_dial
from rl_autoscale.experiments.offset_search import OffsetSearchConfig
from rl_autoscale.experiments.runs import describe_run, write_run
from rl_autoscale.experiments.seeds import finished_seed
from rl_autoscale.experiments.train import _Measured, check_training, train
from rl_autoscale.experiments.train_config import (
    ADAPTING_FAULTS,
    ADAPTING_PPO,
    ADAPTING_SEARCH,
    TrainConfig,
    first_actor,
    read_training,
    timesteps_before,
    train_on,
    with_what_it_starts_from,
)
from rl_autoscale.experiments.tuning import trained_hours
from rl_autoscale.fleet.errors import PolicyFileError, SpecError
from rl_autoscale.workload.store import TraceStore

STORE = TraceStore(download=False, environment={})


@pytest.fixture
def tiny(tiny_scenario: Path) -> Scenario:
    return load_scenario(tiny_scenario)


def random_layers(scenario: Scenario) -> list[Layer]:
    schema, rng = Schema.of(scenario.fleet), np.random.default_rng(0)
    shape = len(schema.actions), len(schema.features)
    return [(rng.normal(0.0, 0.05, shape).astype(np.float32), np.zeros(shape[0], np.float32))]


def make_mdp(scenario: Scenario, sampler: EpisodeSampler, num_fleets: int) -> FleetMdp:
    return FleetMdp(scenario.fleet, scenario.shield, sampler, num_fleets=num_fleets)


def test_the_dial_is_measured_on_validation_traffic_alone(tiny: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    randomise = Scenario.draw_randomisation

    def draw_randomisation(scenario: Scenario, seed: int, *, validation: bool = False) -> tuple[float, float]:
        drawn.append(validation)
        return randomise(scenario, seed, validation=validation)

    monkeypatch.setattr(Scenario, "build_train", lambda *_: pytest.fail("the dial was measured on training traffic"))
    monkeypatch.setattr(Scenario, "draw_randomisation", draw_randomisation)
    dial = measure_dial(random_layers(tiny), [tiny], STORE, make_mdp, (2.0, 100.0), seed=0)
    assert [point["miss_price"] for point in dial] == pytest.approx(np.geomspace(2.0, 100.0, DIAL_PRICES), abs=1e-3)
    assert all(0.0 <= point["slo_attainment"] <= 1.0 and point["cost_over_ideal"] > 0 for point in dial)
    assert drawn
    assert all(drawn)


def test_without_validation_traffic_there_is_no_dial(tiny_scenario: Path) -> None:
    trace = {"streams": [{"trace": "azure2023_conv", "slice_s": [0, 60]}]}
    data = yaml.safe_load(tiny_scenario.read_text())
    traced = Scenario.from_dict({**data, "train": [{"name": "trace", "workload": trace}]})
    assert measure_dial(random_layers(traced), [traced], STORE, make_mdp, (2.0, 100.0), seed=0) == []


def test_one_seed_is_another_episode_in_validation(tiny: Scenario) -> None:
    trained, validated = (ScenarioSampler(tiny, STORE, validation=validation)(3) for validation in (False, True))
    assert not np.isin(validated.workload.arrival_s, trained.workload.arrival_s).any()
    assert (validated.speed, validated.startup_scale) != (trained.speed, trained.startup_scale)
    assert validated.initial_headroom != trained.initial_headroom
    again = ScenarioSampler(tiny, STORE, validation=True)(3)
    np.testing.assert_array_equal(again.workload.arrival_s, validated.workload.arrival_s)


def test_a_policy_to_start_from_must_fit(tiny: Scenario, tmp_path: Path) -> None:
    policy, schema = tmp_path / "policy", Schema.of(tiny.fleet)
    rng = np.random.default_rng(0)
    sizes = (len(schema.features), 8, len(schema.actions))
    layers = [
        (rng.normal(0.0, 0.1, (b, a)).astype(np.float32), np.zeros(b, np.float32)) for a, b in itertools.pairwise(sizes)
    ]
    given = Constants(hysteresis=0.1, selectivity=0.7, cap_share=(0.5, 1.0), miss_price=(3.0, 300.0))
    export_policy(
        layers,
        schema,
        policy,
        refuse=False,
        training={},
        miss_price_range=(3.0, 300.0),
        constants=given,
    )
    config = train_on(TrainConfig(num_workloads=7, ppo=PpoConfig(seed=3, num_fleets=5)), [str(policy)])
    adapting = {**ADAPTING_PPO, "seed": 3, "num_fleets": 5, "hidden_sizes": (8,), "refuse": False, "hysteresis": 0.1}
    adapting |= {"selectivity": 0.7, "cap_share": (0.5, 1.0)}
    assert config == TrainConfig(
        num_workloads=7,
        miss_price=(3.0, 300.0),
        start_from=(str(policy),),
        ppo=PpoConfig.model_validate(adapting),
        faults=ADAPTING_FAULTS,
        offset_search=ADAPTING_SEARCH,
    )
    search = OffsetSearchConfig(rounds=3)
    assert train_on(TrainConfig(offset_search=search), [str(policy)]).offset_search == search
    check_training(config, [tiny], tmp_path / "out")
    adopted = with_what_it_starts_from(TrainConfig(start_from=(str(policy),)))
    assert (adopted.ppo.hidden_sizes, adopted.constants) == ((8,), given.over(PRICE_RANGE))
    check_training(adopted, [tiny], tmp_path / "out")
    said = TrainConfig(start_from=(str(policy),), ppo=PpoConfig(hidden_sizes=(64, 64), hysteresis=0.3))
    assert with_what_it_starts_from(said).ppo.hidden_sizes == (64, 64)
    assert with_what_it_starts_from(said).constants == replace(given.over(PRICE_RANGE), hysteresis=0.3)
    with pytest.raises(SpecError, match=r"hidden_sizes are \[8\], ppo.hidden_sizes \[64, 64\]"):
        check_training(TrainConfig(start_from=(str(policy),)), [tiny], tmp_path / "out")
    with pytest.raises(PolicyFileError, match=r"start_from=.*: trained for schema .* pools and classes"):
        check_training(config, [load_scenario("chiron")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def export_random(folder: Path, tiny: Scenario, seed: int, hidden: tuple[int, ...], **card: Any) -> list[Layer]:
    schema, rng = Schema.of(tiny.fleet), np.random.default_rng(seed)
    sizes = (len(schema.features), *hidden, len(schema.actions))
    layers = [
        (rng.normal(0.0, 0.2, (b, a)).astype(np.float32), rng.normal(0.0, 0.1, b).astype(np.float32))
        for a, b in itertools.pairwise(sizes)
    ]
    export_policy(layers, schema, folder, refuse=True, **{"training": {"timesteps": 1000 * seed}, **card})
    return layers


def test_several_policies_to_start_from_are_their_mean(tiny: Scenario, tmp_path: Path) -> None:
    folders = [str(tmp_path / str(seed)) for seed in (1, 2, 3)]
    networks = [
        export_random(Path(folder), tiny, seed, hidden)
        for folder, seed, hidden in zip(folders, (1, 2, 3), ((8, 6), (8, 6), (5, 4)), strict=True)
    ]
    config = train_on(TrainConfig(ppo=PpoConfig(total_timesteps=0)), folders)
    assert config.ppo.hidden_sizes == (21, 16)
    assert timesteps_before(config) == 6000
    actor = first_actor(config, [tiny])
    assert actor is not None
    observation = np.random.default_rng(0).normal(size=(64, len(Schema.of(tiny.fleet).features))).astype(np.float32)
    each = np.array([forward(layers, observation) for layers in networks])
    inside = (np.abs(each) < 1.0).all(axis=0)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(forward(actor, observation)[inside], each.mean(axis=0)[inside], atol=1e-6)


def test_a_mean_of_policies_of_different_kinds_is_refused(tiny: Scenario, tmp_path: Path) -> None:
    narrow = {"miss_price_range": (3.0, 60.0)}
    for name, hidden, card in (("a", (8,), {}), ("b", (8,), narrow), ("c", (8, 8), {})):
        export_random(tmp_path / name, tiny, 1, hidden, **card)
    first, other, deep = (str(tmp_path / name) for name in "abc")
    with pytest.raises(SpecError, match=r"b has miss_price_range=\(3.0, 60.0\), .*a .*; a mean needs"):
        train_on(TrainConfig(), [first, other])
    with pytest.raises(SpecError, match=r"networks with \[1, 2\] hidden layers have no mean"):
        train_on(TrainConfig(), [first, deep])


def test_the_mean_of_policies_has_the_mean_of_the_constants_that_were_found_for_them(
    tiny: Scenario, tmp_path: Path
) -> None:
    for name, hysteresis in (("a", (0.1, 0.1, 0.4)), ("b", 0.3)):
        export_random(tmp_path / name, tiny, 1, (8,), constants=Constants(hysteresis=hysteresis))
    folders = [str(tmp_path / name) for name in "ab"]
    expected = pytest.approx((0.2, 0.2, 0.35))
    assert train_on(TrainConfig(), folders).ppo.hysteresis == expected
    assert with_what_it_starts_from(TrainConfig(start_from=tuple(folders))).ppo.hysteresis == expected


def test_a_bad_constant_is_named() -> None:
    with pytest.raises(SpecError, match=r"ppo.hysteresis=-0.1 is not allowed; it must be at least 0"):
        TrainConfig.from_dict({"ppo": {"hysteresis": -0.1}})


@pytest.mark.parametrize("name", pretrained_names())
def test_the_card_of_every_shipped_policy_says_how_to_train_it(name: str) -> None:
    config = read_training(Path(f"pretrained/{name}"))
    assert config.ppo.total_timesteps > 0 or config.start_from


def small(seed: int, **changes: object) -> PpoConfig:
    asked = {"total_timesteps": 256, "num_fleets": 2, "num_threads": 1, "rollout_steps": 64, "minibatch_size": 64}
    return PpoConfig.model_validate({**asked, "num_epochs": 1, "hidden_sizes": (8,), "seed": seed, **changes})


def test_a_fresh_start_leaves_nothing_of_the_training_before(
    tiny_scenario: Path, tiny: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl_autoscale.experiments.train.measure", lambda *_: _Measured([], None, None, set()))

    def config(ppo: PpoConfig) -> TrainConfig:
        search = OffsetSearchConfig(rounds=0)
        return TrainConfig(scenarios=(str(tiny_scenario),), ppo=ppo, num_workloads=2, offset_search=search)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    first, other, out = config(small(1)), config(small(2, refuse=False, gamma=0.5)), tmp_path / "run"
    train(first, [tiny], STORE, out)
    network = (out / "policy" / "policy.onnx").read_bytes()
    with pytest.raises(KeyboardInterrupt):  # before its first checkpoint
        train(other, [tiny], STORE, out, resume=False, report=stop)
    assert finished_seed(other, out) is None
    rollouts: list[object] = []
    train(other, [tiny], STORE, out, report=rollouts.append)
    assert len(rollouts) >= 2
    assert (out / "policy" / "policy.onnx").read_bytes() != network
    train(config(small(3, total_timesteps=128)), [tiny], STORE, out, resume=False)
    assert len((out / "learning.jsonl").read_text().splitlines()) == 1


def test_a_fresh_start_does_not_empty_the_folder_that_it_starts_from(tiny: Scenario, tmp_path: Path) -> None:
    schema, out = Schema.of(tiny.fleet), tmp_path / "run"
    zeros = np.zeros((8, len(schema.features)), np.float32), np.zeros(8, np.float32)
    layers = [zeros, (np.zeros((len(schema.actions), 8), np.float32), np.zeros(len(schema.actions), np.float32))]
    export_policy(layers, schema, out / "policy", refuse=True, training={})
    config = TrainConfig(ppo=small(1), start_from=(str(out / "policy"),))
    with pytest.raises(SpecError, match=r"lies in .*run, which a fresh start empties; use another --out"):
        train(config, [tiny], STORE, out, resume=False)
    assert (out / "policy" / "policy.json").exists()


def test_steps_of_the_policy_before_do_not_pass_for_those_asked_for(
    tiny_scenario: Path, tiny: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl_autoscale.experiments.train.measure", lambda *_: _Measured([], None, None, set()))
    schema, policy = Schema.of(tiny.fleet), tmp_path / "policy"
    zeros = np.zeros((8, len(schema.features)), np.float32), np.zeros(8, np.float32)
    layers = [zeros, (np.zeros((len(schema.actions), 8), np.float32), np.zeros(len(schema.actions), np.float32))]
    known = {"timesteps": 1_000_000, "offset_search": {"timesteps": 5000}}
    export_policy(layers, schema, policy, refuse=True, training=known)
    config = TrainConfig(
        scenarios=(str(tiny_scenario),), ppo=small(1), num_workloads=2, start_from=(str(policy),),
        offset_search=OffsetSearchConfig(rounds=0),
    )  # fmt: skip
    trained = train(config, [tiny], STORE, tmp_path / "run")
    card = read_card(trained.policy_folder)["training"]
    assert card["timesteps"] == 1_000_000 + trained.timesteps
    assert card["started_from"] == [
        {"onnx_sha256": read_card(policy)["onnx_sha256"], "timesteps": 1_000_000, "config": None}
    ]
    assert trained_hours({"training": card}, 3600.0) == 1_005_000 + trained.timesteps
    assert finished_seed(config, tmp_path / "run") == trained
    longer = config.model_copy(update={"ppo": config.ppo.model_copy(update={"total_timesteps": 10_000})})
    write_run(tmp_path / "run", longer, describe_run(1))  # as an interrupted call leaves it
    assert finished_seed(longer, tmp_path / "run") is None
