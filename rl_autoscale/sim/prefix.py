"""What a workload says about shared prompts, in KV blocks of 16 tokens, and the hit rate no cache can beat.

A trace hashes its prompts in blocks of its own size (Mooncake: 512 tokens); equal hashes mean equal prompts up to and
with that block. An engine caches full KV blocks of 16 tokens, so hash h covers the KV blocks ``h * n .. h * n + n - 1``
with n = 512 / 16. A last hash of which only a part is prompt covers its full KV blocks only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.sim.layout import IntArray
from rl_autoscale.workload.trace import Workload


@dataclass(frozen=True, slots=True, eq=False)
class PrefixBlocks:
    """Keys of the KV blocks that a request's prompt may share with others.

    Attributes:
        hash_ids: int64, the workload's hashes renumbered from 0.
        hash_offsets: shape (num_requests + 1,), int64; request i owns ``hash_ids[offsets[i]:offsets[i + 1]]``.
        blocks_per_hash: KV blocks per hash.
        num_shared: shape (num_requests,), int32: full KV blocks of the prompt that hashes cover.
    """

    hash_ids: IntArray
    hash_offsets: IntArray
    blocks_per_hash: int
    num_shared: npt.NDArray[np.int32]

    def hashes(self, request: int) -> IntArray:
        """A request's hashes in order, int64, >= 0."""
        return self.hash_ids[self.hash_offsets[request] : self.hash_offsets[request + 1]]

    def keys(self, request: int) -> IntArray:
        """Keys of a request's shareable blocks in order, int64, >= 0; equal keys are equal prefixes."""
        block = np.arange(self.num_shared[request])
        ids = self.hashes(request)[block // self.blocks_per_hash]
        return np.asarray(ids * self.blocks_per_hash + block % self.blocks_per_hash)


def prefix_blocks(workload: Workload) -> PrefixBlocks:
    """Translate a workload's hashes; without hashes nothing is shared.

    Raises:
        SpecError: the hashed blocks are no multiple of 16 tokens.
    """
    number = workload.num_requests
    if workload.hash_ids is None or workload.hash_offsets is None:
        nothing = np.zeros(0, dtype=np.int64)
        return PrefixBlocks(nothing, np.zeros(number + 1, dtype=np.int64), 1, np.zeros(number, dtype=np.int32))
    blocks_per_hash, rest = divmod(workload.hash_block_tokens, BLOCK_SIZE_TOKENS)
    if rest:
        raise SpecError(
            f"hash_block_tokens={workload.hash_block_tokens} is no multiple of {BLOCK_SIZE_TOKENS}, the engine's KV "
            "block; re-hash the trace or set prefix_caching: false"
        )
    _, ids = np.unique(workload.hash_ids, return_inverse=True)
    hashed = np.diff(workload.hash_offsets) * blocks_per_hash
    shared = np.minimum(workload.prompt_tokens // BLOCK_SIZE_TOKENS, hashed)
    return PrefixBlocks(ids.astype(np.int64), workload.hash_offsets, blocks_per_hash, shared.astype(np.int32))


def ideal_prefix_hit_rate(workload: Workload) -> float:
    """Share of prompt tokens that one infinite cache would find, were every prompt computed the moment it arrives.

    Full KV blocks only, and at least one token is always computed, as in vLLM; NaN without requests.
    """
    blocks = prefix_blocks(workload)
    seen: set[int] = set()
    found_tokens = 0
    for q in range(workload.num_requests):
        keys = blocks.keys(q).tolist()
        limit = (int(workload.prompt_tokens[q]) - 1) // BLOCK_SIZE_TOKENS
        num_found = next((j for j, key in enumerate(keys) if key not in seen), len(keys))
        found_tokens += min(num_found, limit) * BLOCK_SIZE_TOKENS
        seen.update(keys[num_found:])
    total = int(workload.prompt_tokens.sum(dtype=np.int64))
    return found_tokens / total if total else float("nan")
