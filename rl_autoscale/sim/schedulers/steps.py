"""Kernel: the steps that schedulers are made of: preempt, go on with a prompt, admit, and see how long it stays so."""

from __future__ import annotations

from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.batch import batch_append, precedes, waiting_insert, waiting_remove
from rl_autoscale.sim.kv_cache import (
    blocks_of,
    extend_table,
    free_blocks,
    match_prefix,
    reserved_blocks,
    reuse_prefix,
    take_anonymous,
)
from rl_autoscale.sim.layout import BLOCK, VLLM_PRIORITY
from rl_autoscale.sim.reading import read_until
from rl_autoscale.sim.replica import count_moves, iteration_blocks, iterations_until_full, join_decode, unload


@njit
def preemption_victim(w, r):
    """The sequence vLLM preempts: the batch's tail, or under priority scheduling the worst (priority, arrival)."""
    rep = w.rep[r]
    if w.pool[rep.pool].scheduler != VLLM_PRIORITY:
        return rep.batch_tail
    worst = rep.batch_head
    q = rep.batch_head
    while q >= 0:
        if precedes(w, worst, q):
            worst = q
        q = w.req[q].next
    return worst


@njit
def preempt(w, r, victim):
    """Send a running sequence back to the front of the waiting queue; it loses its KV and recomputes."""
    unload(w, r, victim)
    waiting_insert(w, r, victim, True)
    w.req[victim].num_preemptions += 1
    w.pool[w.rep[r].pool].preemptions += 1


@njit
def make_room(w, r, whole_prompt):
    """Preempt until the running sequences' next iteration fits the KV cache.

    Args:
        w: the fleet.
        r: its replica.
        whole_prompt: whether all of the partly computed prompt must fit, and not only its next chunk.

    Returns:
        (whether anybody was preempted, chunk of the partly computed prompt, blocks the decode batch will need).
    """
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    preempted = False
    while True:
        decode_need = iteration_blocks(w, r) if rep.num_decode > 0 else 0
        chunk = 0
        chunk_need = 0
        if rep.partial >= 0:
            request = w.req[rep.partial]
            left = request.prompt_tokens + request.generated_tokens - request.computed_tokens
            chunk = min(left, pool.token_budget - rep.num_decode * pool.verified_tokens)
            ahead = left if whole_prompt else chunk
            chunk_need = blocks_of(request.computed_tokens + ahead) - blocks_of(request.computed_tokens)
        if decode_need + chunk_need <= pool.kv_blocks - rep.kv_used or rep.batch_tail < 0:
            return preempted, chunk, decode_need
        preempt(w, r, preemption_victim(w, r))
        preempted = True


@hot
def reserve_decodes(w, r, decode_need):
    """Take the decode batch's blocks before anybody is admitted, who must not find what they overwrite."""
    if w.pool[w.rep[r].pool].prefix_caching:
        take_anonymous(w, r, decode_need)
        w.rep[r].reserved = decode_need


@hot
def give_chunk(w, r, q, done, chunk):
    """A sequence computes so many prompt tokens in the next iteration."""
    rep = w.rep[r]
    w.req[q].chunk_tokens = chunk
    rep.num_prefill += 1
    rep.chunk_tokens += chunk
    rep.chunk_pairs += chunk * (done + 0.5 * chunk)
    rep.chunk_context += done


@hot
def continue_prompt(w, r, chunk):
    """The partly computed prompt takes the blocks of its next chunk."""
    rep = w.rep[r]
    q = rep.partial
    done = w.req[q].computed_tokens
    rep.kv_used += blocks_of(done + chunk) - blocks_of(done)
    if w.pool[rep.pool].prefix_caching:
        extend_table(w, r, q, done, chunk)
    give_chunk(w, r, q, done, chunk)


@hot
def serve_running(w, r, whole_prompt):
    """What runs goes on: every decode sequence gets its token, the partly computed prompt its chunk.

    Args:
        w: the fleet.
        r: its replica.
        whole_prompt: as for `make_room`.

    Returns:
        (whether anybody was preempted, blocks that the decode batch will need, tokens left of the budget, sequences).
    """
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    preempted = False
    chunk = 0
    decode_need = 0
    if rep.batch_tail >= 0:
        preempted, chunk, decode_need = make_room(w, r, whole_prompt)
    reserve_decodes(w, r, decode_need)
    budget = pool.token_budget - rep.num_decode * pool.verified_tokens
    running = rep.num_decode
    if rep.partial >= 0:
        continue_prompt(w, r, chunk)
        budget -= chunk
        running += 1
    return preempted, decode_need, budget, running


@hot
def head_blocks(w, r):
    """What the head of the waiting queue would need for its whole input.

    Returns:
        (its tokens, cached blocks that it finds, free blocks that it takes).
    """
    rep = w.rep[r]
    q = rep.wait_head
    tokens = w.req[q].prompt_tokens + w.req[q].generated_tokens
    num_hit = 0
    num_idle = 0
    if w.pool[rep.pool].prefix_caching:
        num_hit, num_idle = match_prefix(w, r, q, tokens)
    return tokens, num_hit, blocks_of(tokens) - num_hit + num_idle


@hot
def head_fits(w, r, need, decode_need):
    """Whether the head's whole input fits beside what decodes take, or, where the pool reserves, all it may become."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    if pool.reserves:
        return rep.kv_reserved + reserved_blocks(w, r, rep.wait_head) <= pool.kv_blocks
    return need <= pool.kv_blocks - rep.kv_used - decode_need


@hot
def admit_head(w, r, now_s, tokens, num_hit, budget):
    """Let the head of the waiting queue into the batch, with as much of its input as the token budget allows.

    Returns:
        Its chunk in tokens.
    """
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    q = rep.wait_head
    request = w.req[q]
    waiting_remove(w, r, q)
    batch_append(w, r, q)
    done = num_hit * BLOCK
    chunk = min(tokens - done, budget)
    if pool.prefix_caching:
        if request.num_preemptions == 0:  # as vLLM counts
            pool.prefix_queried_tokens += tokens
            pool.prefix_hit_tokens += done
        reuse_prefix(w, r, q, num_hit)
        extend_table(w, r, q, done, chunk)
    rep.kv_used += blocks_of(done + chunk) - num_hit
    request.computed_tokens = done
    if not request.scheduled_s >= 0.0:
        request.scheduled_s = now_s
    give_chunk(w, r, q, done, chunk)
    if done + chunk < tokens:
        rep.partial = q
    return chunk


@njit
def take_over(w, r, now_s, free, budget):
    """Let the head of the waiting queue decode, whose KV waits in the bridge or on the host: it computes no prompt.

    Args:
        w: the fleet.
        r: its decode replica.
        now_s: the time.
        free: KV blocks.
        budget: tokens left in this iteration.

    Returns:
        KV blocks that the iteration will fill with its tokens; -1 where it does not fit.
    """
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    q = rep.wait_head
    request = w.req[q]
    held = blocks_of(request.computed_tokens)
    needed = blocks_of(request.computed_tokens + (pool.step_units >> pool.token_shift))
    if needed > free or pool.verified_tokens > budget:
        return -1
    waiting_remove(w, r, q)
    batch_append(w, r, q)
    rep.kv_used += held
    if pool.prefix_caching:
        extend_table(w, r, q, 0, request.computed_tokens)
        take_anonymous(w, r, needed - held)
        rep.reserved += needed - held
    if request.on_host:
        request.on_host = 0
        count_moves(w, r, held)
    else:
        request.kv_in_bridge = 0
        w.fleet[0].bridge_used -= 1
    read_until(w, q, request.generated_tokens, request.first_token_s)
    request.read_from_s = now_s
    join_decode(w, r, q)
    return needed - held


@hot
def abandon(w, r, q):
    """A waiting sequence leaves the engine, and what it has in the KV cache is lost."""
    rep = w.rep[r]
    request = w.req[q]
    if request.computed_tokens > 0 and not request.on_host:
        free_blocks(w, r, q, request.computed_tokens, False)
        rep.num_set_aside -= 1
    request.computed_tokens = 0
    request.on_host = 0


@hot
def prompt_goes_on(w, r):
    """Whether a prompt will be computed only in part after this iteration; then no other may begin."""
    q = w.rep[r].partial
    if q < 0:
        return False
    request = w.req[q]
    return request.computed_tokens + request.chunk_tokens < request.prompt_tokens + request.generated_tokens


@hot
def decode_leap(w, r):
    """Iterations for which the decode batch goes on alone: to the first finish, or until the KV cache is full."""
    rep = w.rep[r]
    free = w.pool[rep.pool].kv_blocks - rep.kv_used
    left = (w.heap[r, 0] >> 32) - rep.iteration
    if w.pool[rep.pool].token_shift > 0:
        left = (left + rep.step_units - 1) // rep.step_units
    return iterations_until_full(w, r, free, left)


@hot
def iterations_ahead(w, r, preempted):
    """For how many iterations what was decided stays true; 0 where nothing runs."""
    rep = w.rep[r]
    if rep.num_decode + rep.num_prefill == 0:
        return 0
    if rep.num_prefill > 0 or preempted:
        return 1
    return decode_leap(w, r)
