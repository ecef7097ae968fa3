from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.capacity import replica_requests_per_s
from rl_autoscale.agents.tiers import RecentTraffic, Tier, price_per_replica_hour, replica_rates_per_s, tiers_of
from rl_autoscale.fleet.spec import FleetSpec

CHAT = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
JOBS = {"name": "jobs", "kind": "batch", "ttft_slo_s": 3600.0, "tpot_slo_s": 1.0}


def test_tiers_are_pools_of_one_role_with_the_classes_sent_there_first(make_spec):
    spec = make_spec("mixed", "interactive", "mixed", "interactive", classes=(JOBS, CHAT))
    assert tiers_of(spec) == [Tier((0, 2), (0,)), Tier((1, 3), (1,))]
    assert tiers_of(make_spec("mixed", classes=(CHAT, JOBS))) == [Tier((0,), (0, 1))]


def test_recent_traffic_averages_and_peaks(make_spec, make_state):
    spec = make_spec("mixed", classes=(CHAT, JOBS))
    traffic = RecentTraffic(spec, 25.0)
    for k, (chat, jobs) in enumerate([(9.0, 9.0), (1.0, 3.0), (4.0, 1.0), (2.0, 0.0)]):
        rates = np.array([chat, jobs])
        state = make_state(spec, time_s=10.0 * k, arrivals_per_s=rates, arrived_prompt_tokens_per_s=100.0 * rates)
        traffic.observe(state)
    assert traffic.rates_per_s(Tier((0,), (1, 0)), 30.0).tolist() == [4 / 3, 7 / 3]
    assert traffic.peak_per_s(30.0) == 5.0
    assert traffic.lengths(0, 30.0) == (100.0, 200.0)
    assert np.isnan(traffic.peak_per_s(90.0))


def test_replica_rates_share_time_between_classes_and_know_who_cannot_serve(make_state):
    fast, slow = "llama-3.1-8b_h100_tp1", "llama-3.1-8b_l40s_tp1"
    strict = {"name": "strict", "ttft_slo_s": 1.0, "tpot_slo_s": 0.02}
    spec = FleetSpec.from_dict(
        {"pools": [{"name": name, "profile": name} for name in (fast, slow)], "classes": [CHAT, strict]}
    )
    (tier,), traffic = tiers_of(spec), RecentTraffic(spec, 30.0)
    assert np.isnan(replica_rates_per_s(spec, tier, traffic, 0.0)).all()

    def rates(chat: float, of_strict: float) -> np.ndarray:
        traffic = RecentTraffic(spec, 30.0)
        arrivals = np.array([chat, of_strict])
        traffic.observe(make_state(spec, arrivals_per_s=arrivals, arrived_prompt_tokens_per_s=1024.0 * arrivals))
        return replica_rates_per_s(spec, tier, traffic, 0.0)

    alone, other, both = rates(1.0, 0.0), rates(0.0, 1.0), rates(1.0, 1.0)
    assert alone[0] > 2 * alone[1] > 0
    assert other[1] == both[1] == 0.0  # an L40S needs more than 20 ms for any token
    assert both[0] == pytest.approx(1 / (0.5 / alone[0] + 0.5 / other[0]))
    kept = {"prompt_tokens": 1024.0, "output_tokens": 200.0, "ttft_slo_s": 1.0, "itl_slo_s": 0.02}
    assert replica_requests_per_s(spec.pools[1], **kept) > replica_requests_per_s(spec.pools[1], **kept, strict=True)


def test_prices_are_gpus_where_nothing_costs(make_spec):
    profile = {"profile": "llama-3.1-70b_a100_tp4"}
    free = make_spec("mixed", pool={**profile, "price_usd_per_gpu_hour": 0.0})
    dear = make_spec("mixed", pool={**profile, "price_usd_per_gpu_hour": 3.0})
    assert price_per_replica_hour(free, tiers_of(free)[0]).tolist() == [4.0]
    assert price_per_replica_hour(dear, tiers_of(dear)[0]).tolist() == [12.0]
