from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.cocktail import CocktailPolicy
from rl_autoscale.agents.tiers import RecentTraffic, replica_rates_per_s, tiers_of

CHAT = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
JOBS = {"name": "jobs", "kind": "batch", "ttft_slo_s": 3600.0, "tpot_slo_s": 1.0}


def play(policy, spec, make_state, rates, start):
    """Targets per step; ``rates`` has shape (num_steps, num_classes)."""
    policy.reset(spec)
    target, seen = np.array(start), []
    for k, rate in enumerate(np.asarray(rates, dtype=float)):
        given = {"arrivals_per_s": rate, "arrived_prompt_tokens_per_s": 1000.0 * rate}
        state = make_state(spec, time_s=10.0 * k, ready=target, **given)
        target = policy.decide(state).target_replicas
        seen.append(target.tolist())
    return np.array(seen)


def rate_of(spec, make_state):
    """Requests per second of one replica of the first tier's pools."""
    tier, traffic = tiers_of(spec)[0], RecentTraffic(spec, 60.0)
    traffic.observe(make_state(spec, arrivals_per_s=1.0, arrived_prompt_tokens_per_s=1000.0))
    return replica_rates_per_s(spec, tier, traffic, 0.0)


def test_fills_the_cheapest_per_request_and_the_smallest_for_a_remainder(make_spec):
    spec = make_spec("mixed", "mixed", pool={"max_replicas": 10})
    prices = (3.0, 1.2)
    pools = [
        p.model_copy(update={"price_usd_per_gpu_hour": price}) for p, price in zip(spec.pools, prices, strict=True)
    ]
    spec = spec.model_copy(update={"pools": tuple(pools)})
    policy, tier = CocktailPolicy(), tiers_of(spec)[0]
    policy.reset(spec)
    rates = np.array([3.0, 1.0])  # the first is cheaper per request as long as it is full
    assert policy.filled(tier, np.array([0, 0]), rates, 7.0).tolist() == [2, 1]
    assert policy.filled(tier, np.array([0, 0]), rates, 8.9).tolist() == [3, 0]
    assert policy.filled(tier, np.array([10, 0]), rates, 31.5).tolist() == [10, 2]
    assert policy.filled(tier, np.array([3, 4]), rates, 6.0).tolist() == [2, 0]  # the dearer per request go first
    assert policy.filled(tier, np.array([0, 0]), np.array([0.0, 0.0]), 6.0).tolist() == [0, 0]


def test_growth_leads_a_ramp_by_the_start_up(make_spec, make_state):
    """Cocktail's claim for predictive autoscaling: capacity is there when the load is."""
    spec = make_spec(pool={"max_replicas": 50, "startup": [{"mean_s": 60.0}]})
    per_s = float(rate_of(spec, make_state)[0])
    ramp = per_s * (2 + 0.1 * np.arange(120.0))[:, None]
    leading = play(CocktailPolicy(headroom=1.0), spec, make_state, ramp, [3])[:, 0]
    lagging = play(CocktailPolicy(headroom=1.0, trend_weight=0.0), spec, make_state, ramp, [3])[:, 0]
    later = ramp[12 * 6 + 6 :, 0] / per_s  # what one start-up later asks for
    covered = leading[12 * 6 : -6][: len(later)] >= later
    assert covered.mean() > 0.8
    assert (lagging[12 * 6 : -6][: len(later)] >= later).mean() < 0.2


def test_importance_shares_the_forecast_out(make_spec, make_state):
    spec = make_spec("interactive", "batch", classes=(CHAT, JOBS), pool={"max_replicas": 40})
    even, skewed = (
        play(CocktailPolicy(trend_weight=0.0), spec, make_state, np.tile(rates, (30, 1)), [1, 1])[-1]
        for rates in ([20.0, 20.0], [38.0, 2.0])
    )
    assert skewed[0] == pytest.approx(1.9 * even[0], abs=1.5)
    assert skewed[1] == pytest.approx(0.1 * even[1], abs=1.0)


def test_removal_waits_for_six_plans_and_the_warm_up_for_two_minutes(make_spec, make_state):
    spec = make_spec(pool={"max_replicas": 50})
    per_s = float(rate_of(spec, make_state)[0])
    rates = np.concatenate([np.full(19, 9.5), np.full(60, 1.5)])[:, None] * per_s
    targets = play(CocktailPolicy(headroom=1.0, trend_weight=0.0), spec, make_state, rates, [2])[:, 0]
    assert (targets[:12] == 2).all()
    assert targets[12] == targets[18 + 5 * 6 - 1] == 10
    assert targets[18 + 7 * 6] < 10
    assert targets[-1] == 2
