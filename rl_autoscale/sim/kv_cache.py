"""Kernel: a replica's KV blocks one by one, for pools with automatic prefix caching.

Semantics (vllm V1, v1/core/block_pool.py and kv_cache_manager.py; reference twin in sim/reference/kv_blocks.py):

- A block is *cached* under the key of its content from the moment a chunk that fills it is scheduled until it is
  handed out again. Blocks are not de-duplicated; of several with one key the oldest is found.
- A prefix hit is the longest run of cached blocks from the prompt's beginning, one token at least left to compute.
- Free blocks are handed out least recently used first, blank ones before all others; a request's last block is freed
  first.

Blocks that decode sequences fill hold what nobody else can ask for, so they stay anonymous while the sequence runs: a
leap takes its blocks off the queue by number, and a request is given as many back as it must have when it leaves. That
keeps the cost of a leap independent of the batch size.
"""

from __future__ import annotations

import numpy as np

from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.layout import BLOCK, NONE

NO_KEY = -(1 << 62)
"""Key of a block whose content nobody may find."""


@hot
def blocks_of(tokens):
    """KV blocks that hold so many tokens."""
    return (tokens + BLOCK - 1) // BLOCK


@hot
def reserved_blocks(w, r, q):
    """KV blocks of the longest sequence that a request may become, as its class allows, drafts included."""
    request = w.req[q]
    most_tokens = request.prompt_tokens + w.cls[request.class_index].max_output_tokens
    return blocks_of(most_tokens + w.pool[w.rep[r].pool].verified_tokens - 1)


@njit
def empty_cache(w, r):
    """A replica that becomes ready has cached nothing; its lists are those of a cleared slot."""
    kv = w.kv[r]
    for b in range(w.pool[w.rep[r].pool].kv_blocks):
        kv[b].bucket = NONE


@hot
def block_key(w, q, j):
    """Key of block j of a request: the trace's where it may be shared, else one that only this request has."""
    prompt = w.prompt[q]
    if j < prompt.num_shared:
        per = w.fleet[0].blocks_per_hash
        return w.hash_ids[prompt.hash_start + j // per] * per + j % per
    return -1 - ((np.int64(q) << 24) | j)


@hot
def bucket_of(key, size):
    """Fibonacci hashing onto 0..size-1."""
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64(((mixed >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32))


@hot
def find(kv, key, size):
    """The oldest block cached under a key, or NONE."""
    b = kv[bucket_of(key, size)].bucket
    while b >= 0 and kv[b].key != key:
        b = kv[b].chain
    return b


@njit
def remember(kv, b, key, size):
    """Cache a block under a key, behind all blocks that were cached before."""
    kv[b].key = key
    kv[b].chain = NONE
    home = bucket_of(key, size)
    last = kv[home].bucket
    if last < 0:
        kv[home].bucket = b
        return
    while kv[last].chain >= 0:
        last = kv[last].chain
    kv[last].chain = b


@njit
def forget(kv, b, size):
    """A cached block is about to be overwritten."""
    home = bucket_of(kv[b].key, size)
    kv[b].key = NO_KEY
    if kv[home].bucket == b:
        kv[home].bucket = kv[b].chain
        return
    before = kv[home].bucket
    while kv[before].chain != b:
        before = kv[before].chain
    kv[before].chain = kv[b].chain


@hot
def queue_remove(w, r, b):
    """Take a block out of the queue of free blocks."""
    rep = w.rep[r]
    kv = w.kv[r]
    if kv[b].prev >= 0:
        kv[kv[b].prev].next = kv[b].next
    else:
        rep.queue_head = kv[b].next
    if kv[b].next >= 0:
        kv[kv[b].next].prev = kv[b].prev
    else:
        rep.queue_tail = kv[b].prev


@hot
def queue_append(w, r, b):
    """A free block becomes the most recently used one."""
    rep = w.rep[r]
    kv = w.kv[r]
    kv[b].next = NONE
    kv[b].prev = rep.queue_tail
    if rep.queue_tail >= 0:
        kv[rep.queue_tail].next = b
    else:
        rep.queue_head = b
    rep.queue_tail = b


@hot
def take_block(w, r):
    """Hand out a free block: blank, never used, or the least recently used, whose content is lost."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    kv = w.kv[r]
    if rep.blank_head >= 0:
        b = rep.blank_head
        rep.blank_head = kv[b].next
    elif rep.num_fresh < pool.kv_blocks:
        b = rep.num_fresh
        rep.num_fresh += 1
        kv[b].key = NO_KEY
    else:
        b = rep.queue_head
        queue_remove(w, r, b)
        if kv[b].key != NO_KEY:
            if kv[b].key >= 0:
                pool.cached_blocks_evicted += 1
            forget(kv, b, pool.kv_blocks)
    kv[b].refs = 1
    return b


@njit
def take_anonymous(w, r, number):
    """Hand out blocks to the decode batch, whoever in it needs them."""
    rep = w.rep[r]
    for _ in range(number):
        b = take_block(w, r)
        w.kv[r, b].next = rep.anonymous_head
        rep.anonymous_head = b


@njit
def match_prefix(w, r, q, tokens):
    """Find the longest cached prefix of a request and write it into its block table; nothing is taken yet.

    Returns:
        (number of blocks found, how many of them nobody uses now).
    """
    rep = w.rep[r]
    request = w.req[q]
    kv = w.kv[r]
    size = w.pool[rep.pool].kv_blocks
    limit = (tokens - 1) // BLOCK
    if request.num_preemptions + request.num_evictions == 0:  # it has left nothing of its own behind
        limit = min(limit, np.int64(w.prompt[q].num_shared))
    start = w.prompt[q].table_start
    num_idle = 0
    for j in range(limit):
        b = find(kv, block_key(w, q, j), size)
        if b < 0:
            return j, num_idle
        w.table[start + j] = b
        if kv[b].refs == 0:
            num_idle += 1
    return limit, num_idle


@njit
def reuse_prefix(w, r, q, num_blocks):
    """Take the blocks that `match_prefix` has found."""
    start = w.prompt[q].table_start
    kv = w.kv[r]
    for j in range(num_blocks):
        b = w.table[start + j]
        if kv[b].refs == 0:
            queue_remove(w, r, b)
            w.rep[r].kv_used += 1
        kv[b].refs += 1


@njit
def extend_table(w, r, q, done, chunk):
    """Give a prompt chunk its blocks and cache those that it fills; the caller counts them."""
    start = w.prompt[q].table_start
    held = blocks_of(done + chunk)
    for j in range(blocks_of(done), held):
        w.table[start + j] = take_block(w, r)
    w.req[q].table_blocks = held
    # Own content is cached when the request is unloaded: nobody can ask for it before.
    for j in range(done // BLOCK, min((done + chunk) // BLOCK, np.int64(w.prompt[q].num_shared))):
        remember(w.kv[r], w.table[start + j], block_key(w, q, j), w.pool[w.rep[r].pool].kv_blocks)


@njit
def release_blocks(w, r, q, tokens, ended):
    """Free a request's blocks, last first.

    Args:
        w: the fleet.
        r: its replica.
        q: the request.
        tokens: what it has in the KV cache.
        ended: whether it will never come back, so that its own content need not be found.
    """
    rep = w.rep[r]
    kv = w.kv[r]
    held = w.req[q].table_blocks
    start = w.prompt[q].table_start
    size = w.pool[rep.pool].kv_blocks
    full = tokens // BLOCK
    for j in range(blocks_of(tokens) - 1, -1, -1):
        if j >= held:
            b = rep.anonymous_head
            rep.anonymous_head = kv[b].next
        else:
            b = np.int32(w.table[start + j])
        kv[b].refs -= 1
        if kv[b].refs > 0:
            continue
        rep.kv_used -= 1
        if j >= full:
            kv[b].next = rep.blank_head
            rep.blank_head = b
            continue
        if kv[b].key == NO_KEY and not ended:
            remember(kv, b, block_key(w, q, j), size)
        queue_append(w, r, b)
    w.req[q].table_blocks = 0


@hot
def free_blocks(w, r, q, tokens, ended):
    """A request leaves the engine's batch; see `release_blocks`."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    if ended:
        pool.released_tokens += tokens
        pool.released_blocks += reserved_blocks(w, r, q) if pool.contiguous else blocks_of(tokens)
    if pool.prefix_caching:
        release_blocks(w, r, q, tokens, ended)
    else:
        rep.kv_used -= blocks_of(tokens)
