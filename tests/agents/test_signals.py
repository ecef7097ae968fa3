"""Signals: shared queues, saturation, samples. Missing, idle and zero are three different things."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rl_autoscale.agents.signals import Samples, outstanding_per_pool, slo_saturation, tokens_per_pool
from rl_autoscale.fleet.state import StageTelemetry

CHAT = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
JOBS = {"name": "jobs", "kind": "batch", "ttft_slo_s": 100.0, "tpot_slo_s": 1.0}


def test_outstanding_counts_engines_and_the_share_of_the_queue(make_spec, make_state):
    spec = make_spec("mixed", "mixed")
    state = make_state(spec, ready=[3, 1], running=[30, 10], waiting=[2, 0], queue_length=8)
    assert outstanding_per_pool(spec, state).tolist() == [38.0, 12.0]
    assert np.isnan(outstanding_per_pool(spec, make_state(spec, running=[np.nan, 1]))).tolist() == [True, False]


def test_tokens_are_held_and_queued(make_spec, make_state):
    spec = make_spec(pool={"kv_blocks": 1000})
    state = make_state(spec, ready=2, kv_usage=0.25, queued_prompt_tokens=500)
    assert tokens_per_pool(spec, state).tolist() == [2 * 0.25 * 16_000 + 500]


def test_saturation_is_the_worst_class_and_the_worst_slo(make_spec, make_state):
    spec = make_spec("interactive", "mixed", "batch", classes=(CHAT, JOBS))
    state = make_state(spec, ttft_p95_s=[0.4, 90.0], tpot_p95_s=[0.07, 0.5], class_in_flight=5, queue_length=0)
    assert slo_saturation(spec, state) == pytest.approx([0.7, 0.9, 0.9])


def test_no_latency_is_zero_only_when_idle(make_spec, make_state):
    spec = make_spec()
    assert slo_saturation(spec, make_state(spec)).tolist() == [0.0]
    assert np.isnan(slo_saturation(spec, make_state(spec, class_in_flight=3))).all()
    assert np.isnan(slo_saturation(spec, make_state(spec, queue_length=np.nan))).all()


def test_samples_forget_and_skip_what_is_missing():
    samples = Samples(keep_s=30.0)
    for time_s, value in [(0.0, 1.0), (10.0, np.nan), (20.0, 3.0), (30.0, 8.0)]:
        samples.add(time_s, value)
    assert samples.last(30.0, 30.0) == [3.0, 8.0]
    assert samples.mean(30.0, 5.0) == 8.0
    assert np.isnan(samples.mean(90.0, 30.0))


def test_prefill_answers_for_the_first_token_and_decode_for_the_rest(make_spec, make_state):
    spec = make_spec("prefill", "decode", kv_transfer={})
    state = make_state(spec, ttft_p95_s=0.4, tpot_p95_s=0.07, class_in_flight=5)
    assert slo_saturation(spec, state) == pytest.approx([0.4, 0.7])


def test_what_waits_in_the_bridge_waits_for_decode(make_spec, make_state):
    spec = make_spec("prefill", "decode", "decode", kv_transfer={})
    state = make_state(spec, ready=[2, 3, 1], running=[5, 10, 4], queue_length=6)
    assert outstanding_per_pool(spec, state).tolist() == [11.0, 10.0, 4.0]
    stages = StageTelemetry(*(np.array(value) for value in (0.0, 0.0, 8.0, 9.0, 0.0, 0.0, 0.0, 0.0)))
    assert outstanding_per_pool(spec, replace(state, stages=stages)).tolist() == [11.0, 16.0, 6.0]
