"""Of requests that wait those of much work are refused first; iterations last 1 s and compute 4 prompt tokens.

The metronome counts an answer's token as one prompt token, and answers are taken for 1,000 tokens until some have
ended, so works of 1,004 and 1,012 tokens differ little: the exponents here are large.
"""

from __future__ import annotations

from typing import Any

import pytest

from rl_autoscale.sim.layout import Outcome

WIDE = [{"name": "p", "max_num_seqs": 4, "max_num_batched_tokens": 4}]
CHAT = {"ttft_slo_s": 10.0}
ROWS = [(0.0, "chat", 8, 4), (1.0, "chat", 12, 2), (1.0, "chat", 4, 2)]
"""The first prompt takes 2 s, so for 1 s the others would wait."""


def refused(requests: Any) -> list[bool]:
    return [bool(outcome == Outcome.REFUSED) for outcome in requests["outcome"]]


@pytest.mark.parametrize(("selectivity", "expected"), [(0.0, [False] * 3), (2000.0, [False, True, False])])
def test_behind_others_the_long_prompt_is_refused_and_the_short_one_is_not(
    play: Any, selectivity: float, expected: list[bool]
) -> None:
    requests = play(WIDE, ROWS, chat=CHAT, admission=(1.0, 1.0), selectivity=(selectivity, 0.0))
    assert refused(requests) == expected


def test_with_nothing_to_wait_for_nobody_is_refused_for_being_long(play: Any) -> None:
    rows = [(0.0, "chat", 1, 1), (5.0, "chat", 36, 1)]
    requests = play(WIDE, rows, chat=CHAT, admission=(1.0, 1.0), selectivity=(1000.0, 0.0))
    assert refused(requests) == [False, False]


def test_each_class_has_its_own_mean_and_exponent(play: Any) -> None:
    """The batch request is as long as the chat's that is refused above, and alone in its class; the next one is not."""
    rows = [ROWS[0], (1.0, "batch", 12, 2), (1.0, "batch", 20, 2), (1.0, "chat", 12, 2)]
    slo = {"ttft_slo_s": 30.0}
    requests = play(WIDE, rows, chat=CHAT, batch=slo, admission=(1.0, 1.0), selectivity=(0.0, 2000.0))
    assert refused(requests) == [False, False, True, False]
