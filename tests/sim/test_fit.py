"""The fit: recovers what made the data, refuses what cannot determine it, and reports the error it has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import ATTENTION_COEFFICIENTS, LatencyProfile
from rl_autoscale.sim.fit import (
    KNOT_TOLERANCE,
    MAX_KNOTS,
    Hardware,
    candidate_knots,
    choose_knots,
    fit_error,
    fit_profile,
    predict_s,
    split_rows,
)
from rl_autoscale.sim.iteration_table import REGIONS, IterationTable

HARDWARE = Hardware("test", "a/model", "GPU", 1, 1000, 256, 2048, "a test")
MAX_TOKENS = 2048


def draw_table(rng: np.random.Generator, num_rows: int) -> IterationTable:
    """Iterations of all three kinds, sizes log-uniform, times still 1."""
    kind = np.arange(num_rows) % 3
    has_decode, has_prefill = kind != 1, kind != 0
    num_decode = np.where(has_decode, np.floor(2 ** rng.uniform(0, 8, num_rows)), 0.0)
    return IterationTable(
        chunk_tokens=np.where(has_prefill, np.floor(2 ** rng.uniform(0, 8, num_rows)), 0.0),
        chunk_context_tokens=np.where(has_prefill, np.floor(rng.uniform(0, 8000, num_rows)), 0.0),
        num_chunks=np.where(has_prefill, rng.integers(1, 8, num_rows), 0).astype(np.float64),
        num_decode=num_decode,
        decode_context_tokens=np.where(has_decode, np.floor(2 ** rng.uniform(7, 14, num_rows)), 0.0),
        iteration_s=np.ones(num_rows),
    )


def with_times(profile: LatencyProfile, table: IterationTable) -> IterationTable:
    return replace(table, iteration_s=predict_s(profile, table))


def roofline(floor_s: float, token_s: float, attention: list[float]) -> LatencyProfile:
    """A weight-read floor until the compute line passes it, then the line."""
    bend = 128
    return LatencyProfile(
        **HARDWARE_FIELDS,
        token_knots=(1, bend, MAX_TOKENS),
        token_knot_s=(floor_s, floor_s, floor_s + token_s * (MAX_TOKENS - bend)),
        **dict(zip(ATTENTION_COEFFICIENTS, attention, strict=True)),
    )


HARDWARE_FIELDS = {
    name: getattr(HARDWARE, name)
    for name in ("name", "model", "gpu", "gpus_per_replica", "kv_blocks", "max_num_seqs", "source")
} | {"max_num_batched_tokens": HARDWARE.max_num_batched_tokens}

ATTENTION = st.tuples(
    st.floats(2e-8, 2e-7),
    st.floats(0, 1e-5),
    st.floats(5e-10, 5e-9),
    st.floats(0, 1e-8),
    st.floats(0, 2e-4),
    st.floats(0, 2e-7),
    st.floats(0, 1e-5),
)


@settings(max_examples=15)
@given(floor_s=st.floats(3e-3, 5e-2), token_s=st.floats(5e-6, 3e-4), attention=ATTENTION, seed=st.integers(0, 2**16))
def test_the_fit_recovers_the_profile_that_made_the_data(
    floor_s: float, token_s: float, attention: tuple[float, ...], seed: int
) -> None:
    truth = roofline(floor_s, token_s, list(attention))
    rng = np.random.default_rng(seed)
    train, test = (with_times(truth, draw_table(rng, rows)) for rows in (900, 300))
    fitted = fit_profile(train, test, HARDWARE)
    # The knots are thinned to KNOT_TOLERANCE, so that is how well noiseless data can be followed.
    assert max(fitted.fit_error.values()) < 2 * KNOT_TOLERANCE
    assert fitted.decode_context_s == pytest.approx(truth.decode_context_s, rel=0.02)
    assert fitted.mixed_context_s == pytest.approx(truth.mixed_context_s, rel=0.05, abs=4e-9)
    assert fitted.prefill_pair_s == pytest.approx(truth.prefill_pair_s, rel=0.1, abs=2e-11)


def test_a_source_that_adds_up_kernels_gives_decode_no_extra_beside_prompts() -> None:
    rng = np.random.default_rng(3)
    truth = roofline(0.01, 5e-5, [8e-8, 1e-6, 3e-9, 0.0, 2e-5, 8e-8, 1e-6])
    fitted = fit_profile(*split_rows(with_times(truth, draw_table(rng, 900)), rng), HARDWARE, joint_attention=False)
    assert fitted.mixed_context_s == fitted.mixed_seq_s == 0.0
    assert fitted.fit_error["mixed_mean"] > 0.01


def test_noise_in_the_data_shows_in_the_error_and_not_in_the_laws() -> None:
    rng = np.random.default_rng(1)
    truth = roofline(0.01, 5e-5, [8e-8, 1e-6, 3e-9, 0.0, 2e-5, 0.0, 0.0])
    clean = with_times(truth, draw_table(rng, 3000))
    noisy = replace(clean, iteration_s=clean.iteration_s * rng.lognormal(0.0, 0.1, len(clean)))
    fitted = fit_profile(*split_rows(noisy, rng), HARDWARE)
    assert np.all(np.diff(fitted.token_knot_s) >= 0)
    assert np.all(fitted.attention_coefficients_s >= 0)
    mean_abs_of_noise = 0.08  # E|N(0, 0.1)|
    for kind in REGIONS:
        assert fitted.fit_error[f"{kind}_mean"] == pytest.approx(mean_abs_of_noise, abs=0.015)
        assert fit_error(fitted, clean)[f"{kind}_mean"] < 0.03  # the truth is found better than the noise suggests


def test_every_kind_of_iteration_counts_alike_however_many_rows_it_has() -> None:
    """Two kinds that contradict each other are met half-way, though one has 50 times the rows."""
    rng = np.random.default_rng(2)
    table = draw_table(rng, 6000)
    table = table[table.region("decode") | (table.region("prefill") & (rng.random(6000) < 0.02))]
    # Times that do not depend on size, higher for decode: one token curve cannot follow both.
    decode = table.region("decode")
    assert decode.sum() > 40 * table.region("prefill").sum()
    table = replace(table, iteration_s=np.where(decode, 0.012, 0.010))
    errors = fit_profile(table, table, HARDWARE).fit_error
    assert 0.5 < errors["prefill_mean"] / errors["decode_mean"] < 2.0


def test_the_reported_error_is_that_of_the_rounded_profile() -> None:
    rng = np.random.default_rng(3)
    truth = roofline(0.01, 5e-5, [8e-8, 1e-6, 3e-9, 0.0, 2e-5, 0.0, 0.0])
    train, test = split_rows(with_times(truth, draw_table(rng, 900)), rng)
    noisy = replace(test, iteration_s=test.iteration_s * 1.1)
    fitted = fit_profile(train, noisy, HARDWARE)
    assert fitted.fit_error == fit_error(LatencyProfile.from_dict(fitted.model_dump(mode="json")), noisy)
    assert fitted.fit_error["decode_mean"] == pytest.approx(1 - 1 / 1.1, abs=0.01)


def test_predictions_equal_the_profile_one_iteration_at_a_time() -> None:
    profile = roofline(0.01, 5e-5, [8e-8, 1e-6, 3e-9, 2e-8, 2e-5, 1e-7, 1e-6])
    table = draw_table(np.random.default_rng(4), 60)
    for row, predicted in enumerate(predict_s(profile, table)):
        chunk = (int(table.chunk_tokens[row]), int(table.chunk_context_tokens[row]))
        alone = profile.iteration_s(
            num_decode=int(table.num_decode[row]),
            decode_context_tokens=float(table.num_decode[row] * table.decode_context_tokens[row]),
            chunks=(chunk,) * int(table.num_chunks[row]),
        )
        assert predicted == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda table: np.arange(len(table)) < 1, "at least 8 rows and 2 different token counts; got 1 rows"),
        (lambda table: table.region("decode"), "got only decode"),
        (lambda table: table.region("mixed") | table.region("prefill"), "got only prefill, mixed"),
        (lambda table: table.new_tokens == 1, "and 1 token counts"),
    ],
)
def test_tables_that_cannot_determine_a_profile_are_refused(keep, message: str) -> None:  # type: ignore[no-untyped-def]
    table = draw_table(np.random.default_rng(5), 600)
    with pytest.raises(SpecError, match=message):
        fit_profile(table[keep(table)], table, HARDWARE)


def test_times_without_a_floor_are_refused() -> None:
    table = draw_table(np.random.default_rng(6), 600)
    free_when_small = replace(table, iteration_s=table.attention_features @ np.array([1e-8, 0, 1e-9, 0, 0, 0, 0]))
    with pytest.raises(SpecError, match=r"1 token\(s\) no time at all.*measure iterations of few tokens"):
        fit_profile(free_when_small, table, HARDWARE)


@given(seed=st.integers(0, 2**16), rows=st.integers(20, 200))
def test_splitting_keeps_every_row_once_and_every_kind_on_both_sides(seed: int, rows: int) -> None:
    table = replace(draw_table(np.random.default_rng(0), rows), iteration_s=np.arange(1.0, rows + 1))
    train, test = split_rows(table, np.random.default_rng(seed))
    assert sorted([*train.iteration_s, *test.iteration_s]) == table.iteration_s.tolist()
    assert all(part.region(kind).any() for part in (train, test) for kind in REGIONS)


@given(st.integers(2, 20_000))
def test_candidate_knots_increase_from_one_to_the_largest_iteration(max_tokens: int) -> None:
    knots = candidate_knots(max_tokens)
    assert knots[0] == 1
    assert knots[-1] == max_tokens
    assert np.all(np.diff(knots) > 0)


def test_knots_go_where_the_curve_bends_or_jumps() -> None:
    candidates = candidate_knots(MAX_TOKENS)
    straight = 0.01 + 1e-5 * candidates
    assert choose_knots(candidates, straight).tolist() == [1, MAX_TOKENS]
    bent = np.maximum(0.01, 1e-4 * candidates)
    assert {96, 112} & set(choose_knots(candidates, bent).tolist())
    jump = np.where(candidates > 512, 0.03, 0.02)
    assert {512, 513} <= set(choose_knots(candidates, jump).tolist())
    rough = 0.01 * np.exp(np.random.default_rng(0).normal(size=len(candidates))).cumsum()
    assert len(choose_knots(candidates, rough)) == MAX_KNOTS
