"""Whether an adapted policy is to be run: both kinds of traffic have a say, and having none is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl_autoscale.agents.export import Layer, export_policy
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.adapting import Change, Verdict, judge_adapted
from rl_autoscale.workload.store import TraceStore

pytest.importorskip("onnx")


@pytest.fixture
def scenario(tiny_scenario: Path, monkeypatch: pytest.MonkeyPatch) -> Scenario:
    monkeypatch.setattr("rl_autoscale.experiments.adapting.EPISODES", {"validation": 2, "history": 1})
    return load_scenario(tiny_scenario)


def exported(scenario: Scenario, floor: float, folder: Path) -> Path:
    """A policy that is neutral but for its floor."""
    schema = Schema.of(scenario.fleet)
    bias = np.zeros(len(schema.actions), dtype=np.float32)
    bias[[name.endswith(".floor") for name in schema.actions]] = floor
    layers: list[Layer] = [(np.zeros((len(bias), len(schema.features)), dtype=np.float32), bias)]
    export_policy(layers, schema, folder, refuse=True, training={}, miss_price_range=(1.0, 2.0))
    return folder


def test_the_cheaper_of_the_two_is_to_be_run(scenario: Scenario, tmp_path: Path) -> None:
    """Twice the peak for nothing, at prices at which a miss is worth next to nothing."""
    lean, large = exported(scenario, -1.0, tmp_path / "lean"), exported(scenario, 1.0, tmp_path / "large")
    told: list[str] = []
    grown = judge_adapted(large, str(lean), [scenario], TraceStore(), report=told.append)
    assert [text.split(" on ")[1] for text in told] == ["validation traffic ...", "the fleet's own past ..."]
    assert set(grown.changes) == {"validation", "history"}
    assert all(change.mean > 0.2 for change in grown.changes.values())
    assert not grown.keep
    assert grown.in_words().endswith(f"; run {lean}")
    shrunk = judge_adapted(lean, str(large), [scenario], TraceStore())
    assert shrunk.keep
    assert shrunk.in_words().endswith(f"; run {lean}")
    for name, change in shrunk.changes.items():  # the same episodes
        assert (1.0 + change.by_price) * (1.0 + grown.changes[name].by_price) == pytest.approx(1.0)


def test_what_changes_nothing_is_not_worth_a_new_policy(scenario: Scenario, tmp_path: Path) -> None:
    one, same = exported(scenario, 0.0, tmp_path / "one"), exported(scenario, 0.0, tmp_path / "same")
    verdict = judge_adapted(same, str(one), [scenario], TraceStore())
    assert (verdict.keep, verdict.changes["history"].mean) == (False, 0.0)


@pytest.mark.parametrize(
    ("validation", "history", "keep"),
    [(0.05, -0.1, True), (-0.3, 0.01, False), (0.6, -0.05, False), (None, -0.1, True), (-0.1, None, True)],
)
def test_the_past_weighs_more_than_what_may_come(validation: float | None, history: float | None, keep: bool) -> None:
    changes = {
        name: Change(np.ones(2), np.full(2, change), ())
        for name, change in (("validation", validation), ("history", history))
        if change is not None
    }
    assert Verdict("a", "b", changes).keep is keep


def test_where_there_is_no_traffic_to_judge_by_it_says_so(scenario: Scenario, tmp_path: Path) -> None:
    policy = exported(scenario, 0.0, tmp_path / "one")
    from_the_start = tuple(stream.model_copy(update={"slice_s": None}) for stream in scenario.test.streams)
    unknown = scenario.model_copy(
        update={
            "train": scenario.train[:0],
            "test": scenario.test.model_copy(update={"streams": from_the_start}),
        }
    )
    assert unknown.history is not None  # of generators there is always another draw
    verdict = judge_adapted(policy, str(policy), [unknown], TraceStore())
    assert set(verdict.changes) == {"history"}
    nothing = Verdict("a", "b", {})
    assert nothing.keep is None
    assert nothing.in_words().startswith("nothing tells whether it is better than a: ")
    assert nothing.to_dict() == {"start": "a", "keep": None}


def test_one_of_the_two_is_not_enough() -> None:
    prices = np.array([2.0, 60.0])
    better, worse = (Change(prices, np.array(by_price), ("told",)) for by_price in ([-0.5, 0.5], [0.01, 0.01]))
    assert better.mean == pytest.approx(np.sqrt(0.75) - 1.0)
    verdict = Verdict("pretrained/x", "mine", {"validation": better, "history": worse})
    assert not verdict.keep
    assert verdict.in_words() == (
        "its bill against pretrained/x's: -13.4% on validation traffic, +1.0% on the fleet's own past; run pretrained/x"
    )
    assert verdict.notes == {"told"}
    assert verdict.to_dict()["history"] == {
        "miss_price": [2.0, 60.0], "change_of_bill": [0.01, 0.01], "mean": 0.01
    }  # fmt: skip
