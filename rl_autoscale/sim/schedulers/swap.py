"""Kernel: the steps of schedulers that set sequences aside and move their KV caches to the host and back.

A preempted decode sequence keeps its KV cache on the GPU until another needs the blocks; then the last of the waiting
queue goes to host memory. Moving a block takes ``block_move_s``, beside the computation, so an iteration lasts at least
as long as the moves before it. Host memory does not run out. Twin: sim/reference/schedulers/swap.py.
"""

from __future__ import annotations

from rl_autoscale.fleet.jit import njit
from rl_autoscale.sim.batch import batch_append, batch_remove, precedes, waiting_insert, waiting_remove
from rl_autoscale.sim.kv_cache import blocks_of, free_blocks
from rl_autoscale.sim.layout import NONE
from rl_autoscale.sim.replica import count_moves, iteration_blocks, join_decode, stop_decode
from rl_autoscale.sim.schedulers.steps import admit_head, prompt_goes_on


@njit
def worst_decode(w, r):
    """The decode sequence of the batch that is served last, or NONE."""
    worst = NONE
    q = w.rep[r].batch_head
    while q >= 0:
        if w.req[q].finish_iteration > 0 and (worst < 0 or precedes(w, worst, q)):
            worst = q
        q = w.req[q].next
    return worst


@njit
def park(w, r, q, now_s):
    """Preempt a decode sequence; its KV cache stays where it is."""
    stop_decode(w, r, q)
    batch_remove(w, r, q)
    w.req[q].idle_since_s = now_s
    waiting_insert(w, r, q, False)
    w.rep[r].num_set_aside += 1


@njit
def swap_out_last(w, r, keep):
    """Move the KV cache of the last parked sequence to the host; returns whether there was one but ``keep``."""
    rep = w.rep[r]
    q = rep.wait_tail if rep.num_set_aside > 0 else NONE
    while q >= 0:
        request = w.req[q]
        if q != keep and request.computed_tokens > 0 and not request.on_host:
            free_blocks(w, r, q, request.computed_tokens, False)
            request.on_host = 1
            rep.num_set_aside -= 1
            count_moves(w, r, blocks_of(request.computed_tokens))
            return True
        q = request.prev
    return False


@njit
def keep_running(w, r, now_s):
    """Make room for the next tokens of those that run: swap out who is parked, then park who runs, the last one first.

    Returns:
        The chunk of the partly computed prompt.
    """
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    while True:
        need = iteration_blocks(w, r)
        chunk = 0
        if rep.partial >= 0:
            request = w.req[rep.partial]
            done = request.computed_tokens
            chunk = min(request.prompt_tokens + request.generated_tokens - done, pool.token_budget - rep.num_decode)
            need += blocks_of(done + chunk) - blocks_of(done)
        if need <= pool.kv_blocks - rep.kv_used:
            return chunk
        if not swap_out_last(w, r, NONE):
            q = worst_decode(w, r)
            if q < 0:
                return chunk
            park(w, r, q, now_s)


@njit
def takes_part(w, r, budget, whole):
    """Whether the head of the waiting queue can run; swaps out who is parked where that helps.

    Args:
        w: the fleet.
        r: its replica.
        budget: tokens left in this iteration.
        whole: whether a prompt must be computed in one piece, unless it is longer than the token budget.

    Returns:
        The tokens that it has to compute, 0 if it cannot run.
    """
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    q = rep.wait_head
    request = w.req[q]
    total = request.prompt_tokens + request.generated_tokens
    held = request.computed_tokens
    left = total - held
    if held == 0 and prompt_goes_on(w, r):
        return 0
    if rep.num_decode + rep.num_prefill >= pool.batch_limit or budget <= 0:
        return 0
    if whole and budget < left <= pool.token_budget:
        return 0
    need = blocks_of(total)
    if held > 0 and not request.on_host:
        need -= blocks_of(held)
    while need > pool.kv_blocks - rep.kv_used - iteration_blocks(w, r):
        if not swap_out_last(w, r, q):
            return 0
    return left


@njit
def bring_in(w, r, now_s, tokens, budget):
    """The head of the waiting queue joins the batch; returns the tokens that it takes."""
    rep = w.rep[r]
    q = rep.wait_head
    request = w.req[q]
    if request.computed_tokens == 0:
        return admit_head(w, r, now_s, tokens, 0, budget)
    waiting_remove(w, r, q)
    if request.on_host:
        rep.kv_used += blocks_of(request.computed_tokens)
        count_moves(w, r, blocks_of(request.computed_tokens))
        request.on_host = 0
    else:
        rep.num_set_aside -= 1
    request.read_from_s = now_s
    batch_append(w, r, q)
    join_decode(w, r, q)
    return 1
