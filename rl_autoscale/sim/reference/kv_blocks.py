"""The KV blocks of one replica, with or without automatic prefix caching.

Reference: vllm V1, v1/core/block_pool.py (`get_new_blocks`, `touch`, `free_blocks`, `cache_full_blocks`) and
v1/core/kv_cache_manager.py (`get_computed_blocks`, `allocate_slots`, `free`). vLLM keeps one block of the cache as a
placeholder; here ``num_blocks`` are all usable.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.sim.reference.books import PoolBooks
from rl_autoscale.sim.reference.request import Request, blocks_for


@dataclass(slots=True, eq=False)
class Block:
    """16 tokens of KV cache.

    Attributes:
        key: of its content while it may be found, else None.
        num_users: requests that have it in their block tables.
    """

    key: object = None
    num_users: int = 0


@dataclass(slots=True)
class KvBlocks:
    """Free, used and cached blocks.

    Args:
        num_blocks: all of them.
        caching: whether contents are found again.
        books: the pool's.
    """

    num_blocks: int
    caching: bool
    books: PoolBooks
    _free: OrderedDict[Block, None] = field(init=False)  # the next to be handed out is first
    _cached: dict[object, dict[Block, None]] = field(init=False, default_factory=dict)  # oldest first

    def __post_init__(self) -> None:
        """All blocks are free and blank."""
        self._free = OrderedDict((Block(), None) for _ in range(self.num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks in nobody's table, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks in somebody's table."""
        return self.num_blocks - len(self._free)

    def longest_hit(self, request: Request) -> list[Block]:
        """The longest run of cached blocks from the beginning that leaves a token to compute; takes nothing."""
        found: list[Block] = []
        for j in range((request.num_tokens - 1) // BLOCK_SIZE_TOKENS if self.caching else 0):
            copies = self._cached.get(request.block_key(j))
            if copies is None:
                break
            found.append(next(iter(copies)))
        return found

    def reuse(self, request: Request, blocks: list[Block]) -> None:
        """Put blocks that were found into a request's (empty) table."""
        for block in blocks:
            if block.num_users == 0:
                del self._free[block]
            block.num_users += 1
            request.block_table.append(block)

    def extend(self, request: Request, num_tokens: int) -> None:
        """Give a request blocks for its first so many tokens and cache those that are full then."""
        while len(request.block_table) < blocks_for(num_tokens):
            request.block_table.append(self._take())
        for j in range(num_tokens // BLOCK_SIZE_TOKENS if self.caching else 0):
            block = request.block_table[j]
            if block.key is None:
                block.key = request.block_key(j)
                self._cached.setdefault(block.key, {})[block] = None

    def free(self, request: Request) -> None:
        """Empty a request's table: its last block is overwritten first, and blank blocks before all others."""
        while request.block_table:
            block = request.block_table.pop()
            block.num_users -= 1
            if block.num_users == 0:
                self._free[block] = None
                if block.key is None:
                    self._free.move_to_end(block, last=False)

    def _take(self) -> Block:
        """Hand out the first free block; what it held is forgotten."""
        block, _ = self._free.popitem(last=False)
        if block.key is not None:
            copies = self._cached[block.key]
            del copies[block]
            if not copies:
                del self._cached[block.key]
            self.books.cached_blocks_evicted += isinstance(block.key, int)  # others could have found it
            block.key = None
        block.num_users = 1
        return block
