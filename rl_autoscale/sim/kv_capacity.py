"""How many KV blocks a replica has: what is left of GPU memory after weights and everything else the engine keeps.

    blocks = floor((memory_share x GPU bytes - weights - reserve) / KV bytes per token / 16)

All bytes are per GPU: with tensor parallelism each GPU holds a share of the weights and of every token's keys and
values, so the blocks of one GPU are the blocks of the replica. It is the arithmetic of vLLM's start-up profiling (vllm
0.33.0, v1/worker/gpu_worker.py), with its measured peak replaced by an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS

GPU_MEMORY_UTILIZATION = 0.92
"""vLLM's default share of GPU memory (vllm 0.33.0, config/cache.py)."""


@dataclass(frozen=True, slots=True)
class KvCapacity:
    """Memory of one GPU of a replica.

    Attributes:
        gpu_bytes: memory of the device.
        weights_bytes: model weights on this GPU.
        reserve_bytes: activations at the token budget, CUDA context and graphs, communication buffers.
        bytes_per_token: keys and values of one token over all layers: 2 x layers x KV heads here x head size x bytes.
        memory_share: fraction of the device the engine may use.
    """

    gpu_bytes: float
    weights_bytes: float
    reserve_bytes: float
    bytes_per_token: float
    memory_share: float = GPU_MEMORY_UTILIZATION

    @property
    def num_blocks(self) -> int:
        """Blocks of 16 tokens.

        Raises:
            SpecError: the model does not fit.
        """
        free = self.memory_share * self.gpu_bytes - self.weights_bytes - self.reserve_bytes
        blocks = int(free // self.bytes_per_token) // BLOCK_SIZE_TOKENS if free > 0 else 0
        if blocks < 1:
            raise SpecError(
                f"no memory is left for KV cache: {self.memory_share:g} x {_gb(self.gpu_bytes)} must hold "
                f"{_gb(self.weights_bytes)} of weights and {_gb(self.reserve_bytes)} of reserve; "
                "use more GPUs per replica"
            )
        return blocks

    @property
    def derivation(self) -> str:
        """The formula with its numbers, for a profile's notes."""
        return (
            f"KV blocks per GPU: ({self.memory_share:g} x {_gb(self.gpu_bytes)} - {_gb(self.weights_bytes)} weights "
            f"- {_gb(self.reserve_bytes)} activations, CUDA graphs and buffers) "
            f"/ {self.bytes_per_token:,.0f} bytes per token / {BLOCK_SIZE_TOKENS}"
        )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
