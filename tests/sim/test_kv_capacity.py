"""KV capacity against hand arithmetic."""

from __future__ import annotations

import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.sim.kv_capacity import KvCapacity

LLAMA_8B_KV_BYTES = 2 * 32 * 8 * 128 * 2  # keys and values, layers, KV heads, head size, bf16


def test_blocks_are_what_is_left_after_weights_and_reserve() -> None:
    capacity = KvCapacity(gpu_bytes=80e9, weights_bytes=16e9, reserve_bytes=4e9, bytes_per_token=LLAMA_8B_KV_BYTES)
    assert capacity.num_blocks == int((0.92 * 80e9 - 20e9) / (16 * 131_072)) == 25_558
    assert "(0.92 x 80.00 GB - 16.00 GB weights - 4.00 GB" in capacity.derivation


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match=r"must hold 141.00 GB of weights.*use more GPUs per replica"):
        _ = KvCapacity(80e9, 141e9, 4e9, LLAMA_8B_KV_BYTES).num_blocks
