from __future__ import annotations

import math

import numpy as np
import pytest

from rl_autoscale.agents.capacity import replica_requests_per_s
from rl_autoscale.agents.dynamo import DynamoPolicy

LENGTHS = {"prompt_tokens": 1000.0, "output_tokens": 200.0}


def best_rate(spec, share: float = 1.0) -> float:
    return replica_requests_per_s(spec.pools[0], **LENGTHS, ttft_slo_s=1.0 * share, itl_slo_s=0.1 * share)


def traffic(rate: float) -> dict[str, float]:
    return {"arrivals_per_s": rate, "arrived_prompt_tokens_per_s": 1000.0 * rate, "mean_output_tokens": 200.0}


class TestCapacity:
    @pytest.mark.parametrize("slo_s", [0.03, 0.04, 0.1])
    def test_it_is_the_best_batch_by_the_profile(self, make_spec, slo_s):
        (pool,) = make_spec().pools
        rate = replica_requests_per_s(pool, prompt_tokens=160, output_tokens=10, ttft_slo_s=10.0, itl_slo_s=slo_s)
        best = 0.0
        for batch in range(10, pool.batch_limit, 10):  # whole prompts: one per ten decodes
            prompts = batch // 10
            iteration_s = pool.hardware.iteration_s(
                num_decode=batch, decode_context_tokens=165.0 * batch, chunks=((160, 0),) * prompts
            )
            if iteration_s <= slo_s and batch + 160 * prompts <= pool.token_budget:
                best = max(best, batch / (10 * iteration_s))
        assert best <= rate * (1 + 1e-9)
        assert rate == pytest.approx(best, rel=0.1)  # batches between the multiples of ten may do a little better

    def test_tighter_slos_and_longer_requests_cost_rate(self, make_spec):
        (pool,) = make_spec().pools
        rates = [best_rate(make_spec(), share) for share in (1.0, 0.5, 0.25, 0.1)]
        assert rates == sorted(rates, reverse=True)
        assert rates[0] > 1.5 * rates[-1] > 0
        long = replica_requests_per_s(pool, prompt_tokens=4000, output_tokens=200, ttft_slo_s=1.0, itl_slo_s=0.1)
        assert 0 < long < rates[0] / 2

    def test_an_impossible_slo_gives_the_least_bad_rate(self, make_spec):
        (pool,) = make_spec().pools
        rate = replica_requests_per_s(pool, **LENGTHS, ttft_slo_s=1e-6, itl_slo_s=1e-6)
        assert 0 < rate < best_rate(make_spec())

    def test_it_bounds_what_the_fleet_demand_estimate_calls_full(self, make_spec):
        """At full batches both prices of a request must agree within the slack of their different assumptions."""
        from rl_autoscale.fleet.demand import DemandEstimator

        spec = make_spec()
        work = DemandEstimator(spec).request_work_s(np.array([1000.0]), np.array([200.0]), np.array([0]))
        assert best_rate(spec) == pytest.approx(1.0 / float(work[0]), rel=0.25)


class TestSlowLoop:
    def test_floor_after_one_interval(self, make_spec, make_state):
        spec = make_spec(pool={"initial_replicas": 2})
        policy = DynamoPolicy(throughput_interval_s=30.0)
        policy.reset(spec)
        rate = 6.3 * best_rate(spec)
        seen = [
            int(
                policy.decide(make_state(spec, time_s=10.0 * k, ready=2, starting=1, **traffic(rate))).target_replicas[
                    0
                ]
            )
            for k in range(4)
        ]
        assert seen == [2, 2, 2, 7]

    def test_the_forecast_continues_a_trend(self, make_spec, make_state):
        spec = make_spec()
        rate = best_rate(spec)
        floors = {}
        for weight in (0.0, 1.0):
            policy = DynamoPolicy(throughput_interval_s=10.0, trend_weight=weight)
            policy.reset(spec)
            for k in range(12):
                state = make_state(spec, time_s=10.0 * k, starting=1, ready=1, **traffic(rate * (1.5 + k)))
                target = int(policy.decide(state).target_replicas[0])
            floors[weight] = target
        assert floors[0.0] == 13  # level 12.25: behind a ramp that is at 12.5
        assert floors[1.0] == 14  # and will be at 13.5

    def test_a_class_never_measured_leaves_the_floor(self, make_spec, make_state):
        spec = make_spec(pool={"initial_replicas": 3, "min_replicas": 1})
        policy = DynamoPolicy(throughput_interval_s=10.0)
        policy.reset(spec)
        for k in range(4):
            state = make_state(spec, time_s=10.0 * k, ready=3, starting=1, arrivals_per_s=np.nan)
            assert policy.decide(state).target_replicas.tolist() == [3]


class TestFastLoop:
    @pytest.mark.parametrize(
        ("seen", "expected"),
        [
            ({"ttft_mean_s": 1.1, "itl_s": 0.01}, 5),
            ({"ttft_mean_s": 0.2, "itl_s": 0.12}, 5),
            ({"ttft_mean_s": 0.9, "itl_s": 0.01}, 4),  # above 80 % of its SLO
            ({"ttft_mean_s": 0.2, "itl_s": 0.02}, 3),
            ({"ttft_mean_s": 1.1, "itl_s": 0.01, "starting": 1}, 4),  # scaling in progress
            ({"ttft_mean_s": np.nan, "itl_s": 0.02}, 4),
            ({"ttft_mean_s": np.nan, "itl_s": np.nan}, 4),
        ],
    )
    def test_one_step(self, make_spec, make_state, seen, expected):
        spec = make_spec(pool={"initial_replicas": 4})
        policy = DynamoPolicy()
        policy.reset(spec)
        assert policy.decide(make_state(spec, ready=4, **seen)).target_replicas.tolist() == [expected]

    def test_never_below_the_floor(self, make_spec, make_state):
        spec = make_spec(pool={"initial_replicas": 5})
        policy = DynamoPolicy(throughput_interval_s=10.0)
        policy.reset(spec)
        target = 5
        for k in range(8):
            calm = traffic(3.5 * best_rate(spec)) | {"ttft_mean_s": 0.1, "itl_s": 0.01}
            target = int(policy.decide(make_state(spec, time_s=10.0 * k, ready=target, **calm)).target_replicas[0])
        assert target == math.ceil(3.5)
