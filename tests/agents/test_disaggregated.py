"""Rules on a fleet of prefill and decode pools: each pool follows its own half of the work."""

from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.registry import make_policy

LONG_PROMPTS = {
    "arrivals_per_s": 5.0,
    "finished_per_s": 5.0,
    "arrived_prompt_tokens_per_s": 200_000.0,
    "mean_output_tokens": 20.0,
}
LONG_OUTPUTS = {
    "arrivals_per_s": 20.0,
    "finished_per_s": 20.0,
    "arrived_prompt_tokens_per_s": 2_000.0,
    "mean_output_tokens": 2000.0,
}


def target(name, spec, make_state, **signals):
    """What a rule asks for after some minutes of the same signals."""
    policy = make_policy(name)
    policy.reset(spec)
    state = make_state(spec, **signals)
    for step in range(41):
        state = make_state(spec, time_s=10.0 * step, asked_for=2, ready=2, **signals)
        decision = policy.decide(state)
    return decision.target_replicas.tolist()


@pytest.mark.parametrize("name", ["headroom", "headroom-forecast", "inferline", "dynamo"])
def test_each_pool_follows_its_own_half_of_the_work(make_spec, make_state, name):
    spec = make_spec("prefill", "decode", kv_transfer={})
    prefill, decode = target(name, spec, make_state, **LONG_PROMPTS)
    assert prefill > 2 * decode
    prefill, decode = target(name, spec, make_state, **LONG_OUTPUTS)
    assert decode > 2 * prefill


def test_hpa_scales_the_pool_that_is_loaded(make_spec, make_state):
    spec = make_spec("prefill", "decode", kv_transfer={})
    prefill, decode = target("hpa", spec, make_state, running=[10, 300])
    assert decode > prefill


def test_nothing_known_nothing_done(make_spec, make_state):
    spec = make_spec("prefill", "decode", kv_transfer={})
    missing = dict.fromkeys(("arrivals_per_s", "arrived_prompt_tokens_per_s"), np.nan)
    assert target("headroom", spec, make_state, **missing) == [2, 2]
