"""Workloads as users write them: what is built, drawn, noted and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_autoscale.fleet.errors import RlAutoscaleError, SpecError, UnknownNameError
from rl_autoscale.workload import LoadedTrace, TraceStore, Workload, WorkloadSpec
from rl_autoscale.workload.generators import GENERATOR_KINDS
from rl_autoscale.workload.ranges import Range

GENERATORS: dict[str, dict[str, Any]] = {
    "poisson": {"rate_per_s": 5},
    "gamma": {"rate_per_s": 5, "cv": 2},
    "weibull": {"rate_per_s": 5, "cv": 2},
    "mmpp": {"rates_per_s": [2, 8], "mean_sojourns_s": [50, 50]},
    "diurnal": {"rate_per_s": 5, "hourly": "servegen_m_small", "start_hour": 11, "noise_sigma": 0.1},
    "flash_crowd": {"base_per_s": 3, "peak_factor": 4, "start_s": 200},
    "log_ar1": {"rate_per_s": 5},
    "rate_curve": {"edges_s": [0, 300, 600], "rates_per_s": [2, 8]},
    "clients": {"rate_per_s": 5, "num_clients": 20},
    "fitted": {"name": "azure2023_conv"},
}


class FakeStore:
    """One trace: a request each second for 100 s, with its own class."""

    def __init__(self, *notes: str) -> None:
        self.notes = notes

    def load_or_stand_in(self, name: str) -> LoadedTrace:
        assert name == "ticks"
        numbers = np.arange(1, 101)
        return LoadedTrace(
            Workload(np.arange(100.0), numbers, numbers, np.zeros(100, int), ("own",), 100.0), notes=self.notes
        )


def spec_of(*streams: dict[str, Any], **rest: Any) -> WorkloadSpec:
    return WorkloadSpec.from_dict({"streams": list(streams), **rest}, where="test.yaml")


def built(spec: WorkloadSpec, *classes: str, seed: int = 0, span_s: float | None = None) -> Workload:
    return spec.build(np.random.default_rng(seed), FakeStore(), classes or ("chat",), span_s=span_s).workload


@pytest.mark.parametrize("kind", GENERATOR_KINDS)
def test_every_kind_builds_repeats_and_varies(kind: str) -> None:
    generator = {"kind": kind, "span_s": 600, **GENERATORS[kind]}
    spec = spec_of({"class": "chat", "generator": generator, "lengths": "azure_code"})
    first, again, other = built(spec), built(spec), built(spec, seed=1)
    assert first.arrival_s.tobytes() == again.arrival_s.tobytes()
    assert first.output_tokens.tobytes() == again.output_tokens.tobytes()
    assert first.arrival_s.tobytes() != other.arrival_s.tobytes()
    assert first.span_s == 600.0
    assert 2.0 < first.mean_rate_per_s < 12.0
    assert built(spec, span_s=60.0).span_s == 60.0


def test_a_spec_survives_yaml() -> None:
    spec = spec_of(
        {"class": "chat", "trace": "ticks", "rate_scale": {"low": 1, "high": 4, "log": True}, "slice_s": [0, 50]},
        {"shares": {"chat": 1, "batch": 1}, "generator": {"kind": "poisson", "rate_per_s": 2}, "lengths": "bwb"},
        span_s=50,
    )
    plain = yaml.safe_load(yaml.safe_dump(spec.model_dump(mode="json", by_alias=True, exclude_unset=True)))
    assert WorkloadSpec.from_dict(plain) == spec
    assert plain["span_s"] == 50


def test_streams_are_superposed_in_the_fleets_class_order() -> None:
    spec = spec_of(
        {"class": "batch", "trace": "ticks"},
        {"class": "chat", "generator": {"kind": "poisson", "rate_per_s": 3, "span_s": 100}, "lengths": "azure_conv"},
    )
    workload = built(spec, "chat", "batch", "idle")
    assert workload.class_names == ("chat", "batch", "idle")
    assert (workload.class_index == 1).sum() == 100
    assert (workload.class_index == 0).sum() == pytest.approx(300, abs=80)


def test_steps_on_a_trace_compose() -> None:
    spec = spec_of({"class": "chat", "trace": "ticks", "slice_s": [10, 50], "time_warp": 2, "rate_scale": 3})
    workload = built(spec)
    assert workload.span_s == 80.0
    assert workload.num_requests == 120
    assert workload.prompt_tokens.min() == 11


def test_inline_lengths_and_context_limit() -> None:
    lengths = {"prompt": {"kind": "constant", "tokens": 30}, "output": {"kind": "uniform", "low": 5, "high": 9}}
    workload = built(spec_of({"class": "chat", "trace": "ticks", "lengths": lengths, "max_context_tokens": 36}))
    assert workload.output_tokens.min() == 5
    assert workload.output_tokens.max() == 9
    assert (workload.prompt_tokens == np.minimum(30, 36 - workload.output_tokens)).all()


def test_an_episode_takes_the_first_or_a_random_window() -> None:
    first = built(spec_of({"class": "chat", "trace": "ticks"}), span_s=10.0)
    assert first.prompt_tokens.tolist() == list(range(1, 11))
    spec = spec_of({"class": "chat", "trace": "ticks", "random_window": True, "slice_s": [20, 90]})
    starts = [int(built(spec, seed=seed, span_s=10.0).prompt_tokens[0]) for seed in range(40)]
    assert min(starts) >= 21
    assert max(starts) <= 82
    assert len(set(starts)) > 20


@settings(max_examples=40)
@given(span_s=st.floats(6.0, 99.0), warp=st.floats(0.3, 5.0), seed=st.integers(0, 99))
def test_a_cut_window_has_exactly_the_asked_span(span_s: float, warp: float, seed: int) -> None:
    spec = spec_of({"class": "chat", "trace": "ticks", "random_window": True, "time_warp": warp, "rate_scale": 5})
    result = spec.build(np.random.default_rng(seed), FakeStore(), ("chat",), span_s=span_s)
    assert result.workload.span_s == pytest.approx(min(span_s, 100.0 * warp), rel=1e-12)
    assert bool(result.notes) == (span_s > 100.0 * warp)


def test_ranges_are_drawn_for_every_build() -> None:
    rate = {"low": 1.0, "high": 100.0, "log": True}
    spec = spec_of(
        {"class": "chat", "generator": {"kind": "poisson", "rate_per_s": rate, "span_s": 200}, "lengths": "azure_conv"}
    )
    rates = np.array([built(spec, seed=seed).mean_rate_per_s for seed in range(60)])
    assert rates.min() < 4.0
    assert rates.max() > 30.0
    assert np.median(rates) == pytest.approx(10.0, rel=0.7)


@given(low=st.floats(0.001, 1e3), factor=st.floats(1.0, 1e3), log=st.booleans(), seed=st.integers(0, 99))
def test_draws_stay_within_their_range(low: float, factor: float, log: bool, seed: int) -> None:
    drawn = Range(low=low, high=low * factor, log=log).draw(np.random.default_rng(seed))
    assert low <= drawn <= low * factor


def test_notes_reach_the_result_once() -> None:
    spec = spec_of({"class": "chat", "trace": "ticks"}, {"class": "chat", "trace": "ticks"})
    result = spec.build(np.random.default_rng(0), FakeStore("a stand-in"), ("chat",))
    assert result.notes == ("a stand-in",)


def test_the_real_store_fits_the_seam(real_traces: Path, tmp_path: Path) -> None:
    store = TraceStore([real_traces], download=False, environment={"XDG_CACHE_HOME": str(tmp_path)})
    spec = spec_of({"class": "chat", "trace": "azure2023_conv", "slice_s": [0, 1800], "rate_scale": 20})
    result = spec.build(np.random.default_rng(0), store, ("chat",))
    assert result.notes == ()
    assert result.workload.mean_rate_per_s == pytest.approx(20 * 5.53, rel=0.15)


def test_single_class_fleets_take_everything_and_others_need_a_class() -> None:
    assert built(spec_of({"trace": "ticks"}), "chat").class_names == ("chat",)
    assert built(spec_of({"trace": "ticks"}), "chat", "own").class_index.tolist() == [1] * 100
    with pytest.raises(UnknownNameError, match="unknown class 'own'"):
        built(spec_of({"trace": "ticks"}), "chat", "batch")
    generated = {"generator": {"kind": "poisson", "rate_per_s": 3, "span_s": 100}, "lengths": "azure_conv"}
    with pytest.raises(SpecError, match="names no class; add class: or shares: with chat, batch"):
        built(spec_of(generated), "chat", "batch")
    with pytest.raises(UnknownNameError, match="did you mean 'chat'"):
        built(spec_of({"class": "chatt", "trace": "ticks"}), "chat", "batch")


GENERATED = {"class": "chat", "lengths": "azure_conv"}


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"clas": "chat", "trace": "ticks"}, "unknown key 'clas' in StreamSpec; did you mean 'class'"),
        ({"class": "chat"}, "either a trace or a generator"),
        ({"class": "a", "shares": {"b": 1}, "trace": "ticks"}, "either a class or shares"),
        ({"shares": {"a": 0}, "trace": "ticks"}, "shares must not all be zero"),
        ({"trace": "ticks", "slice_s": [5, 5]}, "must have start < end"),
        ({"trace": "ticks", "rate_scale": 0}, "rate_scale: must be greater than 0"),
        ({"trace": "ticks", "rate_scale": {"low": 3, "high": 2}}, "low=3.0 exceeds high=2.0"),
        ({"trace": "ticks", "rate_scale": {"low": 0.5, "hihg": 2}}, "did you mean 'high'"),
        ({"trace": "ticks", "time_warp": "fast"}, "must be a number or"),
        ({"trace": "ticks", "lengths": "azure_con"}, "did you mean 'azure_conv'"),
        (GENERATED | {"generator": {"kind": "poison", "rate_per_s": 1}}, "did you mean 'poisson'"),
        (GENERATED | {"generator": {"rate_per_s": 1}}, "unknown generator kind 'None'"),
        (
            GENERATED | {"generator": {"kind": "poisson", "rate_per_s": -3}},
            "rate_per_s: must be greater than 0 (got -3)",
        ),
        (GENERATED | {"generator": {"kind": "poisson", "rate_per_s": 3, "cv": 2}}, "a poisson generator has cv 1"),
        (GENERATED | {"generator": {"kind": "gamma", "rate_per_s": float("inf")}}, "must be finite"),
        (GENERATED | {"generator": {"kind": "gamma", "rate_per_s": 1, "cv": 1e9}}, "at most 100"),
        (GENERATED | {"generator": {"kind": "mmpp", "rates_per_s": [1, 2], "mean_sojourns_s": [1, 2, 3]}}, "2 rates"),
        (GENERATED | {"generator": {"kind": "rate_curve", "edges_s": [0, 1], "rates_per_s": [1, 2]}}, "one edge more"),
        (GENERATED | {"generator": {"kind": "fitted", "name": "azure2023"}}, "no fitted generator 'azure2023'"),
        ({"class": "chat", "generator": {"kind": "poisson", "rate_per_s": 1}}, "a generator needs lengths"),
        (GENERATED | {"generator": GENERATORS["poisson"] | {"kind": "poisson"}, "rate_scale": 2}, "belongs to a trace"),
    ],
)
def test_mistakes_are_refused_in_one_line(stream: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(stream)
    assert message in str(caught.value)
    assert str(caught.value).startswith("test.yaml: streams.0")
    assert "\n" not in str(caught.value)


def test_an_empty_list_of_streams_is_refused() -> None:
    with pytest.raises(SpecError, match="streams is empty"):
        spec_of()


@pytest.mark.parametrize(
    ("streams", "span_s", "message"),
    [
        ([GENERATED | {"generator": {"kind": "poisson", "rate_per_s": 1}}], None, r"streams\[0\].*has no span_s"),
        ([GENERATED | {"generator": {"kind": "poisson", "rate_per_s": 1e-9, "span_s": 1}}], None, "no requests arrive"),
        ([GENERATED | {"generator": {"kind": "poisson", "rate_per_s": 1}}], 0.0, "span_s=0.0 must be a positive"),
        ([{"class": "chat", "trace": "ticks", "slice_s": [0, 500]}], None, "end <= span_s=100"),
        (
            [GENERATED | {"generator": {"kind": "log_ar1", "rate_per_s": 1, "correlation_time_s": 1e-9}}],
            1e4,
            "too fine",
        ),
        (
            [GENERATED | {"generator": {"kind": "mmpp", "rates_per_s": [1, 2], "mean_sojourns_s": [1, 1e-9]}}],
            1e4,
            "too short for span_s",
        ),
    ],
)
def test_builds_that_cannot_be_are_refused(streams: list[dict[str, Any]], span_s: float | None, message: str) -> None:
    with pytest.raises(RlAutoscaleError, match=message):
        built(spec_of(*streams), span_s=span_s)
