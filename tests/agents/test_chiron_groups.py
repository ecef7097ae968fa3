from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.agents.chiron_groups import (
    QueuedBatch,
    RequestGroup,
    form_groups,
    plan_batch,
    queued_arrivals,
    work_bounds_tokens,
)


def queued(deadline_s: float, n: float, mean: float = 100.0, std: float = 0.0) -> QueuedBatch:
    return QueuedBatch(deadline_s, n, mean, std)


class TestQueueFromHistory:
    def test_newest_arrivals_are_the_queue(self):
        history = [(0.0, 10.0), (10.0, 10.0), (20.0, 10.0)]
        assert queued_arrivals(history, 15.0, oldest_arrival_s=5.0) == [(10.0, 5.0), (20.0, 10.0)]

    def test_what_history_cannot_explain_arrived_with_the_head(self):
        assert queued_arrivals([(20.0, 4.0)], 10.0, oldest_arrival_s=-50.0) == [(-50.0, 6.0), (20.0, 4.0)]

    def test_nothing_is_older_than_the_head(self):
        assert queued_arrivals([(0.0, 10.0)], 5.0, oldest_arrival_s=3.0) == [(3.0, 5.0)]

    def test_empty(self):
        assert queued_arrivals([(0.0, 10.0)], 0.0, oldest_arrival_s=0.0) == []

    @given(
        admitted=st.lists(st.floats(0.0, 100.0), max_size=20),
        length=st.floats(0.0, 500.0),
    )
    def test_sums_to_the_queue_in_order(self, admitted, length):
        history = [(10.0 * k, n) for k, n in enumerate(admitted)]
        found = queued_arrivals(history, length, oldest_arrival_s=-1.0)
        assert math.isclose(sum(n for _, n in found), length, abs_tol=1e-6)
        assert [time for time, _ in found] == sorted(time for time, _ in found)


class TestGroups:
    def test_similar_deadlines_share_a_group(self):
        # longest slack 600 s: width 60 s
        groups = form_groups([queued(t, 300) for t in (400, 430, 459, 460, 600)], now_s=0.0)
        assert [(g.deadline_s, g.num_requests) for g in groups] == [(400, 900), (460, 300), (600, 300)]

    def test_width_is_a_tenth_of_the_horizon(self):
        groups = form_groups([queued(t, 300) for t in (3000, 3300, 3359, 3361, 3600)], now_s=0.0)
        assert [g.deadline_s for g in groups] == [3000, 3361]

    def test_small_buckets_join_the_earlier_one_until_it_is_large(self):
        groups = form_groups([queued(100.0 * k, 150) for k in range(1, 7)], now_s=0.0)
        assert [(g.deadline_s, g.num_requests) for g in groups] == [(100, 300), (300, 300), (500, 300)]

    def test_a_small_last_group_joins_its_neighbour(self):
        groups = form_groups([queued(100, 500), queued(300, 199)], now_s=0.0)
        assert [(g.deadline_s, g.num_requests) for g in groups] == [(100, 699)]

    def test_moments_add_up(self):
        (group,) = form_groups([queued(100, 3, 50.0, 10.0), queued(101, 2, 20.0, 5.0)], now_s=0.0)
        assert group.work_tokens == 3 * 50 + 2 * 20
        assert group.work_variance == 3 * 100 + 2 * 25

    def test_empty_queue(self):
        assert form_groups([queued(10, 0)], now_s=0.0) == []

    @given(st.lists(st.tuples(st.floats(0, 4000), st.floats(1, 500)), min_size=1, max_size=40))
    def test_laws(self, items):
        groups = form_groups([queued(t, n) for t, n in items], now_s=0.0)
        assert math.isclose(sum(g.num_requests for g in groups), sum(n for _, n in items), rel_tol=1e-9)
        deadlines = [g.deadline_s for g in groups]
        assert deadlines == sorted(deadlines)
        assert deadlines[0] == min(t for t, _ in items)
        if len(groups) > 1:
            assert min(g.num_requests for g in groups) >= 200


def test_bound_is_the_normal_quantile_of_work_ahead():
    groups = [RequestGroup(10.0, 100, 20_000.0, 100 * 200.0**2), RequestGroup(20.0, 300, 60_000.0, 300 * 200.0**2)]
    assert work_bounds_tokens(groups, 1.645) == [
        pytest.approx(20_000 + 1.645 * 2000),
        pytest.approx(80_000 + 1.645 * 4000),
    ]


class TestSizing:
    def plan(self, groups, **changes):
        given = {
            "now_s": 0.0,
            "tokens_per_s": 1000.0,
            "instance_tokens_per_s": 500.0,
            "load_time_s": 60.0,
            "loading": 0,
            "z": 0.0,
        }
        return plan_batch(groups, **(given | changes))

    def test_closed_form(self):
        # slack 600 s: 600 k tokens are served anyway; 900 k - 600 k over 500 * 540 = 1.11 -> 2
        plan = self.plan([RequestGroup(600.0, 9000, 900_000.0, 0.0)])
        assert (plan.instances, plan.backpressure, plan.num_lost) == (2, 1, 0)

    def test_no_instance_for_queue_length_alone(self):
        assert self.plan([RequestGroup(3600.0, 30_000, 3_000_000.0, 0.0)]).instances == 0

    def test_the_hardest_group_counts(self):
        groups = [RequestGroup(600.0, 1, 650_000.0, 0.0), RequestGroup(1200.0, 1, 1_500_000.0, 0.0)]
        # first: 50 k / 270 k -> 1; second: (2.15 M - 1.2 M) / (500 * 1140) = 1.67 -> 2
        assert self.plan(groups).instances == 2
        assert self.plan(groups).backpressure == 2

    def test_loading_instances_are_counted(self):
        group = RequestGroup(600.0, 9000, 900_000.0, 0.0)
        assert self.plan([group], loading=1).instances == 1
        assert self.plan([group], loading=5).instances == 0

    def test_what_cannot_be_saved_asks_for_nothing(self):
        plan = self.plan([RequestGroup(50.0, 700, 100_000.0, 0.0)])
        assert (plan.instances, plan.backpressure, plan.num_lost) == (0, 1, 700)

    def test_late_work_that_nothing_serves_gets_one(self):
        assert self.plan([RequestGroup(-5.0, 700, 100_000.0, 0.0)], tokens_per_s=0.0).instances == 1
        assert self.plan([RequestGroup(-5.0, 700, 100_000.0, 0.0)], tokens_per_s=0.0, loading=1).instances == 0

    def test_the_bound_counts_not_the_mean(self):
        group = RequestGroup(600.0, 6000, 599_000.0, 6000 * 100.0**2)
        assert self.plan([group], z=0.0).instances == 0
        assert self.plan([group], z=1.645).instances == 1

    def test_no_queue(self):
        assert self.plan([], tokens_per_s=0.0).instances == 0

    @given(
        works=st.lists(st.floats(1e3, 5e6), min_size=1, max_size=6),
        slacks=st.lists(st.floats(0.0, 4000.0), min_size=6, max_size=6),
        rate=st.floats(0.0, 5000.0),
    )
    def test_fewest_instances_that_bring_backpressure_to_zero(self, works, slacks, rate):
        ordered = sorted(slacks)[: len(works)]
        groups = [RequestGroup(s, 1, w, 0.0) for s, w in zip(ordered, works, strict=True)]
        plan = self.plan(groups, tokens_per_s=rate)

        def missed(k: int) -> bool:
            """A group that could be saved is late with k more instances that serve once loaded."""
            ahead = 0.0
            for group in groups:
                ahead += group.work_tokens
                served = rate * group.deadline_s + 500.0 * k * max(0.0, group.deadline_s - 60.0)
                if group.deadline_s > 60.0 and ahead > served * (1 + 1e-9) + 1e-3:
                    return True
            return False

        assert not missed(plan.instances)
        if plan.instances > (1 if rate == 0 else 0):
            assert missed(plan.instances - 1)
