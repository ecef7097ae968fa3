"""Offsets after PPO: found where they pay, left out where they do not, and exact once they are in the network."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import yaml

from rl_autoscale.agents.export import Layer, forward
from rl_autoscale.envs.constants import CONSTANTS, Constants
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.observation import price_feature
from rl_autoscale.envs.sampler import ScenarioSampler
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.bills import PricedEpisodes
from rl_autoscale.experiments.offset_search import (
    FIRST_STEPS,
    FIXED_FLEETS,
    LEAST_GAIN,
    Offsets,
    OffsetSearchConfig,
    SearchProgress,
    choose_steps,
    joint_steps,
    moved_by,
    search_offsets,
    traffic_weights,
    with_offsets,
)
from rl_autoscale.experiments.train import check_training, train
from rl_autoscale.experiments.train_config import TrainConfig, with_what_it_starts_from
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.store import TraceStore

PRICES = np.geomspace(2.0, 600.0, 7)


def random_layers(num_features: int, num_actions: int, hidden: tuple[int, ...], seed: int = 0) -> list[Layer]:
    rng = np.random.default_rng(seed)
    sizes = (num_features, *hidden, num_actions)
    return [
        (0.1 * rng.standard_normal((out, into)).astype(np.float32), 0.1 * rng.standard_normal(out).astype(np.float32))
        for into, out in pairwise(sizes)
    ]


def observations(count: int, num_features: int, price: float, column: int) -> npt.NDArray[np.float32]:
    found = np.random.default_rng(1).standard_normal((count, num_features)).astype(np.float32)
    found[:, column] = price_feature(price)
    return found


@pytest.mark.parametrize("hidden", [(16,), (16, 12), (8, 8, 8)])
def test_the_network_adds_each_offset_at_its_price_whatever_else_it_sees(hidden: tuple[int, ...]) -> None:
    layers = random_layers(5, 3, hidden)
    offsets = 0.3 * np.random.default_rng(2).standard_normal((7, 3))
    widened = with_offsets(layers, Offsets(PRICES, offsets, np.zeros(7), 0), 2)
    assert [len(bias) for _, bias in widened] == [*(size + 6 for size in hidden), 3]
    assert all(weight.dtype == bias.dtype == np.float32 for weight, bias in widened)
    for price, offset in zip(PRICES, offsets, strict=True):
        seen = observations(9, 5, float(price), 2)
        assert forward(widened, seen) - forward(layers, seen) == pytest.approx(np.tile(offset, (9, 1)), abs=1e-4)


def test_between_two_prices_an_offset_lies_between_theirs() -> None:
    layers = random_layers(5, 1, (16, 16))
    offsets = np.array([-0.4, -0.4, 0.0, 0.4, 0.8, 0.8, 0.8])[:, None]
    widened = with_offsets(layers, Offsets(PRICES, offsets, np.zeros(7), 0), 0)
    between = np.sqrt(PRICES[1:] * PRICES[:-1])
    for price, low, high in zip(between, offsets[:-1, 0], offsets[1:, 0], strict=True):
        seen = observations(1, 5, float(price), 0)
        added = float((forward(widened, seen) - forward(layers, seen))[0, 0])
        assert low - 0.1 <= added <= high + 0.1


def test_one_price_needs_no_unit() -> None:
    layers = random_layers(5, 2, (16,))
    moved = with_offsets(layers, Offsets(np.array([20.0]), np.array([[0.1, -0.2]]), np.zeros(1), 0), 0)
    seen = observations(4, 5, 20.0, 0)
    assert forward(moved, seen) - forward(layers, seen) == pytest.approx(np.tile([0.1, -0.2], (4, 1)), abs=1e-6)


def test_where_nothing_was_found_the_network_stays_as_it_is() -> None:
    layers = random_layers(5, 2, (16, 16))
    assert with_offsets(layers, Offsets(PRICES, np.zeros((7, 2)), np.zeros(7), 0), 0) is layers


def test_a_step_is_kept_at_the_prices_where_it_gains_and_not_for_noise() -> None:
    bills = np.ones((3, 4, 5))
    bills[1, :, 3:] = 0.9  # the second trial pays at the two dearest prices
    bills[2, :, 0] = 1.0 - LEAST_GAIN / 2.0  # the third gains less than counts
    assert choose_steps(bills, traffic_weights(4, 0)).tolist() == [0, 0, 1, 1, 1]


def test_what_is_the_same_at_all_prices_is_kept_for_what_it_gains_over_all() -> None:
    bills = np.ones((3, 4, 5))
    bills[1, :, 3:] = 0.9, 0.9
    bills[1, :, 0] = 1.1
    bills[2, :, 0] = 0.5
    bills[2, :, 1:] = 1.3
    assert choose_steps(bills, traffic_weights(4, 0), together=True).tolist() == [1] * 5
    assert choose_steps(bills[[0, 2]], traffic_weights(4, 0), together=True).tolist() == [0] * 5


def test_scenarios_count_alike_however_large_their_bills_are() -> None:
    bills = np.ones((2, 2, 3))
    bills[:, 0] *= 1000.0
    bills[1, 0] *= 0.97
    bills[1, 1] *= 1.05
    assert choose_steps(bills, traffic_weights(2, 0)).tolist() == [0, 0, 0]


def test_a_fleets_past_outweighs_its_training_traffic() -> None:
    assert traffic_weights(2, 0).tolist() == [0.5, 0.5]
    assert traffic_weights(1, 1).tolist() == [0.25, 0.75]
    assert traffic_weights(2, 1).sum() == 1.0
    bills = np.ones((2, 2, 3))
    bills[1] = np.array([1.2, 0.9])[:, None]  # a fifth dearer in training, a tenth cheaper on the past
    assert choose_steps(bills, traffic_weights(1, 1)).tolist() == [1, 1, 1]
    assert choose_steps(bills, traffic_weights(2, 0)).tolist() == [0, 0, 0]


def runs_of_a_round(scenario: Scenario) -> int:
    """At most: two of the policy as it is, and for each constant and action one per step and one that confirms."""
    kinds = [*CONSTANTS, *(name.split(".")[-1] for name in Schema.of(scenario.fleet).actions)]
    return 2 + len(FIXED_FLEETS) + 1 + sum(len(FIRST_STEPS[kind]) + 1 for kind in kinds)


def untrained(scenario: Scenario, floor: float, headroom: float = 0.0) -> list[Layer]:
    """A policy that always does the same: neutral, but for its floor and headroom."""
    schema = Schema.of(scenario.fleet)
    bias = np.zeros(len(schema.actions), dtype=np.float32)
    bias[[name.endswith(".floor") for name in schema.actions]] = floor
    bias[[name.endswith(".headroom") for name in schema.actions]] = headroom
    zeros = np.zeros((4, len(schema.features)), dtype=np.float32)
    return [(zeros, np.zeros(4, dtype=np.float32)), (np.zeros((len(bias), 4), dtype=np.float32), bias)]


def make_mdp(scenario: Scenario, sampler: ScenarioSampler, num_fleets: int) -> FleetMdp:
    return FleetMdp(scenario.fleet, scenario.shield, sampler, num_fleets=num_fleets)


def test_a_policy_that_wastes_is_cut_where_misses_are_cheap(tiny_scenario: Path) -> None:
    scenario = load_scenario(tiny_scenario)
    ran: list[SearchProgress] = []
    search = partial(
        search_offsets,
        scenarios=[scenario],
        store=TraceStore(),
        make_mdp=make_mdp,
        constants=Constants(miss_price=(1.0, 600.0)),
        seed=0,
    )
    wasteful = untrained(scenario, 1.0)
    found = search(wasteful, config=OffsetSearchConfig(rounds=1, episodes=4), progress=ran.append)
    floor = [name.endswith(".floor") for name in Schema.of(scenario.fleet).actions].index(True)
    assert found.offsets[0, floor] < 0.0
    assert found.change[0] < -LEAST_GAIN
    assert (found.change <= 1e-12).all()
    most_runs = runs_of_a_round(scenario)
    assert ran == [SearchProgress(k, most_runs) for k in range(1, len(ran) + 1)]
    assert most_runs - len(FIRST_STEPS) <= len(ran) <= most_runs
    again = search(wasteful, config=OffsetSearchConfig(rounds=1, episodes=4))
    assert (again.offsets == found.offsets).all()
    assert again.num_steps == found.num_steps > 0


def test_moves_of_several_things_find_what_moves_of_one_do(tiny_scenario: Path) -> None:
    scenario = load_scenario(tiny_scenario)
    ran: list[SearchProgress] = []
    found = search_offsets(
        untrained(scenario, 1.0),
        [scenario],
        TraceStore(),
        make_mdp,
        Constants(miss_price=(1.0, 600.0)),
        OffsetSearchConfig(rounds=0, joint_moves=12, episodes=4),
        seed=0,
        progress=ran.append,
    )
    assert len(ran) <= ran[0].most_runs == 2 + 2 * 12
    assert found.change[0] < -0.1  # the wasteful floor falls where misses are cheap
    assert (found.change <= 1e-12).all()
    assert np.count_nonzero(found.offsets[0]) > 1


def test_joint_moves_leave_alone_what_is_the_same_at_all_prices_and_become_smaller() -> None:
    names = ("cap_share", "selectivity", "least_replicas", "pool0.mixed.floor")
    steps = joint_steps(names, 5.0, 400, seed=0)
    assert steps.shape == (400, 4)
    assert not steps[:, :2].any()
    assert steps[:, 2].std() > 5.0 * steps[:, 3].std()
    assert np.abs(steps[:50]).mean() > 2.0 * np.abs(steps[-50:]).mean() > 0.0
    assert joint_steps(names, 5.0, 0, seed=0).shape == (0, 4)


def test_a_cap_that_is_far_too_small_is_raised(tiny_scenario: Path) -> None:
    scenario = load_scenario(tiny_scenario)
    tight = Constants(cap_share=0.02, miss_price=(1.0, 600.0))
    config = OffsetSearchConfig(rounds=1, episodes=2)
    found = search_offsets(untrained(scenario, 0.0), [scenario], TraceStore(), make_mdp, tight, config, seed=0)
    assert found.constants.cap_share == pytest.approx(0.02 * 2.0**0.5, abs=1e-4)
    assert found.change.mean() < -LEAST_GAIN


def test_a_fleet_keeps_what_its_load_needs_where_misses_are_dear(
    tiny_scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl_autoscale.envs.sampler.INITIAL_HEADROOM", (0.2, 0.3))  # else what is found will do
    given = yaml.safe_load(tiny_scenario.read_text())
    given["train"][0]["workload"]["streams"][0]["generator"]["rate_per_s"] = {"low": 15, "high": 45}
    tiny_scenario.write_text(yaml.safe_dump(given))
    scenario = load_scenario(tiny_scenario)
    lean = untrained(scenario, -1.0, -1.0)
    config = OffsetSearchConfig(rounds=1, episodes=4)
    search = partial(search_offsets, lean, store=TraceStore(), make_mdp=make_mdp, config=config, seed=0)
    constants = Constants(miss_price=(1.0, 600.0))
    found = search([scenario], constants=constants).constants.least_replicas
    assert isinstance(found, tuple)
    assert found[0] < found[-1]
    assert found[-1] > 1.0
    together = search([scenario, scenario], constants=constants)
    assert together.constants.least_replicas == 0.0  # no number of replicas fits two fleets


def test_what_only_its_past_tells_of_a_fleet_counts_where_it_is_adapted_to_it(
    tiny_scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training little is to do; its own past begins with one replica, and has more."""
    monkeypatch.setattr("rl_autoscale.experiments.offset_search.HISTORY_SPAN_S", 120.0)
    given = yaml.safe_load(tiny_scenario.read_text())
    given["train"][0]["workload"]["streams"][0]["generator"]["rate_per_s"] = 20
    given["test"]["streams"][0]["generator"]["rate_per_s"] = 50
    given["fleet"]["pools"][0]["initial_replicas"] = 1
    tiny_scenario.write_text(yaml.safe_dump(given))
    scenario = load_scenario(tiny_scenario)
    found = {}
    for history in (False, True):
        config = OffsetSearchConfig(rounds=1, episodes=2, history=history)
        constants = Constants(miss_price=(1.0, 600.0))
        policy = untrained(scenario, -1.0, -1.0)
        found[history] = search_offsets(policy, [scenario], TraceStore(), make_mdp, constants, config, seed=0)
    least = {history: np.max(one.constants.least_replicas) for history, one in found.items()}
    assert least[True] > 1.5 * least[False]
    assert found[True].num_steps > found[False].num_steps


def test_no_more_than_all_that_was_found_is_kept() -> None:
    prices = np.array([1.0, 10.0])
    constants = Constants(found_share=(0.0, 0.5), miss_price=(1.0, 10.0))
    moved = moved_by(constants, {"found_share": np.array([-0.3, 0.9])}, prices)
    assert moved.found_share == (0.0, 1.0)


def test_training_searches_writes_down_what_it_found_and_can_search_alone(tiny_scenario: Path, tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    from rl_autoscale.agents.policy_file import read_card
    from rl_autoscale.agents.ppo import PpoConfig

    scenario = load_scenario(tiny_scenario)
    ppo = PpoConfig(
        total_timesteps=128, num_fleets=2, num_threads=1, rollout_steps=32, minibatch_size=32, num_epochs=1,
        hidden_sizes=(8, 8),
    )  # fmt: skip
    search = OffsetSearchConfig(rounds=1, episodes=1)
    config = TrainConfig(scenarios=(str(tiny_scenario),), ppo=ppo, num_workloads=2, offset_search=search)
    told: list[object] = []
    trained = train(config, [scenario], TraceStore(), tmp_path / "trained", report=told.append)
    card = read_card(trained.policy_folder)["training"]
    assert set(card["offset_search"]["offsets"]) == set(Schema.of(scenario.fleet).actions)
    assert card["offset_search"]["timesteps"] > 0
    whole = read_card(trained.policy_folder)
    assert card["offset_search"]["constants"] == {name: whole[name] for name in CONSTANTS}
    most_runs = runs_of_a_round(scenario)
    assert SearchProgress(1, most_runs) in told
    asked = PpoConfig.model_validate({"total_timesteps": 0, "num_fleets": 2, "num_threads": 1})
    alone = with_what_it_starts_from(
        TrainConfig(
            scenarios=(str(tiny_scenario),), ppo=asked, num_workloads=2, offset_search=search,
            start_from=(str(trained.policy_folder),), miss_price=(2.0, 20.0),
        )
    )  # fmt: skip
    found = any(any(values) for values in card["offset_search"]["offsets"].values())
    size = 14 if found else 8  # wider by a unit per gap between two prices
    assert alone.ppo.hidden_sizes == (size, size)
    searched = read_card(train(alone, [scenario], TraceStore(), tmp_path / "alone").policy_folder)["training"]
    assert searched["timesteps"] == card["timesteps"] == 128
    assert searched["envelope"].keys() == card["envelope"].keys()
    assert searched["envelope"]["miss_price"][1] < card["envelope"]["miss_price"][1]  # measured anew


def test_no_steps_and_nothing_to_start_from_is_refused(tiny_scenario: Path, tmp_path: Path) -> None:
    config = TrainConfig.from_dict({"ppo": {"total_timesteps": 0}})
    with pytest.raises(SpecError, match="total_timesteps=0 trains nothing; give more steps, or a policy to start_from"):
        check_training(config, [load_scenario(tiny_scenario)], tmp_path)


def test_an_episode_in_which_nothing_arrives_costs_its_gpu_time(
    tiny_scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = load_scenario(tiny_scenario)
    nothing = {"cost_over_ideal": 2.0, "put_off_over_ideal": 0.0, "weighted_misses": float("nan")}
    monkeypatch.setattr(FleetMdp, "books", lambda *_: nothing)
    sampler = ScenarioSampler(scenario, TraceStore(), num_workloads=2)
    episodes = PricedEpisodes(partial(make_mdp, scenario), sampler, np.array([2.0, 60.0]), 1)
    assert episodes.bills(untrained(scenario, 0.0), seed=0).tolist() == [2.0, 2.0]
