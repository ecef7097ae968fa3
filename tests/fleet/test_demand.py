"""The demand estimate by hand: averages at several time scales, and replicas of work."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.fleet.demand import (
    LEAST_PLANNED,
    DemandEstimator,
    StandIns,
    allowed_wait_s,
    due_now,
    overflow,
)
from rl_autoscale.fleet.profile import TYPICAL_OUTPUT_TOKENS
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState


def test_no_data_is_no_demand(a_spec: Any) -> None:
    estimator = DemandEstimator(a_spec())
    assert estimator.replicas(0).tolist() == [0.0]
    assert estimator.mean_output_tokens.tolist() == [TYPICAL_OUTPUT_TOKENS]


def test_the_first_window_is_taken_as_it_is_and_then_forgotten_slowly(a_spec: Any, a_state: Any) -> None:
    spec = a_spec()
    estimator = DemandEstimator(spec, time_constants_s=(0.0, 20.0))
    for rate in (4.0, 8.0):
        state = a_state(spec, arrivals_per_s=rate, arrived_prompt_tokens_per_s=0.0, mean_output_tokens=np.nan)
        estimator.update(state)
    per_request = estimator.request_work_s(np.array([0.0]), np.array([TYPICAL_OUTPUT_TOKENS]), np.array([0]))[0]
    smoothed = 4.0 + (1 - math.exp(-10 / 20)) * 4.0
    assert estimator.replicas(0)[0] == pytest.approx(8.0 * per_request)
    assert estimator.replicas(1)[0] == pytest.approx(smoothed * per_request)


def test_missing_rates_and_empty_windows_change_nothing(a_spec: Any, a_state: Any) -> None:
    spec = a_spec()
    estimator = DemandEstimator(spec)
    signals = {"arrivals_per_s": 4.0, "arrived_prompt_tokens_per_s": 4000.0, "finished_per_s": 3.0}
    estimator.update(a_state(spec, **signals, mean_output_tokens=100.0))
    before = estimator.replicas(0).copy(), estimator.mean_output_tokens.copy()
    estimator.update(
        a_state(
            spec,
            arrivals_per_s=np.nan,
            arrived_prompt_tokens_per_s=np.nan,
            finished_per_s=np.nan,
            mean_output_tokens=np.nan,
        )
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
    decode_s = prefill_s + profile.decode_seq_s + profile.decode_context_s * (1024 + TYPICAL_OUTPUT_TOKENS / 2)
    assert estimator.replicas(0)[0] == pytest.approx(3000 * prefill_s + 3 * TYPICAL_OUTPUT_TOKENS * decode_s)


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
            for name in ("arrivals_per_s", "arrived_prompt_tokens_per_s", "finished_per_s", "mean_output_tokens")
        }
        batch: FleetState = a_state(spec, batch_shape=(3,), generation_tokens_per_s=40.0, **signals)
        together.update(batch)
        for e in range(3):
            alone[e].update(batch[e])
            np.testing.assert_allclose(together.replicas(1)[e], alone[e].replicas(1), err_msg=str(step))
            np.testing.assert_allclose(together.mean_output_tokens[e], alone[e].mean_output_tokens, err_msg=str(step))
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
    prompts, output = 2 * 3000.0, 2 * 2.0 * TYPICAL_OUTPUT_TOKENS
    wanted = (
        output * decode.full_batch_decode_s(1024, TYPICAL_OUTPUT_TOKENS),
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


def batch_fleet(a_spec: Any, a_pool: Any, *ttft_s: float, startup_s: float = 40.0) -> FleetSpec:
    """An interactive pool, a batch pool, and batch classes beside an interactive one."""
    spec = a_spec(a_pool("m"), a_pool("b", "batch", startup=[{"mean_s": startup_s}]), kinds=("interactive",))
    chat = spec.classes[0].model_dump()
    jobs = [{**chat, "name": f"jobs{k}", "kind": "batch", "ttft_slo_s": value} for k, value in enumerate(ttft_s)]
    return FleetSpec.from_dict({**spec.model_dump(), "classes": [chat, *jobs]})


def measured(spec: FleetSpec, a_state: Any) -> DemandEstimator:
    estimator = DemandEstimator(spec)
    rates = {"arrivals_per_s": 2.0, "arrived_prompt_tokens_per_s": 600.0, "finished_per_s": 2.0}
    estimator.update(a_state(spec, **rates, mean_output_tokens=100.0))
    return estimator


def work_s(estimator: DemandEstimator) -> float:
    """Replica-seconds of a request of 300 and 100 tokens on the batch pool."""
    tokens = estimator.mean_output_tokens[1]
    return float(estimator.request_work_s(np.array([300.0]), np.array([tokens]), np.array([1]))[0])


def test_a_backlog_is_started_in_half_of_the_time_left(a_spec: Any, a_pool: Any, a_state: Any) -> None:
    spec = batch_fleet(a_spec, a_pool, 3600.0)
    estimator = measured(spec, a_state)
    state = a_state(spec, queue_length=[500.0, 9000.0], oldest_wait_s=[1.0, 600.0])
    needed = 9000.0 * work_s(estimator) / (0.5 * (3600.0 - 600.0) - 40.0)
    assert estimator.backlog_replicas(state).tolist() == [0.0, pytest.approx(needed)]


def test_what_is_late_is_not_worked_off_at_once(a_spec: Any, a_pool: Any, a_state: Any) -> None:
    spec = batch_fleet(a_spec, a_pool, 3600.0)
    estimator = measured(spec, a_state)
    late = a_state(spec, queue_length=[0.0, 9000.0], oldest_wait_s=[0.0, 5000.0])
    assert estimator.backlog_replicas(late)[1] == pytest.approx(9000.0 * work_s(estimator) / (LEAST_PLANNED * 3600.0))


def test_of_several_deadlines_the_one_that_needs_most_counts(a_spec: Any, a_pool: Any, a_state: Any) -> None:
    """What is due later shares the time of what is due first."""
    spec = batch_fleet(a_spec, a_pool, 3600.0, 300.0, startup_s=10.0)
    estimator = measured(spec, a_state)
    one_s = work_s(estimator)
    few_urgent = a_state(spec, queue_length=[0.0, 5000.0, 10.0])
    assert estimator.backlog_replicas(few_urgent)[1] == pytest.approx(5010.0 * one_s / 1790.0)
    many_urgent = a_state(spec, queue_length=[0.0, 5000.0, 1000.0])
    assert estimator.backlog_replicas(many_urgent)[1] == pytest.approx(1000.0 * one_s / 140.0)


def test_a_queue_however_short_is_due_when_a_replica_could_only_just_start(
    a_spec: Any, a_pool: Any, a_state: Any
) -> None:
    spec = batch_fleet(a_spec, a_pool, 600.0, 3600.0)

    def due(queue: list[float], wait_s: float) -> list[bool]:
        return due_now(spec, a_state(spec, queue_length=queue, oldest_wait_s=wait_s)).tolist()

    assert due([0.0, 1.0, 1.0], 519.0) == [False, False]
    assert due([0.0, 1.0, 0.0], 520.0) == [False, True]
    assert due([9.0, 0.0, 9.0], 520.0) == [False, False]  # interactive work is no batch pool's, the rest has an hour
    assert due([0.0, 1.0, 0.0], np.nan) == [False, False]


def test_an_unknown_queue_is_not_an_empty_one(a_spec: Any, a_pool: Any, a_state: Any) -> None:
    spec = batch_fleet(a_spec, a_pool, 3600.0)
    estimator = measured(spec, a_state)
    assert np.isnan(estimator.backlog_replicas(a_state(spec, queue_length=[0.0, np.nan]))[1])
    assert estimator.backlog_replicas(a_state(spec, oldest_wait_s=np.nan)).tolist() == [0.0, 0.0]


def test_backlogs_of_many_fleets_are_those_of_each(a_spec: Any, a_pool: Any, a_state: Any) -> None:
    spec = batch_fleet(a_spec, a_pool, 3600.0, 300.0)
    arrivals = np.array([[1.0, 2.0, 3.0], [4.0, 0.0, 9.0]])
    queues = np.array([[1.0, 200.0, 3000.0], [4.0, 900.0, 0.0]])
    many = DemandEstimator(spec, batch_shape=(2,))
    many.update(a_state(spec, batch_shape=(2,), arrivals_per_s=arrivals, arrived_prompt_tokens_per_s=300 * arrivals))
    found = many.backlog_replicas(a_state(spec, batch_shape=(2,), queue_length=queues, oldest_wait_s=30.0))
    for row in range(2):
        one = DemandEstimator(spec)
        one.update(a_state(spec, arrivals_per_s=arrivals[row], arrived_prompt_tokens_per_s=300 * arrivals[row]))
        state = a_state(spec, queue_length=queues[row], oldest_wait_s=30.0)
        assert found[row].tolist() == one.backlog_replicas(state).tolist()


def test_a_deadline_shortens_the_wait_that_is_allowed(a_spec: Any, a_pool: Any) -> None:
    spec = batch_fleet(a_spec, a_pool, 3600.0)
    jobs = {**spec.classes[1].model_dump(), "deadline_s": 1000.0, "tpot_slo_s": 1.0}
    bounded = FleetSpec.from_dict({**spec.model_dump(), "classes": [spec.classes[0].model_dump(), jobs]})
    for output_tokens, allowed_s in ((200.0, 800.0), (2000.0, 0.0)):
        tokens = np.array([output_tokens, output_tokens])
        assert allowed_wait_s(spec, tokens).tolist() == [1.0, 3600.0]
        assert allowed_wait_s(bounded, tokens).tolist() == [1.0, allowed_s]


def test_a_pool_beside_serves_until_the_others_have_started(a_spec: Any, a_pool: Any, a_state: Any) -> None:
    spec = a_spec(a_pool("i", "interactive"), a_pool("m"), a_pool("b", "batch"), kinds=("interactive", "batch"))
    stand_ins = StandIns(spec)

    def kept(ready: list[float], asked_for: Any = 4.0) -> list[float]:
        state = a_state(spec, ready=ready, asked_for=asked_for)
        return stand_ins.keep(np.array([6, 0, 3]), state).tolist()

    assert kept([0.0, 4.0, 0.0]) == [6, 4, 3]  # no more than it has
    assert kept([5.0, 4.0, 0.0]) == [6, 1, 3]
    assert kept([6.0, 4.0, 0.0]) == [6, 0, 3]  # a batch pool's work may wait
    assert kept([np.nan, 4.0, 0.0]) == [6, 4, 3]  # who cannot be read may lack everything
    assert kept([5.0, 4.0, 0.0], asked_for=np.nan) == [6, 1, 3]
    assert kept([0.0, 2.0, 0.0], asked_for=np.nan) == [6, 2, 3]  # what is ready is there
    assert kept([0.0, np.nan, 0.0], asked_for=np.nan) == [6, 0, 3]
    assert stand_ins.keep(np.array([16, -1, 3]), a_state(spec, ready=10.0)).tolist() == [10, 0, 3]  # within bounds


def test_a_rule_that_never_resizes_stand_ins_is_rid_of_them_in_time(a_spec: Any, a_pool: Any, a_state: Any) -> None:
    spec = a_spec(a_pool("i", "interactive"), a_pool("m", min_replicas=1))
    stand_ins = StandIns(spec)

    def released(ready: float, **signals: Any) -> list[float]:
        return stand_ins.release(np.array([6, 4]), a_state(spec, ready=[ready, 4.0], asked_for=4.0, **signals)).tolist()

    assert released(3.0) == [6, 3]
    assert released(6.0) == [6, 1]
    assert released(6.0, arrivals_per_s=np.nan) == [6, 4]  # nothing is known yet


def test_a_slower_stand_in_keeps_more_replicas_for_the_same_work(a_state: Any) -> None:
    """Four of the interactive pool's are starting, and nobody prefers a mixed one."""
    spec = three_kinds()
    spec = FleetSpec.from_dict({**spec.model_dump(), "classes": [spec.classes[0].model_dump()]})
    state = a_state(spec, asked_for=50.0)
    kept = StandIns(spec).keep(np.array([0.0, 0.0, 0.0, 4.0]), state)
    request_s = np.array([pool.typical_request_s for pool in spec.pools])
    assert kept.tolist() == np.ceil(4.0 * request_s / request_s[3] - 1e-12).tolist()
    assert kept[2] > 4 > kept[1]  # an L40S is slower, an H100 faster


def test_hardware_beside_the_first_choice_is_no_stand_in() -> None:
    assert StandIns(three_kinds()).pools.size == 0
