"""Telemetry keeps its columns: as a matrix and back, and in the order in which the engine writes them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.state import ClassTelemetry, PoolTelemetry, ScalingDecision
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.workload.trace import Workload


def test_matrix_round_trip() -> None:
    for kind in (PoolTelemetry, ClassTelemetry):
        matrix = np.random.default_rng(0).random((2, 3, len(fields(kind))))
        telemetry = kind.from_matrix(matrix)
        np.testing.assert_array_equal(telemetry.to_matrix(), matrix)
        for column, field in enumerate(fields(kind)):
            np.testing.assert_array_equal(getattr(telemetry, field.name), matrix[..., column])


def test_one_fleet_of_a_batch(a_spec: Any, a_state: Any) -> None:
    batch = a_state(a_spec(), time_s=[1.0, 2.0], batch_shape=(2,), ready=[[3.0], [4.0]], queue_length=[[5.0], [6.0]])
    one = batch[1]
    assert (float(one.time_s), one.pools.ready.tolist(), one.classes.queue_length.tolist()) == (2.0, [4.0], [6.0])


def test_the_engine_writes_each_signal_into_its_own_field(a_spec: Any, a_pool: Any) -> None:
    """A moment in which most signals have a value of their own: a column out of place would show.

    One replica is ready with cap 3, one is starting since 10 s. Of six batch requests five are sent: two of one token
    end at once, three go on, one is held. The interactive one is refused.
    """
    startup = [{"mean_s": 1000.0, "cv": 0.0}]
    spec = a_spec(
        a_pool("gpu", initial_replicas=1, max_num_seqs=4, startup=startup, kv_blocks=1000),
        kinds=("interactive", "batch"),
        telemetry_age_s=2.0,
        evict_batch=False,
    )
    arrival_s = np.array([10.5, 10.5, 10.5, 10.75, 10.75, 11.0, 11.5])
    prompt = np.array([500, 500, 700, 300, 400, 600, 100])
    output = np.array([9000, 1, 1, 9000, 9000, 9000, 1])
    classes = np.array([1, 1, 1, 1, 1, 1, 0])
    batch = FleetBatch(spec)
    batch.load(0, Workload(arrival_s, prompt, output, classes, ("class0", "class1"), 40.0), seed=0)
    cap = np.array([[3]])
    batch.step(ScalingDecision(np.array([[1]]), cap, np.array([[np.inf, np.inf]])))
    batch.step(ScalingDecision(np.array([[2]]), cap, np.array([[0.0, 4.5]])))
    state = batch.observe()[0]
    pools, (chat, work) = state.pools, [state.classes.to_matrix()[c] for c in (0, 1)]
    names = [field.name for field in fields(ClassTelemetry)]
    window_s = 10.0
    got = {field.name: float(getattr(pools, field.name)[0]) for field in fields(PoolTelemetry)}
    assert got["ready"] == 1
    assert got["starting"] == 1
    assert got["draining"] == 0
    assert got["asked_for"] == 2
    assert got["oldest_start_age_s"] == got["newest_start_age_s"] == 8.0  # asked at 10 s, seen at 18 s
    assert got["running"] + got["waiting"] == got["in_flight"] == 3
    assert got["in_flight_interactive"] == got["busy_interactive"] == 0
    assert got["pending_prompt_tokens"] == 0
    assert 0 < got["kv_usage"] < 1
    assert got["batch_cap"] == 3
    assert 0.005 < got["itl_s"] < 0.05
    assert got["preemptions"] == got["evictions"] == 0
    assert got["prompt_tokens_per_s"] * window_s == pytest.approx(np.sum(prompt[:5]))
    assert got["generation_tokens_per_s"] > 3.0
    assert got["age_s"] == 2.0
    refused, held = dict(zip(names, chat, strict=True)), dict(zip(names, work, strict=True))
    assert refused["refused_per_s"] == refused["arrivals_per_s"] == pytest.approx(1 / window_s)
    assert refused["arrived_prompt_tokens_per_s"] * window_s == pytest.approx(100)
    assert (refused["admission"], held["admission"]) == (0.0, 4.5)
    assert held["arrivals_per_s"] * window_s == pytest.approx(6)
    assert held["arrived_prompt_tokens_per_s"] * window_s == pytest.approx(3000)
    assert (held["queue_length"], held["queued_prompt_tokens"], held["oldest_wait_s"]) == (1, 600, 7.0)
    assert held["in_flight"] == 3
    assert held["first_tokens_per_s"] * window_s == pytest.approx(5)
    assert held["finished_per_s"] == held["met_per_s"] == pytest.approx(2 / window_s)
    assert held["mean_output_tokens"] == 1
    assert 0 < held["ttft_mean_s"] < 1
    assert 0 < held["ttft_p95_s"] <= 1
    assert np.isnan(held["tpot_mean_s"])
    assert np.isnan(held["tpot_p95_s"])
    assert held["dropped_per_s"] == 0
    assert held["age_s"] == 2.0
