"""The estimate behind early refusal, term by term and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.fleet.admission import (
    MEAN_OVER,
    corrected_clearing_s,
    estimate_queue_wait_s,
    moved_mean,
    prefill_time_s,
    residual_iteration_s,
    selective_ttft_s,
    wait_ahead_s,
)
from rl_autoscale.fleet.profile import load_profile

TABLE_S = 1.0 + 0.01 * np.arange(101.0)  # budget 100
COEFFICIENTS_S = np.array([0.001, 0.1, 0.0002, 0.0, 0.5, 0.003, 0.05])
"""Decode context, decode sequence, prefill pair, prefill context, prefill sequence; mixed context, mixed sequence."""


def prefill_s(*prompts: int, decoding: int = 0, decoding_tokens: int = 0) -> float:
    squares = sum(prompt**2 for prompt in prompts)
    return float(prefill_time_s(sum(prompts), squares, decoding, decoding_tokens, 100, TABLE_S, COEFFICIENTS_S))


def test_nothing_takes_no_time() -> None:
    assert prefill_s() == 0.0


def test_a_prompt_on_an_idle_replica() -> None:
    assert prefill_s(40) == pytest.approx(1.4 + 0.5 + 0.0002 * 800)


def test_prompts_fill_the_token_budget() -> None:
    # 250 tokens: 100 + 100 + 50, three iterations with a chunk each; pairs of each prompt with itself only.
    assert prefill_s(150, 100) == pytest.approx(2 * 2.0 + 1.5 + 3 * 0.5 + 0.0002 * (150**2 + 100**2) / 2)


def test_running_streams_share_the_iterations() -> None:
    # 20 streams with 300 tokens leave 80 of 100 tokens: 80 + 40 in two iterations, in each of them 0.3 + 2 s of
    # decoding and 0.9 + 1 s because it shares the iteration with a prompt.
    expected = 2.0 + 1.6 + 2 * (0.3 + 2.0 + 0.9 + 1.0 + 0.5) + 0.0002 * 120**2 / 2
    assert prefill_s(120, decoding=20, decoding_tokens=300) == pytest.approx(expected)


def test_half_of_the_iteration_in_progress_is_left() -> None:
    assert residual_iteration_s(0, 0, 100, TABLE_S, COEFFICIENTS_S) == 0.0
    assert residual_iteration_s(10, 300, 100, TABLE_S, COEFFICIENTS_S) == pytest.approx(0.5 * (1.1 + 0.3 + 1.0))


def test_the_clock_of_the_prompts_ahead() -> None:
    assert wait_ahead_s(10.0, 12.0, 0.0, 0.7) == 0.7  # nothing is ahead: what is left of the iteration
    assert wait_ahead_s(10.0, 12.0, 5.0, 0.7) == pytest.approx(2.0)  # they should be done at 12 s
    assert wait_ahead_s(10.0, 9.0, 5.0, 0.7) == pytest.approx(1.0)  # late by 1 s: as much again
    assert wait_ahead_s(10.0, 1.0, 5.0, 0.7) == pytest.approx(5.0)  # but never more than they take from their beginning


def test_a_first_token_corrects_the_clock() -> None:
    assert corrected_clearing_s(10.0, 14.0, 3.0) == pytest.approx(13.0)  # less is left than was believed
    assert corrected_clearing_s(10.0, 12.0, 3.0) == pytest.approx(12.0)
    assert corrected_clearing_s(10.0, 9.0, 3.0) == pytest.approx(13.0)  # it was late: begin anew


def test_queue_wait_is_littles_law() -> None:
    # 20 in flight for 4 s each leave at 5 per second; behind 9 others, the tenth leaves after 2 s.
    assert estimate_queue_wait_s(9, 20, 4.0) == pytest.approx(2.0)
    assert estimate_queue_wait_s(0, 0, 0.0) == 0.0


@given(prompt=st.integers(1, 4000), decoding=st.integers(0, 200), more=st.integers(1, 500))
def test_more_tokens_never_take_less_time(prompt: int, decoding: int, more: int) -> None:
    profile = load_profile("llama-3.1-8b_a100_tp1")
    budget = profile.max_num_batched_tokens
    table_s, coefficients_s = profile.token_time_table_s(budget), profile.attention_coefficients_s
    shorter_s, longer_s = (
        float(prefill_time_s(tokens, tokens**2, decoding, 500 * decoding, budget, table_s, coefficients_s))
        for tokens in (prompt, prompt + more)
    )
    assert 0.0 < shorter_s <= longer_s + 1e-12


@pytest.mark.parametrize(
    ("prompt", "answer_work", "selectivity", "expected_s"),
    [
        (400, 0.0, 0.0, 3.0),  # all alike
        (100, 0.0, 1.0, 3.0),  # the mean
        (400, 0.0, 1.0, 1.0 + 4.0 * 2.0),
        (400, 0.0, 0.5, 1.0 + 2.0 * 2.0),
        (25, 0.0, 0.5, 1.0 + 0.5 * 2.0),
        (400, 200.0, 1.0, 1.0 + 2.0 * 2.0),  # twice the mean, its answer counted
    ],
)
def test_the_wait_counts_by_the_work(prompt: int, answer_work: float, selectivity: float, expected_s: float) -> None:
    assert selective_ttft_s(3.0, 1.0, prompt, 100.0, answer_work, selectivity) == pytest.approx(expected_s)


def test_an_estimate_below_the_prefill_alone_has_no_wait_in_it() -> None:
    assert selective_ttft_s(0.5, 1.0, 900, 100.0, 0.0, 2.0) == 0.5


def test_a_mean_of_late_is_the_mean_at_first_and_forgets_then() -> None:
    mean, values = 0.0, [5, 1, 9, 4]
    for number, value in enumerate(values, start=1):
        mean = moved_mean(mean, number, value)
    assert mean == pytest.approx(np.mean(values))
    assert moved_mean(mean, 10 * MEAN_OVER, 1000) == pytest.approx(mean + (1000 - mean) / MEAN_OVER)
