"""HPA behaviour: windows and rate limits, against numbers worked out by hand from the documentation."""

from __future__ import annotations

from rl_autoscale.agents.kubernetes import HpaHistory, ScalingRules, average_value_replicas


def test_growth_waits_for_its_window_and_takes_the_least_wish() -> None:
    history = HpaHistory(up=ScalingRules(30.0, fraction=1.0, replicas=4, period_s=60.0))
    wishes = [(0.0, 9), (15.0, 7), (30.0, 8), (45.0, 9)]
    # the window begins with the current count; at 30 s it holds 7 and 8, at 45 s 8 and 9
    assert [history.stabilised(wish, 4, now_s) for now_s, wish in wishes] == [4, 4, 7, 8]


def test_shrinking_takes_the_largest_wish_of_its_window() -> None:
    history = HpaHistory(down=ScalingRules(60.0, fraction=1.0, replicas=0))
    assert history.stabilised(3, 10, 0.0) == 10  # the window begins with the current count
    assert history.stabilised(6, 10, 30.0) == 10
    assert history.stabilised(2, 10, 60.0) == 6
    assert history.stabilised(2, 6, 90.0) == 2


def test_periods_of_both_directions_are_their_own() -> None:
    up = ScalingRules(0.0, fraction=1.0, replicas=4, period_s=60.0)
    history = HpaHistory(up, ScalingRules(0.0, fraction=0.0, replicas=1, period_s=120.0))
    assert history.limited(20, 3, 0.0) == 7  # max(100 %, 4) of 3
    assert history.limited(20, 7, 30.0) == 7  # the period began with 3
    assert history.limited(20, 7, 60.0) == 14
    calm = HpaHistory(up, ScalingRules(0.0, fraction=0.0, replicas=1, period_s=120.0))
    assert [calm.limited(2, n, t) for n, t in [(5, 0.0), (4, 60.0), (4, 120.0)]] == [4, 4, 3]


def test_average_value() -> None:
    assert average_value_replicas(33.0, target=16.0, current=2, tolerance=0.1) == 2  # 3 % above
    assert average_value_replicas(36.0, target=16.0, current=2, tolerance=0.1) == 3
    assert average_value_replicas(0.0, target=16.0, current=2, tolerance=0.1) == 0
