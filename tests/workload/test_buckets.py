"""Counts per bucket made into requests: nothing is invented, nothing is lost, and a gap is not a quiet hour."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_autoscale.fleet.errors import TraceError
from rl_autoscale.workload.bucket_csv import is_bucket_csv, read_buckets
from rl_autoscale.workload.buckets import BucketLengths, BucketSeries, spread

NAN = math.nan


def series(arrivals, prompt=None, output=None, name=None) -> BucketSeries:
    size = len(arrivals)
    lengths = [
        side or BucketLengths.of_means(np.full(size, mean)) for side, mean in ((prompt, 1000.0), (output, 200.0))
    ]
    return BucketSeries(name, 1000.0, 60.0, np.array(arrivals, dtype=np.float64), *lengths)


def histogram(mean: float = NAN) -> BucketLengths:
    """A quarter of the requests within 0..100 tokens, the rest within 200..500."""
    return BucketLengths(np.array([mean]), np.array([100.0, 200.0, 500.0]), np.array([[1.0, 0.0, 3.0, 0.0]]))


def test_every_bucket_keeps_its_count() -> None:
    workload = spread([series([3, 0, 7, 1])]).workload
    assert np.bincount((workload.arrival_s // 60).astype(int), minlength=4).tolist() == [3, 0, 7, 1]
    assert workload.span_s == 240.0


def test_fractions_are_right_on_average() -> None:
    assert spread([series([0.25] * 20_000)]).workload.num_requests == pytest.approx(5000, rel=0.05)


def test_means_are_kept() -> None:
    workload = spread([series([20_000])], length_cv=0.5).workload
    assert workload.prompt_tokens.mean() == pytest.approx(1000, rel=0.02)
    assert workload.output_tokens.std() == pytest.approx(100, rel=0.05)


def test_lengths_follow_the_histogram() -> None:
    tokens = spread([series([40_000], prompt=histogram())]).workload.prompt_tokens
    assert (tokens <= 100).mean() == pytest.approx(0.25, abs=0.01)
    assert ((tokens > 200) & (tokens <= 500)).mean() == pytest.approx(0.75, abs=0.01)
    # 0.25 x 50 + 0.75 x 350 = 275 tokens; told otherwise, the measured mean wins
    assert tokens.mean() == pytest.approx(275, rel=0.01)
    scaled = spread([series([40_000], prompt=histogram(330.0))]).workload.prompt_tokens
    assert scaled.mean() == pytest.approx(330, rel=0.01)


def test_a_gap_is_cut_filled_or_refused_and_never_a_quiet_bucket() -> None:
    holed = [series([600, NAN, NAN, 600])]
    cut = spread(holed)
    assert (cut.workload.span_s, cut.workload.num_requests) == (120.0, 1200)
    assert "2 of 4 buckets" in cut.notes[0]
    assert "not zero load" in cut.notes[0]
    filled = spread(holed, gaps="fill")
    assert (filled.workload.span_s, filled.workload.num_requests) == (240.0, 2400)
    with pytest.raises(TraceError, match="2 of 4 buckets"):
        spread(holed, gaps="error")


def test_time_after_a_cut_gap_is_told_as_it_was() -> None:
    cut = spread([series([1, NAN, NAN, 1])])
    assert cut.wall_s(30.0) == 1030.0
    assert cut.wall_s(90.0) == 1000.0 + 3 * 60.0 + 30.0


def test_a_gap_of_one_class_is_a_gap_of_all() -> None:
    workload = spread([series([5, 5], name="chat"), series([5, NAN], name="batch")]).workload
    assert workload.num_requests == 10
    assert np.bincount(workload.class_index).tolist() == [5, 5]


def test_missing_lengths_come_from_the_nearest_bucket_and_it_is_said() -> None:
    prompt = BucketLengths.of_means(np.array([10.0, NAN, NAN, 5000.0]))
    found = spread([series([0, 0, 2000, 0], prompt=prompt)], length_cv=0.1)
    assert found.workload.prompt_tokens.mean() == pytest.approx(5000, rel=0.05)
    assert "took their neighbour's" in found.notes[0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([series([NAN, NAN])], "no bucket has data"),
        ([series([0, 0])], "no requests"),
        ([series([5], output=BucketLengths.of_means(np.array([NAN])))], "no output lengths anywhere"),
    ],
)
def test_what_cannot_be_replayed_is_refused(data, reason) -> None:
    with pytest.raises(TraceError, match=reason):
        spread(data)


@settings(max_examples=25)
@given(st.lists(st.one_of(st.just(NAN), st.floats(0, 50)), min_size=1, max_size=30), st.integers(0, 5))
def test_same_seed_same_requests_within_one_of_every_count(counts, seed) -> None:
    counts = [3.0, *counts]
    first, second = (spread([series(counts)], seed=seed) for _ in range(2))
    assert first.workload.arrival_s.tobytes() == second.workload.arrival_s.tobytes()
    assert first.workload.output_tokens.tobytes() == second.workload.output_tokens.tobytes()
    drawn = np.bincount((first.workload.arrival_s // 60).astype(int), minlength=len(first.kept))
    assert (np.abs(drawn[: len(first.kept)] - np.array(counts)[first.kept]) <= 1).all()


HEAD = "time,arrivals,prompt_tokens,output_tokens\n"


def test_a_file_with_holes(tmp_path) -> None:
    path = tmp_path / "week.csv"
    path.write_text(
        HEAD + "2026-11-02T00:00:00Z,2,2000,400\n2026-11-02T00:01:00Z,0,0,0\n2026-11-02T00:02:00Z,,,\n"
        "2026-11-02T00:04:00Z,4,400,40\n"
    )
    assert is_bucket_csv(path)
    (found,) = read_buckets(path)
    assert found.bucket_s == 60.0
    assert found.start_s == 1793577600.0
    np.testing.assert_array_equal(found.arrivals, [2, 0, NAN, NAN, 4])
    np.testing.assert_array_equal(found.prompt.mean_tokens, [1000, NAN, NAN, NAN, 100])


def test_classes_have_lines_of_their_own(tmp_path) -> None:
    path = tmp_path / "week.csv"
    path.write_text("class," + HEAD + "chat,0,1,10,10\nbatch,0,2,20,20\nchat,30,3,30,30\nbatch,30,4,40,40\n")
    found = {item.class_name: item.arrivals.tolist() for item in read_buckets(path)}
    assert found == {"chat": [1, 3], "batch": [2, 4]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("time,arrivals,prompt_tokens\n0,1,1\n", ":1: no column output_tokens"),
        (HEAD + "0,1,10,10\n0,1,10,10\n", ":3: time 0 is given twice"),
        (HEAD + "0,100,1.5,2\n60,1,1,1\n", "total, not a mean"),
        (HEAD + "0,x,1,2\n", ":2: arrivals='x' is not a number"),
        (HEAD + "0,-1,1,2\n", "at least 0"),
        (HEAD + "noon,1,1,2\n", ":2: time: 'noon' is not a time"),
        (HEAD + "0,1,1,1\n60,1,1,1\n150,1,1,1\n", "do not fit the step of 90 s"),
        (HEAD + "0,1,1,1\n", "give at least two"),
        (HEAD, "no rows"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, reason) -> None:
    path = tmp_path / "week.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=reason):
        read_buckets(path)
