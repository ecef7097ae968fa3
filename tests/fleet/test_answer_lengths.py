"""Output lengths are estimated from what was generated, so answers under way count, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.answer_lengths import MOST, AnswerLengths
from rl_autoscale.fleet.profile import TYPICAL_OUTPUT_TOKENS

WINDOW_S = 10.0
TOKENS_PER_S = 20.0  # of each answer


def windows(streams: list[tuple[float, float]], minutes: float, seed: int = 0) -> list[dict[str, Any]]:
    """The signals of each window from an empty fleet on; streams are (requests per second, mean exponential tokens)."""
    rng = np.random.default_rng(seed)
    answers = []
    for c, (rate_per_s, mean_tokens) in enumerate(streams):
        begins = np.cumsum(rng.exponential(1.0 / rate_per_s, int(60.0 * minutes * rate_per_s)))
        answers += [
            (c, begin, max(round(length), 1))
            for begin, length in zip(begins, rng.exponential(mean_tokens, len(begins)), strict=True)
        ]
    of_class, begins, lengths = (np.array(column) for column in zip(*answers, strict=True))
    found = []
    before = np.zeros(len(begins))
    for k in range(int(60.0 * minutes / WINDOW_S)):
        now_s = (k + 1) * WINDOW_S
        generated = np.clip((now_s - begins) * TOKENS_PER_S, 0.0, lengths)
        ended = (generated == lengths) & (before < lengths)
        counts = np.bincount(of_class[ended], minlength=len(streams))
        tokens = np.bincount(of_class[ended], lengths[ended], minlength=len(streams))
        with np.errstate(invalid="ignore"):
            mean = tokens / counts
        under_way = (generated > 0) & (generated < lengths)
        found.append(
            {
                "finished_per_s": counts / WINDOW_S,
                "mean_output_tokens": mean,
                "in_flight": np.bincount(of_class[under_way], minlength=len(streams)),
                "generation_tokens_per_s": (generated - before).sum() / WINDOW_S,
            }
        )
        before = generated
    return found


def estimates(a_state: Any, spec: Any, seen: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """Of each window, shape (num_windows, num_classes)."""
    counter = AnswerLengths((len(spec.classes),))
    found = []
    for signals in seen:
        # The engines' in_flight is of the pool, here one, and the gateway's of each class.
        state = a_state(spec, window_s=WINDOW_S, **{k: v for k, v in signals.items() if k != "in_flight"})
        state.classes.in_flight[:] = signals["in_flight"]
        counter.update(state)
        found.append(counter.mean_tokens.copy())
    return np.array(found)


def test_before_any_data_a_request_is_typical(a_spec: Any, a_state: Any) -> None:
    counter = AnswerLengths((1,))
    assert counter.mean_tokens.tolist() == [TYPICAL_OUTPUT_TOKENS]
    counter.update(a_state(a_spec(), mean_output_tokens=np.nan))
    assert counter.mean_tokens.tolist() == [TYPICAL_OUTPUT_TOKENS]


def test_ten_typical_requests_are_counted_before(a_spec: Any, a_state: Any) -> None:
    counter = AnswerLengths((1,))
    counter.update(a_state(a_spec(), window_s=1e-6, finished_per_s=30e6, mean_output_tokens=1000.0))
    assert counter.mean_tokens[0] == pytest.approx((10 * TYPICAL_OUTPUT_TOKENS + 30 * 1000) / 40)


def test_answers_of_minutes_are_not_taken_for_short_ones(a_spec: Any, a_state: Any) -> None:
    spec = a_spec()
    seen = windows([(5.0, 4000.0)], minutes=10)  # an answer takes 200 s in the mean
    counted = estimates(a_state, spec, seen)[:, 0]
    ended = np.array([item["finished_per_s"][0] for item in seen]).cumsum()
    tokens = np.array([np.nan_to_num(item["finished_per_s"] * item["mean_output_tokens"])[0] for item in seen]).cumsum()
    five, ten = 29, 59  # minutes
    assert tokens[five] / ended[five] < 0.55 * 4000.0  # of finished requests
    assert counted[five] > 0.65 * 4000.0
    assert counted[ten] == pytest.approx(4000.0, rel=0.1)


def test_a_burst_of_answers_none_of_which_is_short_is_not_taken_for_endless_ones(a_spec: Any, a_state: Any) -> None:
    """One in a hundred has ended after ten seconds; the tokens generated are twenty thousand for each that ended."""
    counter = AnswerLengths((1,))
    state = a_state(a_spec(), finished_per_s=1.0, mean_output_tokens=150.0, generation_tokens_per_s=20_000.0)
    state.classes.in_flight[:] = 990.0
    counter.update(state)
    assert 150.0 < counter.mean_tokens[0] < 2.0 * TYPICAL_OUTPUT_TOKENS


def test_in_the_long_run_it_is_the_mean_whatever_else_is_generated(a_spec: Any, a_state: Any) -> None:
    spec = a_spec(kinds=("interactive", "batch"))
    streams = [(6.0, 150.0), (1.0, 3000.0)]
    late = estimates(a_state, spec, windows(streams, minutes=60))[60:].mean(axis=0)
    assert late == pytest.approx([150.0, 3000.0], rel=0.05)


def test_without_the_engines_tokens_finished_requests_count(a_spec: Any, a_state: Any) -> None:
    spec = a_spec()
    seen = windows([(6.0, 150.0)], minutes=20)
    for missing in (np.nan, 0.0):
        without = [{**item, "generation_tokens_per_s": missing} for item in seen]
        assert estimates(a_state, spec, without)[-1, 0] == pytest.approx(150.0, rel=0.1)


@pytest.mark.parametrize("name", ["finished_per_s", "mean_output_tokens", "in_flight"])
def test_a_class_that_cannot_be_read_changes_nothing_and_takes_nothing_from_others(
    a_spec: Any, a_state: Any, name: str
) -> None:
    spec = a_spec(kinds=("interactive", "batch"))
    counter = AnswerLengths((2,))
    signals = {"finished_per_s": [2.0, 1.0], "mean_output_tokens": [100.0, 1000.0], "generation_tokens_per_s": 1200.0}
    known = a_state(spec, **signals)
    known.classes.in_flight[:] = [5.0, 9.0]
    for _ in range(200):
        counter.update(known)
    half = a_state(spec, **{**signals, "generation_tokens_per_s": 9000.0})
    half.classes.in_flight[:] = [5.0, 9.0]
    getattr(half.classes, name)[1] = np.nan
    for _ in range(10):
        counter.update(half)
    assert counter.mean_tokens == pytest.approx([100.0, 1000.0], rel=1e-3)


def test_an_idle_class_forgets_nothing(a_spec: Any, a_state: Any) -> None:
    spec = a_spec()
    counter = AnswerLengths((1,))
    counter.update(a_state(spec, finished_per_s=50.0, mean_output_tokens=700.0, generation_tokens_per_s=35_000.0))
    before = counter.mean_tokens.copy()
    for _ in range(10_000):  # more than a day
        counter.update(a_state(spec, mean_output_tokens=np.nan))
    counter.update(a_state(spec, finished_per_s=0.1, mean_output_tokens=100.0, generation_tokens_per_s=10.0))
    assert before[0] * 0.98 < counter.mean_tokens[0] < before[0]


def test_what_was_counted_fades_in_five_minutes(a_spec: Any, a_state: Any) -> None:
    spec = a_spec()
    counter = AnswerLengths((1,))
    for tokens in (100.0,) * 300 + (1000.0,) * 30:  # windows of ten seconds
        counter.update(a_state(spec, finished_per_s=1.0, mean_output_tokens=tokens, generation_tokens_per_s=tokens))
    assert counter.mean_tokens[0] == pytest.approx(1000.0 - 900.0 * np.exp(-1.0), rel=0.01)


def test_answers_that_never_end_are_not_taken_for_endless_ones(a_spec: Any, a_state: Any) -> None:
    """Every client hangs up: tokens are generated, and nothing finishes, for four days."""
    spec = a_spec()
    counter = AnswerLengths((1,))
    for _ in range(100):
        counter.update(a_state(spec, finished_per_s=1.0, mean_output_tokens=500.0, generation_tokens_per_s=500.0))
    left = a_state(spec, mean_output_tokens=np.nan, generation_tokens_per_s=500.0)
    left.classes.in_flight[:] = 5.0
    for _ in range(35_000):
        counter.update(left)
    assert counter.mean_tokens[0] == pytest.approx(MOST * 500.0, rel=0.01)
