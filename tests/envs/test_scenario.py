"""Scenarios: mistakes are told in one line; the shipped ones build; rules and a learned policy run a slice of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rl_autoscale.agents.export import export_policy
from rl_autoscale.agents.registry import POLICIES
from rl_autoscale.envs.scenario import Scenario, load_scenario, shipped_scenario_names
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.episodes import policy_for, run_episode
from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.workload.store import TraceStore

SHIPPED = (
    "azure-code", "azure-conversation", "burstgpt-week", "bursty", "chatbot", "chiron", "chiron-deadlines",
    "chiron-interactive", "coder", "cold-start-15s", "cold-start-1s", "cold-start-300s", "cold-start-600s",
    "cold-start-60s", "disaggregated", "diurnal", "heterogeneous", "mixed-apps", "model-swapping", "mooncake",
    "multi-tenant", "non-linear-load", "real-time", "reasoning", "servegen-week", "sudden-burst", "summariser",
    "tool-calls", "very-large-model",
)  # fmt: skip
SLICE_S = {"azure-code": 60.0, "coder": 60.0}
"""Their traffic begins with silence."""
GOOD: dict[str, Any] = {
    "name": "good",
    "description": "A scenario.",
    "fleet": {
        "pools": [{"name": "a100", "profile": "llama-3.1-8b_a100_tp1"}],
        "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}],
    },
    "train": [
        {"name": "p", "workload": {"streams": [{"generator": {"kind": "poisson", "rate_per_s": 5}, "lengths": "bwb"}]}}
    ],
    "test": {"span_s": 60, "streams": [{"generator": {"kind": "poisson", "rate_per_s": 5}, "lengths": "bwb"}]},
}


@pytest.fixture(scope="module")
def store() -> TraceStore:
    """Traces from nowhere: what cannot be found is replaced by its fitted stand-in, so no test needs data."""
    return TraceStore(download=False, environment={})


@pytest.fixture(scope="module")
def random_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Schema], Path]:
    """A policy of random weights for a schema, exported; one folder for all scenarios of a schema."""
    pytest.importorskip("onnx")
    exported: dict[str, Path] = {}

    def make(schema: Schema) -> Path:
        if schema.digest not in exported:
            exported[schema.digest] = folder = tmp_path_factory.mktemp("policy")
            rng, widths = np.random.default_rng(0), (len(schema.features), 16, len(schema.actions))
            layers = [
                (rng.normal(0.0, 0.3, (wide, before)).astype(np.float32), np.zeros(wide, dtype=np.float32))
                for before, wide in pairwise(widths)
            ]
            export_policy(layers, schema, folder, refuse=True, training={})
        return exported[schema.digest]

    return make


def changed(where: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    data: Any = deepcopy(GOOD)
    place = data
    for part in where[:-1]:
        place = place[part]
    place[where[-1]] = value
    return dict(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(("trian",), 1), r"unknown key 'trian' in Scenario; did you mean 'train'"),
        (
            changed(("fleet", "pools", 0, "max_replica"), 3),
            r"fleet.pools.0: unknown key 'max_replica'.*did you mean 'max_replicas'",
        ),
        (changed(("test", "streams", 0, "generator", "rate_per_s"), -2), r"rate_per_s: must be greater than 0"),
        (changed(("test", "streams", 0, "class"), "chta"), r"test names class chta; the fleet has chat"),
        (changed(("episode_s",), 5), r"episode_s=5 is shorter than one control interval of 10 s"),
        (changed(("episode_s",), float("nan")), r"episode_s"),
        (changed(("train",), []), r"train"),
        (changed(("name",), "Not A Name"), r"name"),
        (changed(("train",), [GOOD["train"][0]] * 2), r"names of training sources must differ; repeated: p"),
        (changed(("train_randomisation",), {"speed": 0}), r"train_randomisation.speed: must be greater than 0"),
    ],
)
def test_mistakes_are_named(data: Mapping[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        Scenario.from_dict(data, where="mine.yaml")
    assert str(caught.value).startswith("mine.yaml: ")
    assert "\n" not in str(caught.value)


def test_loading_by_name_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert load_scenario(path).name == "good"
    assert load_scenario("bursty").name == "bursty"
    with pytest.raises(UnknownNameError, match="unknown scenario 'busty'; did you mean 'bursty'"):
        load_scenario("busty")
    with pytest.raises(SpecError, match="no such file"):
        load_scenario(tmp_path / "gone.yaml")
    path.write_text("a: [")
    with pytest.raises(SpecError, match="not valid YAML"):
        load_scenario(path)


def test_a_seed_decides_everything_and_splits_share_nothing(store: TraceStore) -> None:
    scenario = Scenario.from_dict(GOOD)
    once, again = scenario.build_test(3, store).workload, scenario.build_test(3, store).workload
    np.testing.assert_array_equal(once.arrival_s, again.arrival_s)
    np.testing.assert_array_equal(once.output_tokens, again.output_tokens)
    other = scenario.build_test(4, store).workload
    train = scenario.build_train(3, store, span_s=60).workload
    assert not np.isin(once.arrival_s, other.arrival_s).any()
    assert not np.isin(once.arrival_s, train.arrival_s).any()
    assert scenario.draw_randomisation(3) == (1.0, 1.0)


def test_training_sources_are_drawn_by_weight(store: TraceStore) -> None:
    rare, common = ({"kind": "poisson", "rate_per_s": rate} for rate in (1.0, 20.0))
    sources = [
        {"name": name, "weight": weight, "workload": {"streams": [{"generator": spec, "lengths": "bwb"}]}}
        for name, weight, spec in (("rare", 1, rare), ("common", 4, common))
    ]
    scenario = Scenario.from_dict(GOOD | {"train": sources})
    rates = [scenario.build_train(seed, store, span_s=60).workload.num_requests / 60 for seed in range(200)]
    assert 0.7 < np.mean(np.array(rates) > 10) < 0.9


def test_the_shipped_ones_are_these() -> None:
    assert tuple(shipped_scenario_names()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_scenario_builds_train_and_test(name: str, store: TraceStore) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert len(scenario.description) > 200
    test = scenario.build_test(0, store)
    assert test.workload.class_names == scenario.fleet.class_names
    train = scenario.build_train(0, store)
    assert train.workload.span_s == pytest.approx(scenario.episode_s, rel=0.05)
    speed, startup_scale = scenario.draw_randomisation(0)
    assert 0.8 <= speed <= 1.25
    assert 0.5 <= startup_scale <= 2.0


def runs_a_slice(name: str, store: TraceStore, policies: Mapping[str, dict[str, Any]]) -> None:
    scenario = load_scenario(name)
    workload = scenario.build_test(0, store, span_s=SLICE_S.get(name, 20.0)).workload
    for policy, knobs in policies.items():
        result = run_episode(scenario, workload, policy_for(policy, knobs, workload), seed=0)
        assert result.num_arrived == workload.num_requests, policy
        assert sum(result.outcomes.values()) == workload.num_requests, policy
        assert result.gpu_hours > 0, policy


@pytest.mark.parametrize("name", SHIPPED)
def test_every_rule_runs_a_slice_of_every_scenario(name: str, store: TraceStore) -> None:
    runs_a_slice(name, store, {policy: {"admission": 1.0} for policy in POLICIES if policy != "learned"})


@pytest.mark.parametrize("name", SHIPPED)
def test_a_learned_policy_runs_a_slice_of_every_scenario(
    name: str, store: TraceStore, random_policy: Callable[[Schema], Path]
) -> None:
    path = str(random_policy(Schema.of(load_scenario(name).fleet)))
    runs_a_slice(name, store, {"learned": {"path": path}})
    runs_a_slice(name, store, {"learned": {"path": path, "attainment": 0.98, "admission": float("inf")}})


@pytest.mark.parametrize("name", ["azure-conversation", "azure-code"])
def test_test_part_of_a_trace_is_never_trained_on(name: str, real_traces: Path) -> None:
    scenario = load_scenario(name)
    held_out = scenario.test.streams[0].slice_s
    assert held_out is not None
    slices = [item.slice_s for source in scenario.train for item in source.workload.streams if item.trace is not None]
    assert slices
    assert all(part is not None and part[1] <= held_out[0] for part in slices)
    built = scenario.build_test(0, TraceStore([real_traces], download=False))
    assert built.notes == ()
    assert built.workload.num_requests > 100_000
