"""Measured times and other schedulers: equal to the reference where they must be, else as computed by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from rl_autoscale.experiments.validation.replay import (
    MeasuredHardware,
    one_replica,
    recorded_workload,
    run_compiled,
    run_reference,
)
from rl_autoscale.experiments.validation.vidur_schedulers import PrefillFirstScheduler, SarathiScheduler
from rl_autoscale.fleet.profile import load_profile
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.workload.trace import Workload

PROFILE = load_profile("llama-3.1-8b_a100_tp1")
TIMES = ("scheduled_s", "first_token_s", "end_s")


def traffic(num_requests: int, rate_per_s: float) -> Workload:
    rng = np.random.default_rng(0)
    arrival_s = np.cumsum(rng.exponential(1 / rate_per_s, num_requests))
    return recorded_workload(arrival_s, rng.integers(1, 1500, num_requests), rng.integers(1, 200, num_requests))


def replica(kv_blocks: int = 20_000, budget: int = 512) -> FleetSpec:
    return one_replica(PROFILE, max_num_seqs=128, max_num_batched_tokens=budget, kv_blocks=kv_blocks)


def constant(_: Sequence[tuple[int, int]], num_decode: int, context: float) -> float:
    return 1.0


class TestMeasuredHardware:
    def test_a_function_that_says_what_the_profile_says_changes_nothing(self) -> None:
        same = MeasuredHardware.of(
            PROFILE,
            lambda chunks, num_decode, context: PROFILE.iteration_s(
                num_decode=num_decode, decode_context_tokens=context, chunks=tuple(chunks)
            ),
        )
        spec = one_replica(same, max_num_seqs=128, max_num_batched_tokens=512, kv_blocks=600)
        looked_up = run_reference(spec, traffic(60, 6.0))
        compiled = run_compiled(replica(kv_blocks=600), traffic(60, 6.0))
        assert looked_up["num_preemptions"].sum() > 0  # the KV cache really was full
        for name in TIMES:
            assert np.abs(looked_up[name] - compiled[name]).max() < 1e-9

    def test_the_function_is_what_counts(self) -> None:
        spec = one_replica(
            MeasuredHardware.of(PROFILE, constant), max_num_seqs=1, max_num_batched_tokens=100, kv_blocks=50
        )
        work = recorded_workload(np.array([0.0, 0.25]), np.array([150, 100]), np.array([3, 1]))
        records = run_reference(spec, work)
        assert records["first_token_s"].tolist() == [2.0, 5.0]  # two chunks; then two decodes and a prompt
        assert records["end_s"].tolist() == [4.0, 5.0]


class TestVidurSchedulers:
    def test_chunked_prefill_is_vllms_while_blocks_last(self) -> None:
        work = traffic(150, 8.0)
        ours, theirs = run_reference(replica(), work), run_reference(replica(), work, SarathiScheduler)
        assert (ours["end_s"] - ours["arrival_s"]).max() > 1.0
        for name in TIMES:
            assert np.array_equal(ours[name], theirs[name])

    def test_a_decode_needs_a_free_block_even_if_its_own_has_room(self) -> None:
        spec = one_replica(
            MeasuredHardware.of(PROFILE, constant), max_num_seqs=8, max_num_batched_tokens=100, kv_blocks=4
        )
        work = recorded_workload(np.zeros(2), np.array([17, 17]), np.array([5, 5]))  # two blocks each: all are taken
        assert run_reference(spec, work)["num_preemptions"].sum() == 0
        theirs = run_reference(spec, work, SarathiScheduler)
        # The second prompt joins at 1; from 2 on no block is free, so the first's decode sends it back, and it is let
        # in again at once: it computes all its tokens anew for each new one, until the first is done at 5.
        assert theirs["num_preemptions"].tolist() == [0, 3]
        assert theirs["end_s"].tolist() == [5.0, 6.0]

    def test_prompts_first_never_mixes(self) -> None:
        seen: list[tuple[int, int]] = []

        def watch(chunks: Sequence[tuple[int, int]], num_decode: int, context: float) -> float:
            seen.append((len(chunks), num_decode))
            return 0.1

        spec = one_replica(
            MeasuredHardware.of(PROFILE, watch), max_num_seqs=8, max_num_batched_tokens=300, kv_blocks=500
        )
        work = recorded_workload(np.array([0.0, 0.05, 0.05, 0.05]), np.array([100, 120, 90, 110]), np.full(4, 4))
        records = run_reference(spec, work, PrefillFirstScheduler)
        assert all(chunks == 0 or num_decode == 0 for chunks, num_decode in seen)
        assert seen[:3] == [(1, 0), (2, 0), (1, 0)]  # three times the longest, 120, would exceed 300
        assert records["first_token_s"].tolist() == pytest.approx([0.1, 0.2, 0.2, 0.3])
