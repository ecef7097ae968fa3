"""The split file is true: every scenario is in it, nothing is trained on and tested on, no draw is shared."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from rl_autoscale.envs import scenario as scenario_module
from rl_autoscale.envs.scenario import Scenario, load_scenario, shipped_scenario_names
from rl_autoscale.experiments.split import Split, load_split
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.ranges import Range
from rl_autoscale.workload.spec import StreamSpec
from rl_autoscale.workload.store import TraceStore

SPAN_S = 60.0


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split()


@pytest.fixture(scope="module")
def store() -> TraceStore:
    return TraceStore(download=False, environment={})


def test_every_scenario_is_covered_and_none_is_made_up(split: Split) -> None:
    assert sorted(split.scenarios) == shipped_scenario_names()


def test_streams_are_four_and_those_of_the_code(split: Split) -> None:
    assert split.streams == {
        "train": scenario_module._TRAIN_STREAM,
        "validation": scenario_module._VALIDATION_STREAM,
        "history": scenario_module._HISTORY_STREAM,
        "test": scenario_module._TEST_STREAM,
    }
    assert len(set(split.streams.values())) == 4


def kind(stream: StreamSpec) -> str:
    return f"trace {stream.trace}" if stream.generator is None else f"generator {stream.generator.kind}"


@pytest.mark.parametrize("name", shipped_scenario_names())
class TestScenario:
    def test_the_file_says_what_the_scenario_does(self, name: str, split: Split) -> None:
        scenario, listed = load_scenario(name), split.scenarios[name]
        assert tuple(source.name for source in scenario.train) == listed.train
        assert tuple(source.name for source in scenario.validation_sources) == listed.validation
        assert tuple(dict.fromkeys(map(kind, scenario.test.streams))) == listed.test

    def test_seconds_of_traces_stay_on_their_side(self, name: str, split: Split) -> None:
        scenario = load_scenario(name)
        trained = [item for source in scenario.train for item in source.workload.streams]
        for side, streams in (("train", trained), ("test", scenario.test.streams)):
            for item in streams:
                if item.trace is not None:
                    low, high = getattr(split.traces[item.trace], side)
                    assert item.slice_s is not None
                    assert low <= item.slice_s[0] < item.slice_s[1] <= high

    def test_history_is_over_when_the_test_begins(self, name: str) -> None:
        scenario = load_scenario(name)
        assert scenario.history is not None
        for before, tested in zip(scenario.history.streams, scenario.test.streams, strict=True):
            if tested.trace is None and getattr(tested.generator, "kind", "") == "rate_curve":
                assert before.generator.start_s == Range(low=0.0, high=tested.generator.edges_s[-1])
                same = before.generator.model_copy(update={"start_s": tested.generator.start_s})
                assert before.model_copy(update={"generator": same}) == tested
            elif tested.trace is None:
                assert before == tested
            else:
                assert tested.slice_s is not None
                assert before.slice_s == (0.0, tested.slice_s[0])
                assert before.rate_scale == tested.rate_scale

    def test_the_course_of_the_past_is_not_that_of_the_test(self, name: str) -> None:
        """Where it is written out, other noise alone would make the past a rehearsal."""
        scenario = load_scenario(name)
        if any(item.trace is not None for item in scenario.test.streams):
            return
        past, test = (
            [np.histogram(arrivals(build(seed, TraceStore(), span_s=1800.0)), 30, (0, 1800))[0] for seed in range(4)]
            for build in (scenario.build_history, scenario.build_test)
        )
        assert np.mean([np.corrcoef(one, other)[0, 1] for one in past for other in test]) < 0.5

    def test_test_generators_are_no_training_sources(self, name: str) -> None:
        scenario = load_scenario(name)
        tested = [item for item in scenario.test.streams if item.generator is not None]
        for source in scenario.train:
            assert not tested or list(source.workload.streams) != list(scenario.test.streams)
            assert all(item not in source.workload.streams for item in tested)

    def test_no_arrival_is_drawn_twice(self, name: str, store: TraceStore) -> None:
        scenario = load_scenario(name)
        builds = (scenario.build_train, scenario.build_validation, scenario.build_history, scenario.build_test)
        drawn = [[arrivals(build(seed, store, span_s=SPAN_S)) for seed in (0, 1)] for build in builds]
        for first, second in itertools.combinations(drawn, 2):
            for left, right in itertools.product(first, second):
                assert not np.isin(left, right).any()


def arrivals(built: Any) -> np.ndarray:
    times: np.ndarray = built.workload.arrival_s
    return times[times > 0]  # a jittered copy that would arrive before the beginning arrives at 0


def test_overlap_is_refused() -> None:
    data = {"streams": {}, "scenarios": {}, "traces": {"t": {"train": [0, 1500], "test": [1400, 3000]}}}
    with pytest.raises(SpecError, match=r"traces.t: train=\[0.0, 1500.0\] and test=\[1400.0, 3000.0\] overlap"):
        Split.from_dict(data)


def test_a_scenario_of_traces_alone_has_no_validation(store: TraceStore) -> None:
    scenario = load_scenario("chatbot")
    only_traces = Scenario.model_validate(
        scenario.model_dump(by_alias=True) | {"train": [scenario.train[0].model_dump(by_alias=True)]}
    )
    with pytest.raises(SpecError, match=r"'chatbot' has no validation traffic"):
        only_traces.build_validation(0, store)
