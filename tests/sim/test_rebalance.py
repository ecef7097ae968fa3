"""Running sequences move to freer replicas of their pool, in both simulators; iterations last 1 s."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.routing import pair_for_balance

PROFILE = "llama-3.1-8b_a100_tp1"
REBALANCE = {"every_s": 10.0, "source_below": 6.0, "destination_above": 12.0}
POOL = {"name": "p", "min_replicas": 2, "max_replicas": 2, "max_num_seqs": 4, "kv_blocks": 20}
PACKED = {"router": "packing"}
"""All go to the first replica while it has room."""

LONG_AND_SHORT = [(0.0, "chat", 100, 50), (0.0, "chat", 60, 50)]
"""First tokens at 2 and 3 s. In the iteration from 10 s on they have 109 and 68 tokens: 12 blocks."""


def test_extremes_are_paired_first() -> None:
    freeness_of = [3.0, 70.0, -5.0, math.inf, 9.0, 90.0, 20.0]
    everybody = [True] * 7
    assert pair_for_balance(freeness_of, everybody, everybody, 10.0, 60.0) == [(2, 3), (0, 5), (4, 1)]
    assert pair_for_balance(freeness_of, everybody, everybody, 5.0, 80.0) == [(2, 3), (0, 5)]
    assert pair_for_balance([1.0, 1.0, 80.0, 80.0], everybody, everybody, 10.0, 60.0) == [(0, 2), (1, 3)]


def test_who_has_nothing_to_give_or_no_room_is_in_no_pair() -> None:
    gives, takes = [False, True, True, True], [True, True, True, False]
    assert pair_for_balance([-9.0, 1.0, 70.0, 90.0], gives, takes, 10.0, 60.0) == [(1, 2)]


@pytest.mark.parametrize(("urgency_of_the_long_one", "mover"), [("chat", 1), ("batch", 0)])
def test_the_least_urgent_one_moves_and_of_those_the_shortest(
    play: Any, urgency_of_the_long_one: str, mover: int
) -> None:
    """(20 - 12) / 2 blocks are free per request at 10 s. It leaves at 11 s and goes on at once."""
    rows = [(0.0, urgency_of_the_long_one, 100, 50), LONG_AND_SHORT[1]]
    requests = play([POOL | {"rebalance": REBALANCE}], rows, **PACKED)
    assert requests["replica"][[mover, 1 - mover]].tolist() == [1, 0]
    assert requests["dispatched_s"][[mover, 1 - mover]].tolist() == [11.0, 0.0]
    assert requests["end_s"].tolist() == [2.0 + 49, 3.0 + 49]


def test_it_costs_what_its_blocks_cost_on_the_way_out_and_in(play: Any) -> None:
    """Five blocks in 2.5 s: beside the next iteration of the one that stays, and beside its own first one."""
    requests = play([POOL | {"rebalance": REBALANCE, "block_move_s": 0.5}], LONG_AND_SHORT, **PACKED)
    assert requests["end_s"].tolist() == [2.0 + 49 + 1.5, 3.0 + 49 + 1.5]


def test_nothing_moves_where_nobody_asks(play: Any) -> None:
    assert play([POOL], LONG_AND_SHORT, **PACKED)["replica"].tolist() == [0, 0]


def test_nothing_moves_to_where_blocks_would_be_short_too(play: Any) -> None:
    """One sequence of 15 blocks and more leaves fewer than 6 wherever it is; else it would move to and fro."""
    requests = play([POOL | {"rebalance": REBALANCE}], [(0.0, "chat", 240, 40)], **PACKED)
    assert requests["replica"].tolist() == [0]
    assert requests["dispatched_s"].tolist() == [0.0]


@pytest.mark.parametrize(("headroom", "slot"), [(0, 1), (8, 0)])
def test_nothing_moves_to_where_blocks_are_kept_for_an_urgent_one(play: Any, headroom: int, slot: int) -> None:
    """At 10 s the first replica has 4 blocks per request, the second 18, and 10 with the headroom."""
    rows = [(0.0, "batch", 100, 50), (0.0, "chat", 10, 60), (0.0, "batch", 60, 50)]
    pool = POOL | {"rebalance": REBALANCE, "urgent_headroom_blocks": headroom}
    assert play([pool], rows, router="round_robin")["replica"].tolist() == [0, 1, slot]


@pytest.mark.parametrize(("headroom", "slot"), [(5, 1), (6, 0)])
def test_an_urgent_one_brings_its_headroom_along(play: Any, headroom: int, slot: int) -> None:
    """Two urgent ones have 109 and 68 tokens at 10 s; at 11 s one of them would leave 15 of 20 blocks elsewhere."""
    bounds = {"every_s": 10.0, "source_below": 10.0, "destination_above": 12.0}
    pool = POOL | {"rebalance": bounds, "urgent_headroom_blocks": headroom}
    assert play([pool], LONG_AND_SHORT, **PACKED)["replica"].tolist() == [0, slot]


@pytest.mark.parametrize(("rebalance", "scheduled_s"), [(None, 62.0), (REBALANCE, 11.0)])
def test_a_blocked_head_of_line_gets_its_blocks(play: Any, rebalance: Any, scheduled_s: float) -> None:
    """Two sequences have 14 of 20 blocks and more, the third waits for 7 while the other replica is empty."""
    rows = [(0.0, "chat", 100, 61), (0.0, "chat", 100, 61), (5.5, "chat", 100, 1)]
    requests = play([POOL | {"rebalance": rebalance}], rows, **PACKED)
    assert requests["scheduled_s"][2] == scheduled_s


def test_bounds_and_schedulers_that_make_no_sense_are_refused() -> None:
    pool = {"name": "p", "profile": PROFILE}
    with pytest.raises(SpecError, match=r"source_below=9\.0 exceeds destination_above=8\.0"):
        PoolSpec.from_dict(pool | {"rebalance": {"source_below": 9.0, "destination_above": 8.0}})
    for option in ({"scheduler": "sarathi"}, {"kv_allocation": "contiguous"}, {"role": "decode"}):
        with pytest.raises(SpecError, match="rebalance goes with scheduler vllm or vllm-priority"):
            PoolSpec.from_dict(pool | option | {"rebalance": {}})
