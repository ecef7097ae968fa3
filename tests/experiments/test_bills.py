"""What policies cost their owner: the same episodes for all, priced alike, and no more in memory than fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from rl_autoscale.agents.export import Layer, export_policy
from rl_autoscale.envs.constants import Constants
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.sampler import HistorySampler, ScenarioSampler
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.bills import MOST_FLEETS, PricedEpisodes, compare_policies, mean_changes, prices_of
from rl_autoscale.fleet.errors import PolicyFileError, SpecError
from rl_autoscale.workload.store import TraceStore

pytest.importorskip("onnx")


def same_action(scenario: Scenario, floor: float) -> list[Layer]:
    """A policy that is neutral but for its floor."""
    schema = Schema.of(scenario.fleet)
    bias = np.zeros(len(schema.actions), dtype=np.float32)
    bias[[name.endswith(".floor") for name in schema.actions]] = floor
    return [(np.zeros((len(bias), len(schema.features)), dtype=np.float32), bias)]


def exported(scenario: Scenario, floor: float, folder: Path) -> str:
    layers, schema = same_action(scenario, floor), Schema.of(scenario.fleet)
    export_policy(layers, schema, folder, refuse=True, training={}, miss_price_range=(1.0, 600.0))
    return str(folder)


def test_no_more_fleets_than_memory_holds_play_at_a_time(tiny_scenario: Path) -> None:
    scenario = load_scenario(tiny_scenario)
    made: list[int] = []

    def counted(sampler: ScenarioSampler, num_fleets: int) -> FleetMdp:
        made.append(num_fleets)
        return FleetMdp(scenario.fleet, scenario.shield, sampler, num_fleets=num_fleets)

    sampler, prices = ScenarioSampler(scenario, TraceStore(), num_workloads=100), prices_of((1.0, 600.0))
    bills = PricedEpisodes(counted, sampler, prices, MOST_FLEETS).bills(same_action(scenario, 0.0), seed=1)
    assert made == [MOST_FLEETS] * len(prices)
    assert len(set(bills.tolist())) == len(prices)
    assert bills[-1] > bills[0]


def test_all_policies_meet_the_same_episodes(tiny_scenario: Path, tmp_path: Path) -> None:
    """Twice the peak is held at the floor of 1: dearer where misses are cheap."""
    scenario = load_scenario(tiny_scenario)
    lean, large = exported(scenario, -1.0, tmp_path / "lean"), exported(scenario, 1.0, tmp_path / "large")
    told = []
    prices, found = compare_policies(
        [lean, large, lean], [scenario], TraceStore(), episodes=3, seed=4, report=told.append
    )
    assert told == found
    assert prices.tolist() == pytest.approx(np.geomspace(1.0, 600.0, 7))
    assert found[0].bills[0].tolist() == found[0].bills[2].tolist()
    change = mean_changes(found)
    assert change[0].tolist() == change[2].tolist() == [0.0] * 7
    assert change[1, 0] > 0.2
    assert change[1].tolist() == pytest.approx(found[0].bills[1] / found[0].bills[0] - 1.0)


def test_a_policy_of_another_fleet_is_refused(tiny_scenario: Path, tmp_path: Path) -> None:
    policy = exported(load_scenario(tiny_scenario), 0.0, tmp_path / "one")
    with pytest.raises(PolicyFileError, match="trained for schema"):
        compare_policies([policy], [load_scenario("chiron")], TraceStore(), episodes=1, seed=0)


def test_without_validation_traffic_nothing_is_judged(tiny_scenario: Path, tmp_path: Path) -> None:
    scenario = load_scenario(tiny_scenario)
    policy = exported(scenario, 0.0, tmp_path / "one")
    traced = scenario.model_copy(update={"train": scenario.train[:0]})
    with pytest.raises(SpecError, match="no validation traffic: tiny"):
        compare_policies([policy], [traced], TraceStore(), episodes=1, seed=0)


def test_on_record_a_fleet_begins_with_what_its_file_says(tiny_scenario: Path, tmp_path: Path) -> None:
    """Who keeps all that is found pays for a fleet that is far too large, and for that alone."""
    scenario = load_scenario(tiny_scenario)
    layers, schema = same_action(scenario, -1.0), Schema.of(scenario.fleet)
    policies = [tmp_path / "gives-back", tmp_path / "keeps"]
    for folder, share in zip(policies, (0.0, 1.0), strict=True):
        export_policy(layers, schema, folder, refuse=True, training={}, constants=Constants(found_share=share))
    paid = {}
    for initial in (1, scenario.fleet.pools[0].max_replicas):
        pool = scenario.fleet.pools[0].model_copy(update={"initial_replicas": initial})
        found = scenario.model_copy(update={"fleet": scenario.fleet.model_copy(update={"pools": (pool,)})})
        _, (item,) = compare_policies(list(map(str, policies)), [found], TraceStore(), episodes=2, seed=3, history=True)
        paid[initial] = item.bills[:, 0]
    assert paid[1][0] == pytest.approx(paid[1][1], rel=0.05)
    most = scenario.fleet.pools[0].max_replicas
    assert paid[most][1] > 1.5 * paid[most][0]


def test_a_record_that_a_generator_stands_in_for_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RL_AUTOSCALE_TRACES", raising=False)
    monkeypatch.setattr("rl_autoscale.experiments.bills.HISTORY_SPAN_S", 60.0)
    scenario = load_scenario("azure-conversation")
    policy = exported(scenario, 0.0, tmp_path / "one")
    _, (item,) = compare_policies([policy], [scenario], TraceStore(), episodes=1, seed=0, history=True)
    assert any("azure2023_conv" in note and "generator" in note for note in item.notes)


def test_without_a_history_nothing_is_judged(tmp_path: Path) -> None:
    scenario = load_scenario("azure-conversation")
    policy = exported(scenario, 0.0, tmp_path / "one")
    whole = scenario.test.model_copy(
        update={"streams": (scenario.test.streams[0].model_copy(update={"slice_s": None}),)}
    )
    item = scenario.model_copy(update={"test": whole})
    with pytest.raises(SpecError, match=r"no history: azure-conversation; .* give them a later slice_s"):
        compare_policies([policy], [item], TraceStore(), episodes=1, seed=0, history=True)


def test_one_price_is_one_price() -> None:
    assert prices_of((20.0, 20.0)).tolist() == [20.0]


def a_past_with_requests_until(end_s: float, tiny_scenario: Path, folder: Path) -> Scenario:
    """The test begins after two hours; before it there is traffic for a while, if any, and then none."""
    times = [*(0.2 * k for k in range(int(5 * end_s))), *(7200.0 + 0.2 * k for k in range(100))]
    path = folder / "nights.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{time},500,50\n" for time in times))
    given = yaml.safe_load(tiny_scenario.read_text())
    given["test"]["streams"] = [{"trace": str(path), "slice_s": [7200, 7220]}]
    tiny_scenario.write_text(yaml.safe_dump(given))
    return load_scenario(tiny_scenario)


def test_of_a_past_with_silent_nights_windows_with_traffic_are_played(tiny_scenario: Path, tmp_path: Path) -> None:
    scenario = a_past_with_requests_until(1200.0, tiny_scenario, tmp_path)
    sampler = HistorySampler(scenario, TraceStore(), span_s=1800.0)
    drawn = [sampler(seed).workload for seed in range(5)]
    assert all(workload.num_requests > 0 for workload in drawn)
    assert np.array_equal(sampler(3).workload.arrival_s, drawn[3].arrival_s)


def test_a_past_without_any_traffic_says_what_to_do(tiny_scenario: Path, tmp_path: Path) -> None:
    scenario = a_past_with_requests_until(0.0, tiny_scenario, tmp_path)
    with pytest.raises(SpecError, match=r"the fleet's past: .*no requests arrive .* begin the test's slice_s where"):
        HistorySampler(scenario, TraceStore(), span_s=1800.0)(0)
