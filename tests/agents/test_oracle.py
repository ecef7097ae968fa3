from __future__ import annotations

import math

import numpy as np
import pytest

from rl_autoscale.agents.oracle import OraclePolicy
from rl_autoscale.agents.oracle_work import KnownWork, allowed_wait_s, decode_pace_s, fluid_problem, released_work_s
from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.errors import SpecError

CHAT = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
JOBS = {"name": "jobs", "kind": "batch", "ttft_slo_s": 600.0, "tpot_slo_s": 1.0}


def future(arrival_s, class_index=0, prompt=1000, output=200):
    n = len(arrival_s)
    return {
        "arrival_s": np.asarray(arrival_s, dtype=np.float64),
        "prompt_tokens": np.full(n, prompt),
        "output_tokens": np.full(n, output),
        "class_index": np.full(n, class_index),
    }


def work(arrival_s, prefill_s=0.0, decode_s=0.0, duration_s=1.0, wait_s=1.0):
    n = len(arrival_s)
    return KnownWork(
        np.asarray(arrival_s, dtype=np.float64),
        *(np.full(n, value) for value in (prefill_s, decode_s, duration_s, wait_s)),
    )


def plan_of(policy, spec, make_state, steps):
    policy.reset(spec)
    states = (make_state(spec, time_s=spec.control_interval_s * k) for k in range(steps))
    return np.array([policy.decide(state).target_replicas for state in states])


class TestWork:
    def test_prefill_at_once_and_decode_evenly(self):
        known = work([10.0, 12.0], prefill_s=3.0, decode_s=8.0, duration_s=4.0)
        at = released_work_s(known, np.array([0.0, 10.0, 11.0, 13.0, 14.0, 100.0]))
        assert at == pytest.approx([0.0, 0.0, 5.0, 6.0 + 6.0 + 2.0, 6.0 + 8.0 + 4.0, 22.0])

    def test_urgent_peak_is_taken_over_the_allowed_wait(self, make_spec):
        (pool,) = make_spec().pools
        # 6 replica-seconds arrive in the fourth second: 6 replicas at utilisation 1, 8 at 0.75
        known = work([3.5] * 6, prefill_s=1.0, duration_s=1e-6, wait_s=1.0)
        for utilisation, expected in ((1.0, 6), (0.75, 8)):
            fluid = fluid_problem(known, pool, step_s=10.0, utilisation=utilisation, startup_s=60.0)
            assert fluid.least_ready.tolist() == [expected]
            assert fluid.startup_steps == 6

    def test_deferrable_bound_is_what_arrived_within_the_wait(self, make_spec):
        (pool,) = make_spec().pools
        known = work([5.0, 15.0, 25.0], prefill_s=10.0, wait_s=20.0)
        fluid = fluid_problem(known, pool, step_s=10.0, utilisation=1.0, startup_s=0.0)
        m = fluid.quanta_per_replica_step
        assert (fluid.deferrable_quanta / m).tolist() == [1, 1, 1, 0, 0]
        assert (fluid.backlog_bound / m).tolist() == [1, 2, 2, 1, 0]

    def test_all_work_ends_with_the_horizon(self, make_spec):
        (pool,) = make_spec().pools
        known = work([5.0, 15.0], prefill_s=10.0, wait_s=3600.0)
        fluid = fluid_problem(known, pool, step_s=10.0, utilisation=1.0, startup_s=0.0, horizon_s=40.0)
        assert len(fluid.least_ready) == 4
        assert fluid.backlog_bound[-1] == 0
        assert fluid.backlog_bound[-2] > 0

    def test_rounding_loses_no_work(self, make_spec):
        (pool,) = make_spec().pools
        rng = np.random.default_rng(0)
        arrival_s = np.sort(rng.uniform(0, 3600, 5000))
        known = work(arrival_s, prefill_s=0.37, wait_s=300.0)
        fluid = fluid_problem(known, pool, step_s=10.0, utilisation=0.8, startup_s=60.0)
        total = fluid.deferrable_quanta.sum() / fluid.quanta_per_replica_step
        assert total == pytest.approx(5000 * 0.37 / 8.0, abs=1.0)
        assert total >= 5000 * 0.37 / 8.0

    def test_allowed_wait_and_pace(self, make_spec):
        spec = make_spec(classes=(CHAT | {"deadline_s": 0.5}, JOBS))
        assert [allowed_wait_s(item) for item in spec.classes] == [0.5, 600.0]
        assert 0.01 < decode_pace_s(spec.pools[0], spec.classes[1]) < 0.1
        fast = make_spec(classes=(CHAT | {"tpot_slo_s": 0.001},))
        assert decode_pace_s(fast.pools[0], fast.classes[0]) == 0.001


class TestPolicy:
    def test_steady_load_is_served_at_the_planned_utilisation(self, make_spec, make_state):
        spec = make_spec(pool={"initial_replicas": 10})
        arrivals = np.arange(0.0, 600.0, 0.02)
        policy = OraclePolicy(**future(arrivals), utilisation=0.8)
        targets = plan_of(policy, spec, make_state, 60)[:, 0]
        one = DemandEstimator(spec).request_work_s(np.array([1000.0]), np.array([200.0]), np.array([0]))[0]
        assert set(targets[10:55]) == {math.ceil(50 * one / 0.8)}

    def test_capacity_is_there_when_the_burst_comes(self, make_spec, make_state):
        spec = make_spec()
        arrivals = np.sort(np.concatenate([np.arange(0, 600, 1.0), np.arange(300, 330, 0.02)]))
        targets = plan_of(OraclePolicy(**future(arrivals)), spec, make_state, 60)[:, 0]
        peak = targets.max()
        assert peak > 5
        first = int(np.argmax(targets == peak))
        assert 300 - 10 * first >= 60.0  # asked for at least one start-up ahead
        assert targets[:20].max() <= 2
        assert targets[45:].max() <= 2

    def test_work_that_may_wait_costs_less(self, make_spec, make_state):
        # A few jobs every 200 s: the impatient start a replica each time, the patient gather them.
        arrivals = np.sort(np.concatenate([np.arange(5.0, 3000.0, 200.0) + offset for offset in range(5)]))
        costs = []
        for ttft_slo_s in (100.0, 600.0, 1800.0):
            spec = make_spec("batch", classes=(JOBS | {"ttft_slo_s": ttft_slo_s},))
            targets = plan_of(OraclePolicy(**future(arrivals)), spec, make_state, 500)
            costs.append(targets.sum())
        assert costs[0] > 2 * costs[1] > 2 * costs[2] > 0

    def test_each_pool_gets_its_own_work(self, make_spec, make_state):
        spec = make_spec("interactive", "mixed", "batch", classes=(CHAT, JOBS), pool={"initial_replicas": 0})
        known = future(np.arange(100.0, 200.0, 0.1), class_index=1)
        targets = plan_of(OraclePolicy(**known), spec, make_state, 100)
        assert targets[:, 2].max() > 0
        assert targets[:, :2].max() == 0

    def test_gpu_budget_bounds_the_plan(self, make_spec, make_state):
        spec = make_spec(gpu_budget=3)
        targets = plan_of(OraclePolicy(**future(np.arange(0, 300, 0.01))), spec, make_state, 40)
        assert targets.max() == 3

    def test_after_the_known_work_the_minimum(self, make_spec, make_state):
        spec = make_spec(pool={"min_replicas": 1, "initial_replicas": 2})
        policy = OraclePolicy(**future(np.arange(0, 100, 0.05)))
        policy.reset(spec)
        assert policy.decide(make_state(spec, time_s=9999.0)).target_replicas.tolist() == [1]

    def test_empty_future_is_the_minimum(self, make_spec, make_state):
        policy = OraclePolicy(**future([]))
        assert plan_of(policy, make_spec(), make_state, 3).max() == 0

    def test_a_lower_utilisation_never_costs_less(self, make_spec, make_state):
        rng = np.random.default_rng(1)
        arrivals = np.sort(rng.uniform(0, 1200, 12_000))
        costs = [
            plan_of(OraclePolicy(**future(arrivals), utilisation=u), make_spec(), make_state, 130).sum()
            for u in (0.5, 0.7, 0.9)
        ]
        assert costs == sorted(costs, reverse=True)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"arrival_s": [0.0, 1.0]}, r"equally long; got arrival_s \(2,\)"),
            ({"arrival_s": [np.nan]}, r"arrival_s holds a negative or non-finite"),
            ({"prompt_tokens": [-1]}, r"prompt_tokens holds a negative"),
            ({"utilisation": 0.0}, r"utilisation=0.0"),
            ({"startup_s": -1.0}, r"startup_s=-1.0"),
        ],
    )
    def test_nonsense_is_refused(self, changes, message):
        with pytest.raises(SpecError, match=message):
            OraclePolicy(**(future([1.0]) | changes))

    def test_a_class_the_fleet_lacks_is_refused(self, make_spec):
        with pytest.raises(SpecError, match=r"class_index 3 is outside the fleet's 1 classes"):
            OraclePolicy(**future([1.0], class_index=3)).reset(make_spec())
