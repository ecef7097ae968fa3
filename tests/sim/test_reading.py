"""What a client has read, in closed form, against token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.sim.layout import REQUEST, Outcome
from rl_autoscale.sim.measures import quality_of_experience
from rl_autoscale.sim.reading import read_on

READER = {"ttft_slo_s": 1.0, "tpot_slo_s": 1.0}
STRETCH = st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 0.5), st.integers(0, 12))
"""A pause before it, the gap between its tokens, and their number."""


def qoe_token_by_token(delivered_s: list[float], ttft_s: float, token_s: float) -> float:
    """By the definition; the request came at 0."""
    due_s = [ttft_s + i * token_s for i in range(len(delivered_s))]
    read_s = [max(delivered_s[0], due_s[0])]
    for time_s in delivered_s[1:]:
        read_s.append(max(time_s, read_s[-1] + token_s))
    end_s = read_s[-1] + token_s
    return 1.0 - sum(np.subtract(read_s, due_s)) / sum(end_s - due for due in due_s)


@given(
    first_s=st.floats(0.01, 4.0),
    stretches=st.lists(STRETCH, min_size=1, max_size=5),
    ttft_s=st.floats(0.1, 3.0),
    token_s=st.floats(0.01, 0.8),
)
def test_pauses_are_counted_where_they_were(
    first_s: float, stretches: list[tuple[float, float, int]], ttft_s: float, token_s: float
) -> None:
    """All but the last stretch are booked when the stream is interrupted, the last one at its end."""
    delivered_s = [first_s]
    read_s, late_s = read_on(ttft_s - token_s, 0, first_s, first_s, 1, ttft_s, token_s)
    record = np.zeros(1, dtype=REQUEST)
    for k, (pause_s, gap_s, tokens) in enumerate(stretches):
        since_s = delivered_s[-1] + pause_s
        come_s = [since_s + (j + 1) * gap_s for j in range(tokens)]
        if k < len(stretches) - 1:
            until_s = come_s[-1] if tokens else since_s
            read_s, more_s = read_on(read_s, len(delivered_s), since_s, until_s, tokens, ttft_s, token_s)
            late_s += more_s
        else:
            record["read_s"], record["late_s"], record["read_from_s"] = read_s, late_s, since_s
            record["read_tokens"] = len(delivered_s)
        delivered_s += come_s
    record["first_token_s"], record["last_token_s"] = delivered_s[0], delivered_s[-1]
    record["output_tokens"], record["outcome"] = len(delivered_s), Outcome.FINISHED
    (qoe,) = quality_of_experience(record, ttft_s, token_s)
    assert qoe == pytest.approx(qoe_token_by_token(delivered_s, ttft_s, token_s), abs=1e-9)


def test_an_engine_books_pauses(play: Any) -> None:
    """Two tokens, a second's pause for a short request, and 18 more: all of these are read a second late."""
    rows = [(0.0, "chat", 10, 20), (0.5, "chat", 20, 1)]
    pool = {"name": "p", "kv_blocks": 2, "scheduler": "fastserve", "block_move_s": 0.0}
    requests = play([pool], rows, chat=READER)
    delivered_s = [1.0, 2.0, *np.arange(4.0, 22.0)]
    assert requests["end_s"][0] == delivered_s[-1]
    (qoe, _) = quality_of_experience(requests, 1.0, 1.0)
    assert qoe == pytest.approx(1.0 - 18 / 230)
    assert qoe == pytest.approx(qoe_token_by_token(delivered_s, 1.0, 1.0))


def test_an_engine_books_what_is_computed_again(play: Any) -> None:
    """vLLM preempts the second when the cache is full; it comes back when the first has left, and recomputes."""
    rows = [(0.0, "chat", 14, 30), (0.0, "chat", 14, 30)]
    requests = play([{"name": "p", "kv_blocks": 4}], rows, chat=READER)
    assert requests["num_preemptions"].tolist() == [0, 1]
    pause_begins = 30 - (requests["end_s"][1] - requests["end_s"][0])  # tokens that it had
    delivered_s = [2.0 + j for j in range(int(pause_begins))]
    delivered_s += list(np.arange(requests["end_s"][1] - (30 - len(delivered_s)) + 1, requests["end_s"][1] + 1))
    qoe = quality_of_experience(requests, 1.0, 1.0)
    assert 2 < len(delivered_s[: int(pause_begins)]) < 28
    assert qoe[1] == pytest.approx(qoe_token_by_token(delivered_s, 1.0, 1.0), abs=1e-9)


def test_an_engine_books_a_stay_on_the_host(play: Any) -> None:
    """Three tokens, a place taken by a short request for two seconds, and the other six from where it was."""
    rows = [(0.0, "batch", 1, 9), (0.5, "batch", 40, 9), (5.5, "chat", 1, 2)]
    requests = play([{"name": "p", "max_num_batched_tokens": 16}], rows, batch=READER, eviction="host")
    assert requests["num_evictions"].tolist() == [0, 1, 0]
    assert requests["end_s"][1] == 14.0
    delivered_s = [time_s - 0.5 for time_s in (4.0, 5.0, 6.0, *np.arange(9.0, 15.0))]
    assert quality_of_experience(requests, 1.0, 1.0)[1] == pytest.approx(qoe_token_by_token(delivered_s, 1.0, 1.0))
