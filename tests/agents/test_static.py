from __future__ import annotations

import pytest

from rl_autoscale.agents.static import StaticPolicy
from rl_autoscale.fleet.errors import SpecError


def test_holds_the_same_number_in_every_pool(make_spec, make_state):
    spec = make_spec("interactive", "mixed")
    policy = StaticPolicy(replicas=7, batch_cap=32, admission=1.0)
    policy.reset(spec)
    decision = policy.decide(make_state(spec, ready=2, queue_length=500))
    assert decision.target_replicas.tolist() == [7, 7]
    assert decision.max_batch_size.tolist() == [32, 32]
    assert decision.admission.tolist() == [1.0]


def test_named_pools_differ_and_the_rest_stay_initial(make_spec, make_state):
    spec = make_spec("interactive", "mixed", pool={"initial_replicas": 3, "max_replicas": 10})
    policy = StaticPolicy(replicas={"mixed1": 99})
    policy.reset(spec)
    assert policy.decide(make_state(spec)).target_replicas.tolist() == [3, 10]


def test_a_mistyped_pool_is_refused_with_a_suggestion(make_spec):
    with pytest.raises(SpecError, match=r"pool 'mixd0'; did you mean 'mixed0'\?; pools: mixed0"):
        StaticPolicy(replicas={"mixd0": 2}).reset(make_spec())


@pytest.mark.parametrize("replicas", [2.5, -1, float("nan"), {"mixed0": -1}, {"mixed0": 0.5}])
def test_replicas_must_be_whole_and_not_negative(replicas):
    with pytest.raises(SpecError, match=r"replicas"):
        StaticPolicy(replicas=replicas)
