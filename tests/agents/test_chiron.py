"""The three variants as policies: which loop does what in which pool, and what they do when blind."""

from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.chiron import ChironLiteralPolicy, ChironRobustPolicy, ChironTunedPolicy
from rl_autoscale.agents.chiron_batch import BatchLoop, instance_tokens_per_s
from rl_autoscale.fleet.errors import SpecError

CHAT = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
JOBS = {"name": "jobs", "kind": "batch", "ttft_slo_s": 3600.0, "tpot_slo_s": 1.0}


@pytest.fixture
def packed(make_spec):
    """One mixed pool, interactive traffic, packing router, start-up 60 s."""
    return make_spec(router="packing", pool={"initial_replicas": 3})


@pytest.fixture
def three_pools(make_spec):
    return make_spec("interactive", "mixed", "batch", classes=(CHAT, JOBS), router="packing")


def drive(policy, spec, make_state, busy, *, replicas=3, steps=1, step_s=10.0, **given):
    """Let a policy run with every decision granted at once; returns the targets of pool 0."""
    policy.reset(spec)
    targets = []
    for k in range(steps):
        state = make_state(
            spec,
            time_s=step_s * k,
            ready=replicas,
            busy_interactive=busy[k] if isinstance(busy, list) else busy,
            **given,
        )
        replicas = int(policy.decide(state).target_replicas[0])
        targets.append(replicas)
    return targets


class TestInteractiveLoop:
    def test_literal_moves_one_by_one(self, packed, make_state):
        assert drive(ChironLiteralPolicy(), packed, make_state, 2, steps=5) == [4, 5, 6, 6, 6]

    def test_literal_flips_where_theta_is_no_reciprocal(self, packed, make_state):
        targets = drive(ChironLiteralPolicy(theta=0.37), packed, make_state, 1, replicas=2, steps=8)
        assert targets == [3, 2] * 4

    def test_robust_and_tuned_jump_and_rest(self, packed, make_state):
        for policy in (ChironRobustPolicy(theta=0.37), ChironTunedPolicy(theta=0.37)):
            assert drive(policy, packed, make_state, 1, replicas=2, steps=8) == [3] * 8

    def test_robust_waits_one_load_time_between_removals(self, packed, make_state):
        targets = drive(ChironRobustPolicy(), packed, make_state, [3] * 7 + [1] * 7, replicas=15, steps=14)
        # nothing before 60 s, and not again before 120 s
        assert targets == [15] * 6 + [9] * 6 + [3] * 2

    def test_load_time_and_wait_are_knobs(self, packed, make_state):
        policy = ChironRobustPolicy(load_time_s=20.0)
        assert drive(policy, packed, make_state, [5, 3, 3, 1, 1], replicas=15, steps=5) == [15, 15, 9, 9, 3]
        policy = ChironRobustPolicy(down_wait_s=0.0)
        assert drive(policy, packed, make_state, [5, 3, 1], replicas=15, steps=3) == [15, 9, 3]

    def test_starting_replicas_count_in_the_denominator(self, packed, make_state):
        policy = ChironRobustPolicy()
        policy.reset(packed)
        state = make_state(packed, ready=3, starting=9, asked_for=12, busy_interactive=3)
        assert policy.decide(state).target_replicas[0] == 12  # N* = 9, the band reaches 12: neither up nor down

    @pytest.mark.parametrize("policy", [ChironLiteralPolicy(), ChironRobustPolicy()])
    def test_blind_may_add_but_not_remove(self, policy, make_spec, make_state):
        spec = make_spec("interactive", "mixed", router="packing")
        policy.reset(spec)
        half_blind = make_state(spec, ready=[1, 9], busy_interactive=[1, np.nan])
        assert policy.decide(half_blind).target_replicas.tolist() == [1, 9]
        busy = make_state(spec, time_s=100, ready=[6, 3], busy_interactive=[6, np.nan])
        assert policy.decide(busy).target_replicas.sum() > 9

    def test_stale_is_missing(self, packed, make_state):
        policy = ChironRobustPolicy(down_wait_s=0.0)
        assert drive(policy, packed, make_state, 0, replicas=9, age_s=31.0) == [9]
        assert drive(policy, packed, make_state, 0, replicas=9, age_s=30.0) == [1]

    def test_nothing_is_removed_before_the_first_window(self, packed, make_state):
        for policy in (ChironLiteralPolicy(), ChironRobustPolicy(down_wait_s=0.0)):
            assert drive(policy, packed, make_state, 0, replicas=9, window_s=0.0) == [9]

    def test_spreading_router_counts_work(self, make_spec, make_state):
        spec = make_spec(router="least_loaded")
        policy = ChironRobustPolicy(initial_batch=50.0, down_wait_s=0.0)
        # every instance is busy, but 70 requests fill only ceil(70 / 50) = 2: N* = 6
        targets = drive(policy, spec, make_state, 9, replicas=9, in_flight_interactive=70, in_flight=70)
        assert targets == [6]

    def test_capacity_above_what_is_busy_is_mixed(self, three_pools, make_state):
        policy = ChironRobustPolicy()
        policy.reset(three_pools)
        state = make_state(three_pools, ready=[1, 1, 0], busy_interactive=[1, 1, 0])
        assert policy.decide(state).target_replicas.tolist() == [2, 4, 0]


class TestLocalLoop:
    def test_batch_cap_follows_latency(self, packed, make_state):
        policy = ChironRobustPolicy()
        policy.reset(packed)
        caps = [
            int(policy.decide(make_state(packed, time_s=10 * k, itl_s=itl_s, in_flight=5)).max_batch_size[0])
            for k, itl_s in enumerate([0.08, 0.15])
        ]
        assert caps == [72, 36]  # 64 * (0.5 / 0.8 + 0.5) = 72; then the average ITL 0.115 exceeds the SLO

    def test_a_full_pool_without_batch_classes(self, packed, make_state):
        policy = ChironRobustPolicy()
        policy.reset(packed)
        full = make_state(
            packed, ready=3, busy_interactive=3, in_flight=192, generation_tokens_per_s=3000.0, itl_s=0.05
        )
        assert policy.decide(full).target_replicas.tolist() == [9]

    def test_user_cap_bounds_it(self, packed, make_state):
        policy = ChironRobustPolicy(batch_cap=40)
        policy.reset(packed)
        assert policy.decide(make_state(packed, itl_s=0.01)).max_batch_size[0] == 40


class TestBatchLoop:
    def queue(self, length, wait_s, **more):
        return {"queue_length": [0, length], "oldest_wait_s": [0, wait_s], "class_in_flight": [0, 0]} | more

    def test_nothing_is_added_while_deadlines_hold(self, three_pools, make_state):
        policy = ChironRobustPolicy()
        policy.reset(three_pools)
        state = make_state(three_pools, ready=[1, 2, 0], busy_interactive=[1, 0, 0], **self.queue(3000, 100.0))
        assert policy.decide(state).target_replicas[2] == 0  # two idle mixed instances do it within the hour

    def test_instances_for_a_queue_that_would_miss(self, three_pools, make_state):
        policy = ChironRobustPolicy(z=0.0)
        policy.reset(three_pools)
        waited_s, length, load_s = 3000.0, 30_000, 60.0
        state = make_state(three_pools, ready=[3, 0, 1], busy_interactive=[1, 0, 0], **self.queue(length, waited_s))
        cap = 64.0
        rate = instance_tokens_per_s(three_pools.pools[2], cap, 1024.0, 200.0)
        slack_s = 3600.0 - waited_s
        expected = np.ceil((length * 200.0 - rate * slack_s) / (rate * (slack_s - load_s)))
        assert policy.decide(state).target_replicas[2] == 1 + expected
        assert expected > 1

    def test_loading_instances_are_not_asked_for_twice(self, three_pools, make_state):
        policy = ChironRobustPolicy(z=0.0)
        policy.reset(three_pools)
        queue = self.queue(30_000, 3000.0)
        first = make_state(three_pools, ready=[3, 0, 1], busy_interactive=[1, 0, 0], **queue)
        target = policy.decide(first).target_replicas
        loading = make_state(
            three_pools,
            time_s=1.0,
            window_s=1.0,
            ready=[3, 0, 1],
            starting=target - [3, 0, 1],
            asked_for=target,
            busy_interactive=[1, 0, 0],
            **queue,
        )
        assert policy.decide(loading).target_replicas.tolist() == target.tolist()

    def test_all_go_at_once_when_nothing_is_left_and_not_before(self, three_pools, make_state):
        policy = ChironRobustPolicy()
        policy.reset(three_pools)
        state = {"ready": [3, 0, 6], "busy_interactive": [1, 0, 0]}
        running = make_state(three_pools, **state, **self.queue(0, 0.0, class_in_flight=[0, 1]))
        assert policy.decide(running).target_replicas[2] == 6
        unknown = make_state(three_pools, **state, **self.queue(np.nan, np.nan))
        assert policy.decide(unknown).target_replicas[2] == 6
        idle = make_state(three_pools, **state, **self.queue(0, 0.0))
        assert policy.decide(idle).target_replicas[2] == 0

    def test_without_a_batch_pool_extra_mixed_replicas_come_and_go(self, make_spec, make_state):
        spec = make_spec("mixed", classes=(CHAT, JOBS), router="packing", pool={"initial_replicas": 3})
        policy = ChironRobustPolicy(z=0.0)
        policy.reset(spec)
        busy = {"busy_interactive": 1, "in_flight_interactive": 64, "in_flight": 64}
        queue = self.queue(40_000, 3000.0)
        grown = int(policy.decide(make_state(spec, ready=3, **busy, **queue)).target_replicas[0])
        assert grown > 5
        for k in range(1, 20):  # the interactive loop alone would want 3
            state = make_state(spec, time_s=10.0 * k, ready=grown, **busy, **self.queue(100, 3000.0))
            assert policy.decide(state).target_replicas[0] == grown
        idle = make_state(spec, time_s=200.0, ready=grown, **busy, **self.queue(0, 0.0))
        assert policy.decide(idle).target_replicas[0] == 3

    def test_batch_only_fleet_needs_no_interactive_loop(self, make_spec, make_state):
        spec = make_spec("batch", classes=(JOBS,), pool={"initial_replicas": 0})
        policy = ChironRobustPolicy()
        policy.reset(spec)
        assert policy.decide(make_state(spec, ready=0)).target_replicas[0] == 0
        queued = make_state(spec, ready=0, queue_length=10, oldest_wait_s=5.0)
        assert policy.decide(queued).target_replicas[0] == 1

    def test_mixed_slack_is_what_interactive_work_leaves(self, make_spec, make_state):
        spec = make_spec("mixed", classes=(CHAT, JOBS))
        loop = BatchLoop(spec, z=0.0, output_cv=1.0)
        cap = np.array([64.0])
        whole = instance_tokens_per_s(spec.pools[0], 64.0, 1024.0, 200.0)

        def lent(interactive: float) -> float:
            return loop.tokens_per_s(make_state(spec, ready=2, in_flight_interactive=interactive), cap)

        assert lent(0) == pytest.approx(2 * whole)
        assert lent(32) == pytest.approx(2 * whole * 0.75)
        assert lent(200) == 0.0
        assert lent(np.nan) == 0.0

    def test_rates_are_learned_only_while_full(self, make_spec, make_state):
        spec = make_spec("batch", classes=(JOBS,))
        cap, readable = np.array([64.0]), np.array([True])
        whole = instance_tokens_per_s(spec.pools[0], 64.0, 1024.0, 200.0)

        def rate_after(**given) -> float:
            loop = BatchLoop(spec, z=0.0, output_cv=1.0)
            for _ in range(40):
                loop.observe(make_state(spec, generation_tokens_per_s=0.5 * whole, **given), cap, readable)
            return loop.tokens_per_s(make_state(spec), cap)

        assert rate_after(in_flight=60) == pytest.approx(0.5 * whole, rel=1e-3)
        assert rate_after(in_flight=10, queue_length=5) == pytest.approx(whole)


def test_kv_cache_bounds_the_batch_of_an_instance(make_spec):
    (pool,) = make_spec("batch", classes=(JOBS,), pool={"kv_blocks": 700}).pools
    # 700 * 16 / (1000 + 100) = 10 sequences
    assert instance_tokens_per_s(pool, 256.0, 1000.0, 200.0) == instance_tokens_per_s(pool, 10.0, 1000.0, 200.0)
    assert instance_tokens_per_s(pool, 9.0, 1000.0, 200.0) < instance_tokens_per_s(pool, 10.0, 1000.0, 200.0)


@pytest.mark.parametrize("knobs", [{"theta": 1.5}, {"dead_band": 1.0}, {"load_time_s": -1.0}, {"initial_batch": 0.0}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(SpecError, match=next(iter(knobs))):
        ChironTunedPolicy(**knobs)
