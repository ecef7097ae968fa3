"""What happens at one and the same moment: replicas first, lowest slot first, then arrivals, then the control step.

Every iteration lasts exactly 1 s here, so whole seconds are crowded.
"""

from __future__ import annotations

from typing import Any

import pytest


def test_of_two_arrivals_at_once_the_first_starts_alone(play: Any) -> None:
    """The first wakes the replica, and replicas come before arrivals."""
    requests = play([{"name": "p"}], [(0.0, "chat", 1, 1), (0.0, "chat", 1, 1)])
    assert requests["scheduled_s"].tolist() == [0.0, 1.0]


def test_an_arrival_at_an_iterations_end_waits_for_the_next(play: Any) -> None:
    """At 3 s the replica has begun its fourth iteration when the request arrives; inside a leap as outside of it."""
    requests = play([{"name": "p"}], [(0.0, "chat", 1, 9), (3.0, "chat", 1, 1)])
    assert requests["scheduled_s"].tolist() == [0.0, 4.0]


@pytest.mark.parametrize(("first", "end_s"), [("mixed", 10.0), ("batch", 11.0)])
def test_a_later_slot_still_takes_what_an_earlier_one_gave_up(play: Any, first: str, end_s: float) -> None:
    """A batch request is evicted at 5 s and sent on to the other replica, one of whose iterations ends at 5 s, too.

    If that replica has the higher slot, its turn is still to come and it takes the request at once; else its next
    iteration has begun. The request has 5 of its 10 tokens; its recomputation yields the 6th.
    """
    pools = {"mixed": {"name": "mixed", "max_num_seqs": 1}, "batch": {"name": "batch", "role": "batch"}}
    order = [pools[first], pools["batch" if first == "mixed" else "mixed"]]
    rows = [(0.0, "batch", 1, 2), (0.0, "batch", 1, 20), (0.0, "batch", 1, 10), (4.5, "chat", 1, 3)]
    requests = play(order, rows)
    assert requests["num_evictions"].tolist() == [0, 0, 1, 0]
    assert requests["scheduled_s"].tolist() == [0.0, 1.0, 0.0, 5.0]
    assert requests["end_s"][2] == end_s
