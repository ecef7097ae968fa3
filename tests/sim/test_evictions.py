"""Batch work makes room for interactive requests; iterations last 1 s."""

from __future__ import annotations

from typing import Any


def test_the_youngest_running_one_leaves_when_its_iteration_ends(play: Any) -> None:
    rows = [(0.0, "batch", 1, 9), (0.5, "batch", 1, 9), (3.5, "chat", 1, 2)]
    requests = play([{"name": "p"}], rows)
    assert requests["num_evictions"].tolist() == [0, 1, 0]
    assert requests["scheduled_s"].tolist() == [0.0, 1.0, 4.0]
    assert requests["end_s"][2] == 6.0
    # Back at 6 s with 3 of its 9 tokens: its recomputation gives the 4th at 7 s, the 9th follows at 12 s.
    assert requests["dispatched_s"].tolist() == [0.0, 6.0, 3.5]
    assert requests["end_s"].tolist() == [9.0, 12.0, 6.0]


def test_one_that_waits_in_the_engine_leaves_at_once_and_goes_where_there_is_room(play: Any) -> None:
    """It arrived at 1.75 s when the batch pool was full; at 2 s a place became free there; at 2.25 s it is evicted."""
    pools = [{"name": "batch", "role": "batch"}, {"name": "mixed"}]
    rows = [(0.0, "batch", 1, 2), (0.0, "batch", 1, 20), (0.5, "batch", 1, 20), (1.75, "batch", 1, 2)]
    requests = play(pools, [*rows, (2.25, "chat", 1, 1)])
    assert requests["num_evictions"].tolist() == [0, 0, 0, 1, 0]
    assert requests["replica"][3] == requests["replica"][1]
    assert requests["dispatched_s"][3] == 2.25
    assert requests["scheduled_s"].tolist() == [0.0, 1.0, 0.5, 3.0, 2.5]


def test_an_evicted_head_of_line_makes_way_for_those_behind_it(play: Any) -> None:
    """The second request's 7 blocks do not fit beside the first's 4 of 8; when it leaves, the next ones do.

    The running decode batch is in the middle of a leap of 29 iterations that the waiting ones could not have joined.
    """
    rows = [(0.0, "batch", 60, 30), (1.5, "batch", 100, 1), (2.5, "chat", 10, 1), (4.5, "chat", 10, 1)]
    requests = play([{"name": "p", "max_num_seqs": 3, "kv_blocks": 8}], rows)
    assert requests["num_evictions"].tolist() == [0, 1, 0, 0]
    assert requests["scheduled_s"].tolist()[2:] == [5.0, 5.0]


def test_interactive_work_is_never_evicted(play: Any) -> None:
    rows = [(0.0, "chat", 1, 9), (0.5, "chat", 1, 9), (3.5, "chat", 1, 2)]
    requests = play([{"name": "p"}], rows)
    assert not requests["num_evictions"].any()
    assert requests["dispatched_s"][2] == 9.0
