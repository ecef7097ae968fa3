"""The demand estimate by hand: averages at several time scales, and replicas of work."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.demand import PRIOR_OUTPUT_TOKENS, DemandEstimator
from rl_autoscale.fleet.state import FleetState


def test_no_data_is_no_demand(a_spec: Any) -> None:
    estimator = DemandEstimator(a_spec())
    assert estimator.replicas(0).tolist() == [0.0]
    assert estimator.mean_output_tokens.tolist() == [PRIOR_OUTPUT_TOKENS]


def test_the_first_window_is_taken_as_it_is_and_then_forgotten_slowly(a_spec: Any, a_state: Any) -> None:
    spec = a_spec()
    estimator = DemandEstimator(spec, time_constants_s=(0.0, 20.0))
    for rate in (4.0, 8.0):
        state = a_state(spec, arrivals_per_s=rate, arrived_prompt_tokens_per_s=0.0, mean_output_tokens=np.nan)
        estimator.update(state)
    per_request = estimator.request_work_s(np.array([0.0]), np.array([PRIOR_OUTPUT_TOKENS]), np.array([0]))[0]
    smoothed = 4.0 + (1 - math.exp(-10 / 20)) * 4.0
    assert estimator.replicas(0)[0] == pytest.approx(8.0 * per_request)
    assert estimator.replicas(1)[0] == pytest.approx(smoothed * per_request)


def test_missing_rates_and_empty_windows_change_nothing(a_spec: Any, a_state: Any) -> None:
    spec = a_spec()
    estimator = DemandEstimator(spec)
    estimator.update(a_state(spec, arrivals_per_s=4.0, arrived_prompt_tokens_per_s=4000.0, mean_output_tokens=100.0))
    before = estimator.replicas(0).copy(), estimator.mean_output_tokens.copy()
    estimator.update(
        a_state(spec, arrivals_per_s=np.nan, arrived_prompt_tokens_per_s=np.nan, mean_output_tokens=np.nan)
    )
    estimator.update(a_state(spec, window_s=0.0, arrivals_per_s=99.0, arrived_prompt_tokens_per_s=9.0))
    assert estimator.replicas(0).tolist() == before[0].tolist()
    assert estimator.mean_output_tokens.tolist() == before[1].tolist()


def test_work_is_seconds_per_token_of_a_full_replica(a_spec: Any, a_state: Any) -> None:
    spec = a_spec()
    profile = spec.pools[0].hardware
    estimator = DemandEstimator(spec, time_constants_s=(0.0,))
    state = a_state(spec, arrivals_per_s=3.0, arrived_prompt_tokens_per_s=3000.0, mean_output_tokens=np.nan)
    estimator.update(state)
    prefill_s = profile.prefill_s_per_token(1024)
    decode_s = prefill_s + profile.decode_seq_s + profile.decode_context_s * (1024 + PRIOR_OUTPUT_TOKENS / 2)
    assert estimator.replicas(0)[0] == pytest.approx(3000 * prefill_s + 3 * PRIOR_OUTPUT_TOKENS * decode_s)


def test_a_class_counts_for_its_first_choice(a_spec: Any, a_pool: Any, a_state: Any) -> None:
    spec = a_spec(a_pool("m", "mixed"), a_pool("i", "interactive"), kinds=("interactive", "batch"))
    estimator = DemandEstimator(spec, time_constants_s=(0.0,))
    estimator.update(a_state(spec, arrivals_per_s=[1.0, 2.0], mean_output_tokens=np.nan))
    assert estimator.primary_pool.tolist() == [1, 0]
    per_class = estimator.class_replicas(0)
    assert per_class[1] == pytest.approx(2 * per_class[0])
    assert estimator.replicas(0).tolist() == [per_class[1], per_class[0]]


def test_a_batch_is_estimated_like_its_members(a_spec: Any, a_state: Any) -> None:
    spec = a_spec(kinds=("interactive", "batch"))
    rng = np.random.default_rng(0)
    together = DemandEstimator(spec, batch_shape=(3,))
    alone = [DemandEstimator(spec) for _ in range(3)]
    for step in range(4):
        signals = {
            name: np.where(rng.random((3, 2)) < 0.2, np.nan, rng.uniform(0, 9, (3, 2)))
            for name in ("arrivals_per_s", "arrived_prompt_tokens_per_s", "mean_output_tokens")
        }
        batch: FleetState = a_state(spec, batch_shape=(3,), **signals)
        together.update(batch)
        for e in range(3):
            alone[e].update(batch[e])
            np.testing.assert_allclose(together.replicas(1)[e], alone[e].replicas(1), err_msg=str(step))
    together.reset(np.array([False, True, False]))
    assert together.replicas(0)[1].tolist() == [0.0]
    assert together.replicas(0)[0].tolist() == alone[0].replicas(0).tolist()
