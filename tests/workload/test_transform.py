"""What scaling, slicing and mixing keep, as laws."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.workload import NO_SESSION, Workload, curves, read_trace, transform
from rl_autoscale.workload.arrivals import sample_arrivals
from rl_autoscale.workload.length_table import length_model
from rl_autoscale.workload.lengths import sample_lengths
from rl_autoscale.workload.stats import window_counts


@st.composite
def any_workload(draw: st.DrawFn) -> Workload:
    """Small workloads with ties, sessions and prefix blocks, or without."""
    gaps = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 7.5]), max_size=12))
    size = len(gaps)
    arrival_s = np.cumsum(gaps) if gaps else np.empty(0)

    def whole(low: int, high: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(low, high), min_size=size, max_size=size)), dtype=np.int64)

    num_blocks = whole(0, 3)
    hashed = draw(st.booleans())
    return Workload(
        arrival_s=arrival_s,
        prompt_tokens=whole(1, 60),
        output_tokens=whole(1, 60),
        class_index=whole(0, 1),
        class_names=("chat", "batch"),
        span_s=float(arrival_s[-1] if size else 0.0) + draw(st.sampled_from([0.0, 3.0])) + (0.5 if not size else 0.0)
        or 1.0,
        session=draw(st.sampled_from([None, whole(NO_SESSION, 2)])),
        hash_offsets=np.concatenate(([0], np.cumsum(num_blocks))) if hashed else None,
        hash_ids=np.arange(num_blocks.sum()) % 4 if hashed else None,
        hash_block_tokens=16 if hashed else 0,
    )


def poisson_workload(rate_per_s: float, span_s: float, seed: int = 0) -> Workload:
    rng = np.random.default_rng(seed)
    arrival_s = sample_arrivals(rng, curves.sinusoid(rate_per_s, 0.6, 1200.0, span_s))
    prompt, output = sample_lengths(rng, length_model("azure_conv"), arrival_s.size)
    return Workload(arrival_s, prompt, output, np.zeros(arrival_s.size, np.int16), ("chat",), span_s)


def requests(workload: Workload) -> list[tuple[object, ...]]:
    """Each request with everything it owns, class by name."""
    rows = []
    for i in range(workload.num_requests):
        blocks: tuple[int, ...] = ()
        if workload.hash_ids is not None and workload.hash_offsets is not None:
            blocks = tuple(workload.hash_ids[workload.hash_offsets[i] : workload.hash_offsets[i + 1]].tolist())
        rows.append(
            (
                round(float(workload.arrival_s[i]), 9),
                int(workload.prompt_tokens[i]),
                int(workload.output_tokens[i]),
                workload.class_names[workload.class_index[i]],
                None if workload.session is None else int(workload.session[i]),
                blocks,
            )
        )
    return rows


@settings(max_examples=50)
@given(any_workload(), st.floats(0.05, 0.95))
def test_adjacent_slices_conserve_every_request(workload: Workload, where: float) -> None:
    cut_s = workload.span_s * where
    first, second = (
        transform.slice_time(workload, 0.0, cut_s),
        transform.slice_time(workload, cut_s, workload.span_s),
    )
    assert first.num_requests + second.num_requests == workload.num_requests
    assert first.span_s + second.span_s == pytest.approx(workload.span_s)
    shifted = replace(second, arrival_s=second.arrival_s + cut_s, span_s=workload.span_s + 1.0)
    assert requests(first) + requests(shifted) == requests(workload)


@settings(max_examples=50)
@given(any_workload(), any_workload())
def test_merge_conserves_requests_and_keeps_order(first: Workload, second: Workload) -> None:
    merged = transform.merge([first, second])
    assert merged.num_requests == first.num_requests + second.num_requests
    assert (np.diff(merged.arrival_s) >= 0).all()
    assert merged.total_tokens == first.total_tokens + second.total_tokens
    assert merged.span_s == max(first.span_s, second.span_s)
    assert sorted(row[:4] for row in requests(merged)) == sorted(row[:4] for row in requests(first) + requests(second))
    for name in ("session", "hash_ids"):
        parts = [getattr(part, name) for part in (first, second)]
        values = getattr(merged, name)
        if all(part is None for part in parts):
            assert values is None
            continue
        # nothing that was different becomes equal, nothing that was equal becomes different
        distinct = sum(np.unique(part[part >= 0]).size for part in parts if part is not None)
        assert np.unique(values[values >= 0]).size == distinct


def test_merge_joins_classes_by_name_and_breaks_ties_by_argument() -> None:
    def one(name: str, prompt: int) -> Workload:
        return Workload(np.array([1.0]), np.array([prompt]), np.array([1]), np.array([0]), (name,), 2.0)

    merged = transform.merge([one("b", 1), one("a", 2), one("b", 3)])
    assert merged.class_names == ("b", "a")
    assert merged.class_index.tolist() == [0, 1, 0]
    assert merged.prompt_tokens.tolist() == [1, 2, 3]
    with pytest.raises(SpecError, match="at least one"):
        transform.merge([])


def test_merge_refuses_different_block_sizes() -> None:
    def hashed(block_tokens: int) -> Workload:
        one = np.array([1])
        return Workload(
            np.array([0.0]), one, one, np.array([0]), ("a",), 1.0, None, np.array([0, 1]), one, block_tokens
        )

    with pytest.raises(SpecError, match="16 and 512 tokens cannot be mixed"):
        transform.merge([hashed(16), hashed(512)])


@given(any_workload(), st.sampled_from([0.3, 1.0, 1.7, 3.0]), st.integers(0, 100))
def test_scaling_any_workload_keeps_its_invariants(workload: Workload, factor: float, seed: int) -> None:
    scaled = transform.scale_rate(np.random.default_rng(seed), workload, factor)
    assert scaled.span_s == workload.span_s  # and Workload itself has checked order, signs and sizes
    low, high = workload.num_requests * math.floor(factor), workload.num_requests * math.ceil(factor)
    assert low <= scaled.num_requests <= high
    if factor == 1.0:
        assert requests(scaled) == requests(workload)
    if factor == 3.0:
        assert sorted(scaled.prompt_tokens.tolist()) == sorted(workload.prompt_tokens.tolist() * 3)


def test_thinning_keeps_the_share_it_should() -> None:
    workload = poisson_workload(20.0, 3600.0)
    thinned = transform.scale_rate(np.random.default_rng(1), workload, 0.3)
    expected = 0.3 * workload.num_requests
    assert thinned.num_requests == pytest.approx(expected, abs=4.5 * math.sqrt(0.7 * expected))
    assert np.isin(thinned.arrival_s, workload.arrival_s).all()


def test_copies_keep_the_minute_shape_and_the_lengths_but_are_no_clones() -> None:
    workload = poisson_workload(5.0, 3600.0)
    scaled = transform.scale_rate(np.random.default_rng(2), workload, 20.0)
    assert scaled.num_requests == 20 * workload.num_requests
    before, after = window_counts(workload, 60.0), window_counts(scaled, 60.0)
    assert np.corrcoef(before, after)[0, 1] > 0.99
    # requests within 2 s of a minute's edge may change sides: 4 s of 60 s
    assert np.abs(after / 20.0 - before).max() < 0.1 * before.mean() + 3
    assert np.quantile(scaled.prompt_tokens, [0.5, 0.99]) == pytest.approx(
        np.quantile(workload.prompt_tokens, [0.5, 0.99]), rel=0.02
    )
    # the nearest 20 requests of an original are not 20 times itself
    repeats = [np.unique(scaled.prompt_tokens[i : i + 20]).size for i in range(0, scaled.num_requests - 20, 997)]
    assert np.mean(repeats) > 12


def test_copies_share_no_prefix_and_no_session() -> None:
    workload = Workload(
        np.array([0.0, 1.0]), np.array([16, 16]), np.array([1, 1]), np.array([0, 0]), ("a",), 10.0,
        np.array([0, 0]), np.array([0, 1, 2]), np.array([9, 9]), 16,
    )  # fmt: skip
    tripled = transform.scale_rate(np.random.default_rng(0), workload, 3.0)
    assert tripled.session is not None
    assert tripled.hash_ids is not None
    assert np.bincount(tripled.session).tolist() == [2, 2, 2]
    assert sorted(np.unique(tripled.hash_ids, return_counts=True)[1].tolist()) == [2, 2, 2]


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_factors_are_refused(factor: float) -> None:
    with pytest.raises(SpecError, match="rate_scale="):
        transform.scale_rate(np.random.default_rng(0), poisson_workload(1.0, 10.0), factor)
    with pytest.raises(SpecError, match="time_warp="):
        transform.warp_time(poisson_workload(1.0, 10.0), factor)


@settings(max_examples=30)
@given(any_workload(), st.floats(0.01, 100.0))
def test_time_warp_stretches_everything(workload: Workload, factor: float) -> None:
    warped = transform.warp_time(workload, factor)
    assert warped.num_requests == workload.num_requests
    assert warped.mean_rate_per_s == pytest.approx(workload.mean_rate_per_s / factor)


@pytest.mark.parametrize(("start_s", "end_s"), [(-1.0, 5.0), (5.0, 5.0), (0.0, 11.0), (float("nan"), 5.0)])
def test_slices_outside_the_window_are_refused(start_s: float, end_s: float) -> None:
    with pytest.raises(SpecError, match=r"must satisfy 0 <= start < end <= span_s=10"):
        transform.slice_time(poisson_workload(1.0, 10.0), start_s, end_s)


@given(any_workload(), st.integers(2, 80))
def test_clipping_fits_the_context_and_never_lengthens(workload: Workload, limit: int) -> None:
    clipped = transform.clip_context(workload, limit)
    assert (clipped.prompt_tokens + clipped.output_tokens <= limit).all()
    assert (clipped.prompt_tokens <= workload.prompt_tokens).all()
    fits = workload.prompt_tokens + workload.output_tokens <= limit
    assert (clipped.prompt_tokens[fits] == workload.prompt_tokens[fits]).all()
    assert (clipped.output_tokens[fits] == workload.output_tokens[fits]).all()
    if clipped.hash_offsets is not None and workload.hash_offsets is not None:
        kept, before = np.diff(clipped.hash_offsets), np.diff(workload.hash_offsets)
        assert (kept == np.minimum(before, -(-clipped.prompt_tokens // 16))).all()


def test_shares_are_met_and_sessions_stay_together() -> None:
    workload = poisson_workload(10.0, 3600.0)
    workload = replace(workload, session=np.arange(workload.num_requests, dtype=np.int32) // 2)
    mixed = transform.assign_classes_by_share(np.random.default_rng(3), workload, {"chat": 1.0, "batch": 3.0})
    assert (mixed.class_index == 1).mean() == pytest.approx(0.75, abs=0.02)
    even = mixed.class_index[: mixed.num_requests // 2 * 2].reshape(-1, 2)
    assert (even[:, 0] == even[:, 1]).all()
    with pytest.raises(SpecError, match="not all zero"):
        transform.assign_classes_by_share(np.random.default_rng(3), workload, {"chat": 0.0})


def test_classes_take_the_fleet_order_and_strangers_are_named() -> None:
    workload = Workload(np.zeros(2), np.ones(2, int), np.ones(2, int), np.array([0, 2]), ("b", "none", "a"), 1.0)
    ordered = transform.order_classes(workload, ("a", "b"))
    assert ordered.class_names == ("a", "b")
    assert ordered.class_index.tolist() == [1, 0]
    with pytest.raises(UnknownNameError, match="unknown class 'a'"):
        transform.order_classes(workload, ("b",))


def test_twenty_times_the_real_conversation_keeps_its_minutes(real_traces: Path) -> None:
    workload = read_trace(real_traces / "azure2023_conv.parquet").workload
    scaled = transform.scale_rate(np.random.default_rng(4), workload, 20.0)
    before, after = window_counts(workload, 60.0), window_counts(scaled, 60.0)
    assert np.corrcoef(before, after)[0, 1] > 0.995
    assert scaled.output_tokens.mean() == pytest.approx(workload.output_tokens.mean(), rel=1e-9)
