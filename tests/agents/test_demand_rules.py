"""What rules by token demand do with several pools of one role: the cheapest first, then the next."""

from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.registry import make_policy
from rl_autoscale.fleet.spec import FleetSpec

H100, L40S = "llama-3.1-8b_h100_tp1", "llama-3.1-8b_l40s_tp1"


@pytest.fixture
def two_kinds(make_spec) -> FleetSpec:
    """L40S is listed first; H100 does a request for less."""
    spec = make_spec("mixed", "mixed", pool={"max_replicas": 10, "min_replicas": 1})
    slow, fast = (pool.model_dump() for pool in spec.pools)
    slow |= {"profile": L40S, "price_usd_per_gpu_hour": 2.0}
    fast |= {"profile": H100, "price_usd_per_gpu_hour": 3.0}
    return FleetSpec.from_dict({**spec.model_dump(), "pools": [slow, fast]})


DEMAND_RULES = ["headroom", "headroom-backpressure", "headroom-budget", "headroom-forecast", "inferline"]


@pytest.mark.parametrize("name", DEMAND_RULES)
def test_the_next_pool_grows_when_the_cheapest_is_full(name, two_kinds, make_state):
    def target_at(rate_per_s: float) -> list[int]:
        policy = make_policy(name)
        policy.reset(two_kinds)
        load = {"arrivals_per_s": rate_per_s, "arrived_prompt_tokens_per_s": 1000.0 * rate_per_s}
        for step in range(60):
            target = policy.decide(make_state(two_kinds, time_s=10.0 * step, asked_for=np.nan, **load)).target_replicas
        return target.tolist()

    slow, fast = target_at(50.0)
    assert slow == 1
    assert 1 < fast < 10
    slow, fast = target_at(300.0)
    assert fast == 10
    assert 1 < slow <= 10
