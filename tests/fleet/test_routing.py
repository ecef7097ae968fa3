"""The rules behind `FleetSpec.router` that simulator and gateway share."""

from __future__ import annotations

import pytest

from rl_autoscale.fleet.pool import PoolSpec, Role
from rl_autoscale.fleet.routing import choose_pool
from rl_autoscale.fleet.spec import Router


def pool(gpu: str, role: Role = "mixed") -> PoolSpec:
    return PoolSpec(name=gpu, role=role, profile=f"llama-3.1-8b_{gpu}_tp1")


def test_the_least_loaded_pool_is_the_one_that_would_be_done_first() -> None:
    """An H100 does a request more than twice as fast as an L40S: it is preferred until it has twice the work."""
    pools = [pool("l40s"), pool("h100")]
    ratio = pools[0].typical_request_s / pools[1].typical_request_s
    assert ratio > 2
    assert choose_pool("least_loaded", pools, [0, 0]) == 1
    assert choose_pool("least_loaded", pools, [0, int(ratio) + 1]) == 0
    assert choose_pool("least_loaded", [pools[0], pools[0]], [3, 3]) == 0


def test_a_later_role_waits_until_the_first_is_full() -> None:
    pools = [pool("l40s", "interactive"), pool("h100", "mixed")]
    assert choose_pool("least_loaded", pools, [9, 0]) == 0


@pytest.mark.parametrize("router", ["round_robin", "power_of_two", "packing"])
def test_other_rules_take_the_first_pool(router: Router) -> None:
    assert choose_pool(router, [pool("l40s"), pool("h100")], [9, 0]) == 0
