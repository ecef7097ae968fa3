"""The histogram of gaps between tokens, where it can be worked out by hand; the reference checks it in all fleets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.workload.trace import Workload

EDGES_S = np.array([1.0, 2.0, 3.0, 4.0])


@pytest.fixture
def metronome(tmp_path: Path) -> str:
    path = tmp_path / "metronome.yaml"
    path.write_text(
        "{name: metronome, model: toy, gpu: toy, gpus_per_replica: 1, kv_blocks: 100, kv_bytes_per_token: 1024,"
        " max_num_seqs: 4, max_num_batched_tokens: 64, token_knots: [0, 1], token_knot_s: [1.0, 1.0],"
        " decode_context_s: 0, decode_seq_s: 0, prefill_pair_s: 0, prefill_context_s: 0, prefill_seq_s: 0,"
        " source: every iteration lasts 1 s}"
    )
    return str(path)


def gaps(profile: str, scheduler: str, prompt_tokens: list[int], edges_s: np.ndarray | None = EDGES_S) -> list[int]:
    """Two requests, the second at 2.5 s; eight tokens for the first, three for the second."""
    pool = {"name": "a", "profile": profile, "max_replicas": 1, "scheduler": scheduler}
    fleet = {"pools": [pool], "classes": [{"name": "chat", "ttft_slo_s": 9, "tpot_slo_s": 9}]}
    batch = FleetBatch(FleetSpec.from_dict(fleet), gap_edges_s=edges_s)
    lengths = np.array(prompt_tokens, dtype=np.int32), np.array([8, 3], dtype=np.int32)
    batch.load(0, Workload(np.array([0.0, 2.5]), *lengths, np.zeros(2, dtype=np.int32), ("chat",), 3.0), seed=0)
    batch.run(0)
    return batch.token_gaps()[0].tolist()


def test_every_gap_is_counted_once(metronome: str) -> None:
    assert gaps(metronome, "vllm", [16, 16]) == [7 + 2, 0, 0, 0, 0]


def test_a_prompt_that_stops_the_batch_is_a_long_gap(metronome: str) -> None:
    """150 tokens take three iterations: the first request waits 1 + 3 s for one of its tokens."""
    assert gaps(metronome, "vllm-v0", [16, 150]) == [6 + 2, 0, 0, 1, 0]


def test_nothing_is_counted_unless_asked_for(metronome: str) -> None:
    assert sum(gaps(metronome, "vllm", [16, 16], None)) == 0
