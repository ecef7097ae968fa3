"""The Workload value: what it refuses, and what `take` carries along."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload import NO_SESSION, Workload, describe


def make(**changes: Any) -> Workload:
    fields: dict[str, Any] = {
        "arrival_s": np.array([0.0, 1.0, 1.0, 4.0]),
        "prompt_tokens": np.array([10, 20, 30, 40]),
        "output_tokens": np.array([1, 2, 3, 4]),
        "class_index": np.array([0, 1, 0, 1]),
        "class_names": ("chat", "batch"),
        "span_s": 8.0,
    }
    return Workload(**(fields | changes))


def test_fields_get_their_documented_dtypes() -> None:
    workload = make(session=np.array([7, NO_SESSION, 7, 8]))
    assert workload.arrival_s.dtype == np.float64
    assert workload.prompt_tokens.dtype == np.int32
    assert workload.class_index.dtype == np.int16
    assert workload.session is not None
    assert workload.session.dtype == np.int32
    assert workload.num_requests == 4
    assert workload.mean_rate_per_s == 0.5
    assert workload.total_tokens == 110


def test_an_empty_window_is_a_workload() -> None:
    empty = np.empty(0)
    workload = Workload(empty, empty.astype(int), empty.astype(int), empty.astype(int), ("chat",), 5.0)
    assert workload.num_requests == 0
    assert describe(workload)["peak_to_mean_1min"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrival_s": np.array([0.0, 2.0, 1.0, 4.0])}, "precedes"),
        ({"arrival_s": np.array([0.0, 1.0, np.nan, 4.0])}, r"arrival_s\[2\]=nan"),
        ({"arrival_s": np.array([-1.0, 1.0, 1.0, 4.0])}, "leave 0"),
        ({"span_s": 3.0}, "leave 0"),
        ({"span_s": 0.0}, "span_s=0.0 must be a positive"),
        ({"span_s": float("nan")}, "span_s=nan"),
        ({"prompt_tokens": np.array([10, 0, 30, 40])}, r"prompt_tokens\[1\]=0 must be at least 1"),
        ({"output_tokens": np.array([1, 2, 3])}, r"output_tokens has shape \(3,\)"),
        ({"output_tokens": np.array([1.5, 2, 3, 4])}, "whole numbers"),
        ({"output_tokens": np.array([1, 2, 3, 2**40])}, "outside"),
        ({"class_index": np.array([0, 1, 2, 0])}, "2 class names"),
        ({"class_names": ("chat", "chat")}, "must differ"),
        ({"hash_ids": np.array([1])}, "together"),
        (
            {"hash_ids": np.array([1]), "hash_offsets": np.array([0, 0, 1, 0, 1]), "hash_block_tokens": 16},
            "must rise from 0",
        ),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make(**changes)


def test_take_carries_sessions_and_hashes() -> None:
    workload = make(
        session=np.array([5, 6, NO_SESSION, 5]),
        hash_ids=np.array([1, 2, 3, 4, 5]),
        hash_offsets=np.array([0, 2, 2, 3, 5]),
        hash_block_tokens=16,
    )
    taken = workload.take(np.array([True, True, False, True]))
    assert taken.prompt_tokens.tolist() == [10, 20, 40]
    assert taken.session is not None
    assert taken.session.tolist() == [5, 6, 5]
    assert taken.hash_offsets is not None
    assert taken.hash_ids is not None
    assert taken.hash_offsets.tolist() == [0, 2, 2, 4]
    assert taken.hash_ids.tolist() == [1, 2, 4, 5]


def test_describe_counts_by_hand() -> None:
    stats = describe(make(arrival_s=np.array([0.0, 30.0, 90.0, 100.0]), span_s=130.0))
    assert stats["peak_to_mean_1min"] == 1.0  # minutes hold 2 and 2; the cut-off third is left out
    assert stats["fano_60s"] == 0.0
    assert stats["prompt_tokens"]["mean"] == 25.0
    assert stats["classes"]["batch"]["num_requests"] == 2
    gaps = np.array([30.0, 60.0, 10.0])
    assert stats["gap_cv"] == pytest.approx(gaps.std() / gaps.mean())
