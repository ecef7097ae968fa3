"""Requests go where the most KV blocks per request are free, in both simulators; iterations last 1 s."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.routing import freeness
from rl_autoscale.fleet.spec import FleetSpec

TWO = {"name": "p", "min_replicas": 2, "max_replicas": 2, "max_num_seqs": 4, "kv_blocks": 20}


@pytest.mark.parametrize(
    ("num_blocks", "virtual_blocks", "num_requests", "expected"),
    [(100, 40, 4, 15.0), (100, 130, 2, -15.0), (100, 0, 0, math.inf)],
)
def test_freeness(num_blocks: int, virtual_blocks: int, num_requests: int, expected: float) -> None:
    assert freeness(num_blocks, virtual_blocks, num_requests) == expected


@pytest.mark.parametrize(("arrival_s", "slot"), [(0.5, 0), (1.0, 1), (4.5, 1), (5.0, 0)])
def test_blocks_of_the_iteration_in_progress_count(play: Any, arrival_s: float, slot: int) -> None:
    """In iteration k the sequences have 63 + k and 59 + k tokens: a fifth block from the 2nd and from the 6th one on.

    Each replica decodes in one leap from 1 s on; at whole seconds its next iteration has begun.
    """
    rows = [(0.0, "chat", 64, 100), (0.0, "chat", 60, 100), (arrival_s, "chat", 1, 1)]
    requests = play([TWO], rows, router="freeness")
    assert requests["replica"].tolist() == [0, 1, slot]


def test_requests_that_come_at_once_are_spread_by_what_they_will_need(play: Any) -> None:
    """Free blocks per request after the first two: 17 against 19; then 17 and 7.5, 6.5 and 7.5, 6.5 and 3.7, 4 and 3.7.

    If only the head of each queue counted, the last one would find 4.3 against 5.
    """
    rows = [(0.0, "chat", tokens, 5) for tokens in (40, 10, 60, 60, 60, 10, 10)]
    assert play([TWO], rows, router="freeness")["replica"].tolist() == [0, 1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize(("router", "slot"), [("freeness", 1), ("least_loaded", 0)])
def test_a_blocked_head_of_line_keeps_others_away(play: Any, router: str, slot: int) -> None:
    """The third request waits for 7 blocks on the first replica, which then has less than none per request."""
    rows = [(0.0, "chat", 60, 30), (0.0, "chat", 100, 20), (1.5, "chat", 100, 1)]
    last = [(2.5, "chat", 10, 1), (2.6, "chat", 10, 1)]
    requests = play([TWO | {"kv_blocks": 8}], rows + last, router=router)
    assert requests["replica"].tolist() == [0, 1, 0, 1, slot]


def test_the_freest_of_several_pools_is_chosen(play: Any) -> None:
    pools = [
        {"name": "small", "max_num_seqs": 4, "kv_blocks": 10},
        {"name": "large", "max_num_seqs": 4, "kv_blocks": 20},
    ]
    rows = [(0.0, "chat", 10, 5)] * 4
    requests = play(pools, rows, router="freeness")
    assert requests["replica"].tolist() == [0, 2, 2, 0]  # each pool has two slots: the second one's begin at 2


@pytest.mark.parametrize(("headroom", "slot"), [(0, 0), (10, 1)])
def test_blocks_are_kept_free_beside_an_urgent_request(play: Any, headroom: int, slot: int) -> None:
    """19 free blocks per request on the first replica, 9 with the headroom; 13 on the second."""
    rows = [(0.0, "chat", 10, 3), (0.0, "batch", 100, 30), (1.5, "batch", 10, 1)]
    later = [(9.5, "batch", 10, 1)]  # when the urgent one has ended, nothing is kept free any more
    requests = play([TWO | {"urgent_headroom_blocks": headroom}], rows + later, router="freeness")
    assert requests["replica"].tolist() == [0, 1, slot, 0]


def test_headroom_that_nobody_would_see_is_refused() -> None:
    pool = {"name": "p", "profile": "llama-3.1-8b_a100_tp1", "urgent_headroom_blocks": 100}
    chat = {"name": "chat", "ttft_slo_s": 1, "tpot_slo_s": 0.1}
    with pytest.raises(SpecError, match=r"'p': urgent_headroom_blocks is used by router: freeness and by"):
        FleetSpec.from_dict({"pools": [pool], "classes": [chat, chat | {"name": "calm", "priority": 1}]})
    with pytest.raises(SpecError, match="none of its classes has it"):
        FleetSpec.from_dict({"pools": [pool], "classes": [chat], "router": "freeness"})
