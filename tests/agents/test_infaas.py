from __future__ import annotations

import math

import numpy as np

from rl_autoscale.agents.infaas import InfaasPolicy
from rl_autoscale.agents.registry import make_policy
from rl_autoscale.agents.tiers import tiers_of
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.experiments.episodes import run_episode
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.result import EpisodeResult
from rl_autoscale.workload.store import TraceStore

NO_PRICE = {"max_replicas": 10}


def three_priced(make_spec, *prices: float):
    spec = make_spec(*("mixed" for _ in prices), pool=NO_PRICE)
    pools = tuple(
        pool.model_copy(update={"price_usd_per_gpu_hour": price})
        for pool, price in zip(spec.pools, prices, strict=True)
    )
    return spec.model_copy(update={"pools": pools})


def growth(make_spec, prices, replicas, rates, deficit):
    spec = three_priced(make_spec, *prices)
    policy = InfaasPolicy()
    policy.reset(spec)
    return policy.growth(tiers_of(spec)[0], np.array(replicas), np.array(rates), deficit).tolist()


def test_replicates_the_largest_unless_that_costs_half_as_much_again(make_spec):
    assert growth(make_spec, (1.4, 1.0), [5, 1], [2.0, 2.0], 4.0) == [2, 0]
    assert growth(make_spec, (1.6, 1.0), [5, 1], [2.0, 2.0], 4.0) == [0, 2]
    assert growth(make_spec, (1.4, 1.0), [5, 1], [2.0, 8.0], 4.0) == [0, 1]  # one fast replica instead of two


def test_a_variant_that_cannot_keep_the_slo_or_has_no_room_is_not_grown(make_spec):
    assert growth(make_spec, (9.0, 1.0), [1, 1], [2.0, 0.0], 4.0) == [2, 0]
    assert growth(make_spec, (1.0, 9.0), [9, 1], [2.0, 2.0], 4.0) == [0, 2]
    assert growth(make_spec, (1.0, 9.0), [9, 9], [2.0, 2.0], 4.0) == [1, 1]  # neither has room for both
    assert growth(make_spec, (1.0, 9.0), [9, 9], [2.0, 2.0], 40.0) == [1, 1]


def test_the_dearest_replica_to_spare_goes_after_an_unbroken_wish(make_spec, make_state):
    spec = three_priced(make_spec, 3.0, 1.0)
    policy = InfaasPolicy(down_wait_s=20.0)
    policy.reset(spec)

    def step(k, target, rate):
        given = {"arrivals_per_s": rate, "arrived_prompt_tokens_per_s": 1000.0 * rate}
        return policy.decide(
            make_state(spec, time_s=10.0 * k, ready=np.array(target), **given)
        ).target_replicas.tolist()

    assert step(0, [3, 3], 1.0) == [3, 3]
    assert step(1, [3, 3], math.nan) == [3, 3]  # breaks the run of wishes
    assert [step(k, [3, 3], 1.0) for k in (2, 3)] == [[3, 3]] * 2
    assert step(4, [3, 3], 1.0) == [2, 2]  # 20 s of wishing; each pool spares one
    assert step(5, [0, 1], 1.0) == [0, 1]  # the last replica of a tier stays
    assert step(9, [0, 1], 0.0) == [0, 1]


def test_choosing_among_variants_costs_less_than_growing_one():
    """INFaaS's claim: cheaper than autoscaling one variant, at no more misses (its figure: 8.5 times on average)."""
    scenario = load_scenario("heterogeneous")
    one_pool = scenario.fleet.model_dump() | {"pools": [scenario.fleet.pools[0].model_dump()]}
    single = scenario.model_copy(update={"fleet": FleetSpec.from_dict(one_pool)})

    def served(of: Scenario, name: str, **knobs: float) -> EpisodeResult:
        workload = of.build_test(1, TraceStore(())).workload
        return run_episode(of, workload, make_policy(name, **knobs), seed=1)

    chosen, grown = served(scenario, "infaas", slack=1.0), served(single, "headroom", headroom=2.5)
    assert chosen.slo_attainment > grown.slo_attainment
    assert chosen.cost_usd < 0.7 * grown.cost_usd
    assert min(pool.gpu_hours for pool in chosen.pools) > 0.5  # all three variants are used
