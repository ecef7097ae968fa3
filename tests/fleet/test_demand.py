"""The demand estimate by hand: averages at several time scales, and replicas of work."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.fleet.demand import PRIOR_OUTPUT_TOKENS, DemandEstimator, overflow
from rl_autoscale.fleet.spec import FleetSpec
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
    assert (estimator.work_class.tolist(), estimator.work_pool.tolist()) == ([0, 1], [1, 0])
    per_class = estimator.work_replicas(0)
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


KINDS = ("llama-3.1-8b_a100_tp1", "llama-3.1-8b_h100_tp1", "llama-3.1-8b_l40s_tp1")


def three_kinds(*prices: float) -> FleetSpec:
    """Three kinds of GPU for both classes, and a pool of another role."""
    pools = [
        {"name": kind, "profile": kind, "max_replicas": 10, "price_usd_per_gpu_hour": price}
        for kind, price in zip(KINDS, prices or (1.8, 3.0, 0.9), strict=True)
    ]
    alone = {**pools[0], "name": "alone", "role": "interactive"}
    classes = [{"name": kind, "kind": kind, "ttft_slo_s": 1.0, "tpot_slo_s": 0.1} for kind in ("interactive", "batch")]
    return FleetSpec.from_dict({"pools": [*pools, alone], "classes": classes})


def test_of_pools_beside_each_other_the_cheapest_work_comes_first() -> None:
    """An H100 costs more per hour than an A100 or an L40S, and less per request."""
    spec = three_kinds()
    assert spec.cheapest_first == ((1, 2, 0), (3,))
    assert spec.first_choice.tolist() == [3, 1]  # the interactive class prefers its own role whatever it costs
    assert three_kinds(1.0, 9.0, 9.0).first_choice.tolist() == [3, 0]
    assert three_kinds(0.0, 0.0, 0.0).cheapest_first[0] == (0, 1, 2)


@given(st.lists(st.floats(0.0, 60.0), min_size=4, max_size=4))
def test_overflow_keeps_the_work_and_fills_the_cheapest(replicas: list[float]) -> None:
    spec = three_kinds()
    wanted = np.array(replicas)
    placed = overflow(spec, wanted)
    requests_per_s = np.array([1.0 / item.typical_request_s for item in spec.pools])
    assert placed @ requests_per_s == pytest.approx(wanted @ requests_per_s)
    assert (placed[[1, 2]] <= spec.max_replicas[[1, 2]] + 1e-9).all()
    assert placed[3] == wanted[3]  # nobody stands beside it
    for full, following in ((1, 2), (2, 0)):
        if placed[following] > wanted[following]:
            assert placed[full] == pytest.approx(spec.max_replicas[full])
    if (wanted <= spec.max_replicas).all():
        assert placed.tolist() == wanted.tolist()


def test_prefill_is_asked_for_prompts_and_decode_for_output(a_spec: Any, a_pool: Any, a_state: Any) -> None:
    """Each pool gets its own half, and a decode pool pays for reading the weights, which prompts share elsewhere."""
    spec = a_spec(a_pool("d", "decode"), a_pool("p", "prefill"), kinds=("interactive", "batch"), kv_transfer={})
    estimator = DemandEstimator(spec, time_constants_s=(0.0,))
    signals = {"arrivals_per_s": 2.0, "arrived_prompt_tokens_per_s": 3000.0, "mean_output_tokens": np.nan}
    estimator.update(a_state(spec, **signals))
    decode, prefill = spec.pools
    prompts, output = 2 * 3000.0, 2 * 2.0 * PRIOR_OUTPUT_TOKENS
    wanted = (
        output * decode.full_batch_decode_s(1024, PRIOR_OUTPUT_TOKENS),
        prompts * prefill.hardware.prefill_s_per_token(),
    )
    assert estimator.replicas(0) == pytest.approx(wanted)
    assert estimator.replicas_by_scale()[0] == pytest.approx(wanted)
    assert estimator.classes_asking(0).tolist() == estimator.classes_asking(1).tolist() == [True, True]
    one = np.array([1000.0]), np.array([200.0]), np.array([1])
    by_pool = [estimator.pool_work_s(*one, p)[0] for p in range(2)]
    assert sum(by_pool) == pytest.approx(estimator.request_work_s(*one)[0])
    assert by_pool[1] == pytest.approx(1000 * prefill.hardware.prefill_s_per_token())
    assert decode.typical_request_s + prefill.typical_request_s > prefill.typical_request_s > 0
