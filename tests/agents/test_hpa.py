from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.hpa import HpaPolicy, desired_replicas
from rl_autoscale.agents.signals import queue_per_pool


def desired(load: float, ready: int, *, target: float = 100.0, unready: int = 0, partial: bool = False) -> int:
    return desired_replicas(
        load, target=target, ready=ready, unready=unready, current=ready + unready, tolerance=0.1, partial=partial
    )


class TestDocumentedRule:
    def test_examples_of_the_documentation(self):
        # "if the current metric value is 200m and the desired value is 100m, the number of replicas will be doubled;
        # if the current value is 50m, halved"
        assert desired(200.0 * 4, 4) == 8
        assert desired(50.0 * 4, 4) == 2

    @pytest.mark.parametrize(("ratio", "expected"), [(0.9, 10), (1.1, 10), (1.11, 12), (0.89, 9), (1.0, 10)])
    def test_tolerance_is_a_tenth_on_both_sides(self, ratio, expected):
        assert desired(ratio * 1000.0, 10) == expected

    def test_result_is_rounded_up(self):
        assert desired(1010.0, 4) == 11

    def test_unready_replicas_count_as_idle_when_growing(self):
        assert desired(800.0, 4, unready=2) == 8  # 800 / (6 * 100) = 1.33 -> ceil(1.33 * 6)
        assert desired(800.0, 4, unready=4) == 8  # exactly at the target with them: hold
        assert desired(800.0, 4, unready=6) == 10  # 0.8 with them: the direction would reverse, hold
        assert desired(640.0, 4, unready=2) == 6  # 1.07 with them: inside the tolerance, hold

    def test_unready_replicas_do_not_count_when_shrinking(self):
        assert desired(200.0, 4, unready=2) == 2

    def test_missing_load_grows_but_never_shrinks(self):
        assert desired(0.0, 4, partial=True) == 4
        assert desired(100.0, 4, partial=True) == 4
        assert desired(800.0, 4, partial=True) == 8


class TestPolicy:
    def drive(self, make_spec, make_state, loads, *, step_s=15.0, ready=None, **knobs):
        """Feed in-flight totals, granting every decision at once; returns the targets."""
        spec = make_spec(pool={"initial_replicas": 4})
        policy = HpaPolicy(target=10.0, **knobs)
        policy.reset(spec)
        replicas, targets = 4, []
        for k, load in enumerate(loads):
            state = make_state(spec, time_s=k * step_s, running=load, ready=ready or replicas, asked_for=replicas)
            replicas = int(policy.decide(state).target_replicas[0])
            targets.append(replicas)
        return targets

    def test_growth_is_limited_to_double_or_four_more(self, make_spec, make_state):
        assert self.drive(make_spec, make_state, [10_000] * 4) == [8, 16, 32, 50]
        assert self.drive(make_spec, make_state, [60, 10_000], step_s=300.0) == [6, 12]

    def test_growth_within_one_period_counts_once(self, make_spec, make_state):
        # syncs 5 s apart share the 15 s period: 4 -> 8, then no more until the event is 15 s old
        assert self.drive(make_spec, make_state, [10_000] * 4, step_s=5.0, sync_period_s=5.0) == [8, 8, 8, 16]

    def test_shrinking_waits_for_the_largest_recommendation_of_the_window(self, make_spec, make_state):
        loads = [80] + [20] * 20 + [20]
        targets = self.drive(make_spec, make_state, loads)
        # 80 in flight asks for 8; at 300 s the recommendation made at 0 s leaves the window
        assert targets[:20] == [8] * 20
        assert targets[20] == 2

    def test_the_window_starts_with_the_current_replicas(self, make_spec, make_state):
        assert self.drive(make_spec, make_state, [10] * 21)[:20] == [4] * 20

    def test_a_new_peak_restarts_the_wait(self, make_spec, make_state):
        targets = self.drive(make_spec, make_state, [80] + [20] * 15 + [60] + [20] * 21)
        assert targets[20] == 6  # the peak of 8 has left, the one of 6 has not
        assert targets[35] == 6
        assert targets[36] == 2

    def test_acts_on_the_first_control_step_after_the_sync_period(self, make_spec, make_state):
        # control steps of 10 s: syncs at 0, 20, 40 s
        assert self.drive(make_spec, make_state, [10_000] * 5, step_s=10.0) == [8, 8, 16, 16, 32]

    def test_gateway_queue_counts(self, make_spec, make_state):
        spec = make_spec()
        policy = HpaPolicy(target=10.0)
        policy.reset(spec)
        state = make_state(spec, ready=4, running=20, waiting=10, queue_length=30)
        assert policy.decide(state).target_replicas[0] == 6

    def test_missing_everything_holds_and_records_nothing(self, make_spec, make_state):
        spec = make_spec()
        policy = HpaPolicy(target=10.0)
        policy.reset(spec)
        blind = make_state(spec, ready=7, running=np.nan, queue_length=np.nan)
        assert policy.decide(blind).target_replicas[0] == 7

    def test_missing_engine_metrics_never_shrink_but_the_queue_grows(self, make_spec, make_state):
        spec = make_spec()
        policy = HpaPolicy(target=10.0, down_stabilisation_s=0.0)
        policy.reset(spec)
        for k in range(5):
            state = make_state(spec, time_s=15.0 * k, ready=4, running=np.nan, queue_length=0)
            assert policy.decide(state).target_replicas[0] == 4
        state = make_state(spec, time_s=90.0, ready=4, running=np.nan, queue_length=70)
        assert policy.decide(state).target_replicas[0] == 7

    def test_no_ready_replica_means_no_metric(self, make_spec, make_state):
        spec = make_spec()
        policy = HpaPolicy(target=10.0)
        policy.reset(spec)
        state = make_state(spec, ready=0, starting=3, asked_for=3, queue_length=1000)
        assert policy.decide(state).target_replicas[0] == 3

    def test_keeps_at_least_one_replica(self, make_spec, make_state):
        spec = make_spec()
        policy = HpaPolicy(down_stabilisation_s=0.0)
        policy.reset(spec)
        assert policy.decide(make_state(spec, ready=3)).target_replicas[0] == 1
        assert policy.decide(make_state(spec, time_s=20.0, ready=0, asked_for=0)).target_replicas[0] == 1

    def test_pools_scale_on_their_own(self, make_spec, make_state):
        spec = make_spec("interactive", "mixed", pool={"initial_replicas": 2})
        policy = HpaPolicy(target=10.0)
        policy.reset(spec)
        state = make_state(spec, ready=2, running=[40, 10], queue_length=20)
        assert policy.decide(state).target_replicas.tolist() == [5, 2]


def test_queue_is_shared_by_ready_replicas(make_spec, make_state):
    spec = make_spec("interactive", "mixed")
    assert queue_per_pool(spec, make_state(spec, ready=[3, 1], queue_length=8)).tolist() == [6.0, 2.0]
    assert queue_per_pool(spec, make_state(spec, ready=0, queue_length=8)).tolist() == [8.0, 0.0]
    assert np.isnan(queue_per_pool(spec, make_state(spec, queue_length=np.nan))).all()
