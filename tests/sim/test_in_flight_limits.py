"""Of a class no more is in flight than its limit; iterations last 1 s, so each stream of two tokens takes 2 s."""

from __future__ import annotations

from typing import Any

from rl_autoscale.fleet.state import NO_LIMIT

WIDE = [{"name": "p", "max_num_seqs": 4}]
JOBS = [(0.0, "batch", 1, 2)] * 3


def test_batch_work_beyond_its_limit_is_held_while_there_is_room(play: Any) -> None:
    requests = play(WIDE, [*JOBS, (0.5, "chat", 1, 2)], max_in_flight=(NO_LIMIT, 1))
    assert requests["dispatched_s"].tolist() == [0.0, 2.0, 4.0, 0.5]
    assert requests["end_s"].tolist() == [2.0, 4.0, 6.0, 3.0]


def test_the_limit_is_over_all_replicas_and_nobody_overtakes(play: Any) -> None:
    """Two replicas, the first of which gets the long job: the fourth waits behind the third though one has room."""
    pools = [{"name": "p", "max_num_seqs": 4, "initial_replicas": 2, "max_replicas": 2}]
    rows = [(0.0, "batch", 1, 8), (0.0, "batch", 1, 2), (0.0, "batch", 1, 2), (1.0, "batch", 1, 2)]
    requests = play(pools, rows, max_in_flight=(NO_LIMIT, 2))
    assert requests["dispatched_s"].tolist() == [0.0, 0.0, 2.0, 4.0]
    assert requests["replica"][0] != requests["replica"][1]


def test_a_limit_of_none_at_all_holds_a_class_until_its_patience_ends(play: Any) -> None:
    requests = play(WIDE, [*JOBS, (0.5, "chat", 1, 2)], batch={"timeout_s": 3.0}, max_in_flight=(NO_LIMIT, 0))
    assert requests["end_s"].tolist() == [3.0, 3.0, 3.0, 2.5]
    assert requests["slo_met"].tolist() == [0, 0, 0, 1]
