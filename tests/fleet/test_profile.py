"""Iteration times by hand, the table and the sum of a profile, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.fleet.profile import LatencyProfile, load_profile, shipped_profile_names

FIELDS: dict[str, Any] = {
    "name": "toy",
    "model": "toy",
    "gpu": "toy",
    "gpus_per_replica": 1,
    "kv_blocks": 100,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "token_knots": [1, 10, 30],
    "token_knot_s": [1.0, 1.0, 3.0],
    "decode_context_s": 0.001,
    "decode_seq_s": 0.01,
    "prefill_pair_s": 0.0001,
    "prefill_context_s": 0.002,
    "prefill_seq_s": 0.5,
    "host_s": 0.25,
    "source": "made up",
}


@pytest.fixture
def toy() -> LatencyProfile:
    return LatencyProfile.from_dict(FIELDS)


@pytest.mark.parametrize(("tokens", "seconds"), [(0, 1.0), (1, 1.0), (10, 1.0), (15, 1.5), (30, 3.0), (50, 5.0)])
def test_token_time_interpolates_and_goes_on_with_the_last_slope(
    toy: LatencyProfile, tokens: int, seconds: float
) -> None:
    assert float(toy.token_time_s(tokens)) == pytest.approx(seconds)
    assert toy.token_time_table_s(64)[tokens] == pytest.approx(seconds + 0.25)


def test_one_iteration_is_the_sum_of_its_terms(toy: LatencyProfile) -> None:
    # 2 decodes and chunks of 8 (at the start) and 5 (behind 20): 15 new tokens.
    expected = (
        1.5  # token_time(15)
        + 0.25  # host
        + 0.001 * 300  # decode context
        + 0.01 * 2
        + 0.0001 * (8 * 4 + 5 * 22.5)  # pairs: chunk x (context + chunk / 2)
        + 0.002 * 20
        + 0.5 * 2
    )
    got = toy.iteration_s(num_decode=2, decode_context_tokens=300, chunks=((8, 0), (5, 20)))
    assert got == pytest.approx(expected)


@given(split=st.integers(1, 63))
def test_chunks_cost_the_pairs_of_the_whole_prompt(split: int) -> None:
    """Splitting a prompt changes no attention pair: chunk x (context + chunk / 2) adds up to prompt^2 / 2."""
    toy = LatencyProfile.from_dict({**FIELDS, "prefill_context_s": 0, "token_knot_s": [1.0, 1.0, 1.0]})
    whole = toy.iteration_s(chunks=((64, 0),))
    parts = toy.iteration_s(chunks=((split, 0),)) + toy.iteration_s(chunks=((64 - split, split),))
    assert parts - whole == pytest.approx(1.0 + 0.25 + 0.5)  # one more iteration, one more chunk


def test_seconds_per_token_of_full_batches(toy: LatencyProfile) -> None:
    # 64 tokens: token_time 6.4; prompts of 32: two per iteration, 32^2 / 2 pairs each.
    assert toy.prefill_s_per_token(32) == pytest.approx((6.4 + 0.25 + 2 * (0.0001 * 512 + 0.5)) / 64)
    assert toy.decode_s_per_token(4, 100.0) == pytest.approx((1.0 + 0.25 + 0.001 * 400 + 0.01 * 4) / 4)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"token_knots": [1, 10]}, "same length"),
        ({"token_knots": [2, 10, 30]}, "start at 0 or 1"),
        ({"token_knots": [1, 10, 10]}, "increase strictly"),
        ({"token_knot_s": [0.0, 1.0, 2.0]}, "positive"),
        ({"token_knot_s": [2.0, 1.0, 3.0]}, "non-decreasing"),
        ({"decode_seq_s": -1.0}, "decode_seq_s"),
        ({"kv_blocks": 0}, "kv_blocks"),
        ({"decode_context_s": float("nan")}, "decode_context_s"),
        ({"decode_contxt_s": 1.0}, "did you mean 'decode_context_s'"),
    ],
)
def test_nonsense_is_refused_by_name(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        LatencyProfile.from_dict({**FIELDS, **change})


def test_a_mistyped_profile_gets_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'llama-3.1-8b_a100_tp1'"):
        load_profile("llama-3.1-8b_a10_tp1")
    with pytest.raises(SpecError, match="no such file"):
        load_profile("nowhere.yaml")


@pytest.mark.parametrize("name", shipped_profile_names())
def test_shipped_profiles_slow_down_with_work(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    table = profile.token_time_table_s(profile.max_num_batched_tokens)
    assert (np.diff(table) >= 0).all()
    assert table[0] > 0
    small = profile.iteration_s(num_decode=8, decode_context_tokens=8_000)
    assert profile.iteration_s(num_decode=8, decode_context_tokens=80_000) > small
    assert profile.iteration_s(num_decode=8, decode_context_tokens=8_000, chunks=((512, 0),)) > small


def test_a_file_is_read_back(tmp_path: Path, toy: LatencyProfile) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in FIELDS.items()))
    assert load_profile(str(path)) == toy
