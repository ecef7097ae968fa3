"""Patience ends when it ends, however late somebody looks; iterations last 1 s."""

from __future__ import annotations

from typing import Any

import numpy as np

from rl_autoscale.sim.layout import Outcome

ONE_AT_A_TIME = [{"name": "p", "max_num_seqs": 1}]


def test_it_is_booked_when_it_ended(play: Any) -> None:
    requests = play(ONE_AT_A_TIME, [(0.0, "chat", 1, 30), (3.5, "chat", 1, 1)], chat={"timeout_s": 1.0})
    assert requests["outcome"].tolist() == [Outcome.FINISHED, Outcome.TIMED_OUT]
    assert requests["end_s"].tolist() == [30.0, 4.5]
    assert np.isnan(requests["dispatched_s"][1])


def test_nobody_waits_behind_those_who_are_gone(play: Any) -> None:
    """Five requests give up at 4.5 s, in the middle of a leap; the estimate at 6.25 s does not count them.

    The first request stayed 2 s and one is in flight, so each place in the queue is worth 2 s: 3 s with an iteration
    for its own prompt, 13 s if the five were still there. 5 s are allowed.
    """
    rows = [(0.0, "chat", 1, 2), (3.0, "chat", 1, 30), *[(3.5, "chat", 1, 1)] * 5, (6.25, "batch", 1, 1)]
    requests = play(ONE_AT_A_TIME, rows, chat={"timeout_s": 1.0}, admission=(np.inf, 0.05))
    assert requests["outcome"].tolist() == [Outcome.FINISHED] * 2 + [Outcome.TIMED_OUT] * 5 + [Outcome.FINISHED]


def test_the_estimate_does_refuse(play: Any) -> None:
    rows = [(0.0, "chat", 1, 2), (3.0, "chat", 1, 30), *[(3.5, "chat", 1, 1)] * 5, (6.25, "batch", 1, 1)]
    requests = play(ONE_AT_A_TIME, rows, admission=(np.inf, 0.05))
    assert requests["outcome"].tolist() == [Outcome.FINISHED] * 7 + [Outcome.REFUSED]


def test_before_any_answer_has_ended_the_first_counts_for_as_long_as_it_has_stayed(play: Any) -> None:
    """Nobody knows how long a place is taken: after 3.25 s for 3.25 s, so that two are more than the 5 s allowed."""
    rows = [(0.0, "chat", 1, 30), (3.0, "chat", 1, 1), (3.25, "batch", 1, 1), (3.5, "chat", 1, 1)]
    requests = play(ONE_AT_A_TIME, rows, admission=(np.inf, 0.05))
    assert requests["outcome"].tolist() == [Outcome.FINISHED] * 2 + [Outcome.REFUSED, Outcome.FINISHED]


def test_a_stream_that_has_begun_waits_for_ever(play: Any) -> None:
    """Evicted at 4 s with 4 of its 9 tokens, it is held until 24 s, far beyond its class's patience."""
    rows = [(0.0, "batch", 1, 9), (3.5, "chat", 1, 20)]
    requests = play(ONE_AT_A_TIME, rows, batch={"timeout_s": 1.0})
    assert requests["num_evictions"].tolist() == [1, 0]
    assert requests["outcome"].tolist() == [Outcome.FINISHED] * 2
    assert requests["end_s"].tolist() == [29.0, 24.0]
