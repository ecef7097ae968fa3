"""How many requests a replica may have in flight, against the profile's own iteration times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.in_flight import SLO_SHARE, InFlight
from rl_autoscale.fleet.spec import FleetSpec

ONE = np.ones(1)


def number(spec: FleetSpec, prompt_tokens: float, output_tokens: float) -> float:
    return float(InFlight(spec).per_replica(ONE, prompt_tokens * ONE, output_tokens * ONE)[0])


@pytest.mark.parametrize(("prompt", "output"), [(2000, 28), (1200, 210), (1000, 2000), (400, 60)])
def test_an_iteration_of_as_many_takes_its_share_of_the_slo(a_spec: Any, a_pool: Any, prompt: int, output: int) -> None:
    spec = a_spec(a_pool("gpu", max_num_seqs=1024, max_num_batched_tokens=8192))
    n = number(spec, prompt, output)
    assert 1.0 < n < 1024.0
    gpu = spec.pools[0].hardware

    def iteration_s(in_flight: float) -> float:
        tokens = int(in_flight * (1.0 + prompt / output))
        per_sequence_s = gpu.decode_seq_s + gpu.mixed_seq_s
        per_token_s = gpu.decode_context_s + gpu.mixed_context_s
        return (
            float(gpu.token_time_s(tokens))
            + gpu.host_s
            + in_flight * (per_sequence_s + per_token_s * (prompt + output / 2))
        )

    assert iteration_s(1.02 * n) > SLO_SHARE * 0.1
    assert iteration_s(0.97 * n) < SLO_SHARE * 0.1


@pytest.mark.parametrize(("prompt", "output", "expected"), [(2000, 28, 16), (1200, 210, 143)])
def test_what_the_docstrings_say(a_spec: Any, a_pool: Any, prompt: int, output: int, expected: int) -> None:
    assert round(number(a_spec(a_pool("gpu", max_num_seqs=256)), prompt, output)) == expected


def test_longer_prompts_and_shorter_answers_leave_room_for_fewer(a_spec: Any, a_pool: Any) -> None:
    spec = a_spec(a_pool("gpu", max_num_seqs=256))
    assert number(spec, 2000, 28) < number(spec, 2000, 100) < number(spec, 1000, 100) < 256.0
    assert number(a_spec(a_pool("gpu", max_num_seqs=8)), 2000, 28) == 8.0
    assert number(a_spec(a_pool("gpu", profile="llama-3.1-8b_h100_tp1", max_num_seqs=256)), 2000, 28) > number(
        spec, 2000, 28
    )


def test_chunks_that_never_stall_decoding_need_no_cap(a_spec: Any, a_pool: Any) -> None:
    """A full budget of 2,048 tokens takes 0.12 s, longer than the SLO of 0.1 s; one of 512 takes 0.04 s."""
    stalls, flows = (a_pool("gpu", max_num_seqs=256, max_num_batched_tokens=budget) for budget in (2048, 512))
    assert number(a_spec(stalls), 2000, 28) < 20.0
    assert number(a_spec(flows), 2000, 28) > 200.0


def test_it_is_about_interactive_classes_by_their_arrivals(a_spec: Any, a_pool: Any) -> None:
    spec = a_spec(a_pool("own", "batch"), a_pool("both"), kinds=("interactive", "batch", "interactive"))
    prompts, outputs = np.array([4000.0, 16000.0, 8000.0]), np.full(3, 100.0)

    def in_flight(*per_s: float) -> list[float]:
        rates = np.array(per_s)
        return [float(n) for n in InFlight(spec).per_replica(rates, rates * prompts, outputs)]

    limit = float(spec.batch_limits[0])
    short, long = in_flight(3.0, 0.0, 0.0)[1], in_flight(0.0, 0.0, 3.0)[1]
    assert long < short < limit
    assert in_flight(3.0, 50.0, 0.0) == [limit, short]  # batch requests change nothing, their pool is to be full
    assert long < in_flight(3.0, 50.0, 3.0)[1] < short
    assert in_flight(0.0, 50.0, 0.0) == [limit, limit]


def test_a_prefill_pool_is_about_first_tokens_and_a_decode_pool_has_no_prompts(a_spec: Any, a_pool: Any) -> None:
    spec = a_spec(a_pool("d", "decode", max_num_seqs=1024), a_pool("p", "prefill", max_num_seqs=1024), kv_transfer={})
    decode, prefill = InFlight(spec).per_replica(ONE, 2000.0 * ONE, 200.0 * ONE)
    assert prefill == pytest.approx(SLO_SHARE * 1.0 / (2000.0 * spec.pools[1].hardware.prefill_s_per_token()))
    gpu, context = spec.pools[0].hardware, 2000.0 + 100.0
    assert number(a_spec(a_pool("gpu", max_num_seqs=1024)), 2000, 200) < decode < 1024.0
    for share, in_time in ((0.98, True), (1.02, False)):
        batch = int(share * decode)
        iteration_s = gpu.iteration_s(num_decode=batch, decode_context_tokens=batch * context)
        assert (iteration_s < SLO_SHARE * 0.1) == in_time


def test_drafts_that_are_kept_make_room_and_those_that_are_not_take_it(a_spec: Any, a_pool: Any) -> None:
    plain = number(a_spec(a_pool("gpu", max_num_seqs=256)), 1200, 210)
    kept, lost = (
        number(a_spec(a_pool("gpu", max_num_seqs=256, speculation={"draft_tokens": 3, "acceptance": share})), 1200, 210)
        for share in (0.95, 0.0)
    )
    assert lost < plain < kept


def test_a_fleet_is_measured_before_it_is_capped(a_spec: Any, a_pool: Any, a_state: Any) -> None:
    spec = a_spec(a_pool("gpu", max_num_seqs=256))
    estimator = DemandEstimator(spec, time_constants_s=(0.0,), batch_shape=(2,))
    assert estimator.in_flight(0).tolist() == [[256.0], [256.0]]
    rates = np.array([[2.0], [np.nan]])
    state = a_state(
        spec, batch_shape=(2,), window_s=[10.0, 10.0], arrivals_per_s=rates, arrived_prompt_tokens_per_s=2000.0 * rates
    )
    estimator.update(state)
    capped, blind = estimator.in_flight(0)[:, 0]
    assert capped == pytest.approx(number(spec, 2000.0, float(estimator.mean_output_tokens[0, 0])))
    assert blind == 256.0
