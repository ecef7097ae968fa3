"""Kernel, FastServe's skip-join multi-level feedback queue: preemption by time served, KV caches swapped to the host.

Reference: Wu et al., arXiv 2305.05920, and LLMServe/FastServe, fastserve/scheduler.py; twin:
sim/reference/schedulers/fastserve.py.

- Level p lasts 10 ms x 2**p. A request joins the first level that lasts as long as its prompt should take (skip-join);
  nobody knows how long its output will be. Who was served longer than the level lasts goes to the back of the next.
- An iteration takes the requests in the order of their levels, and within one of when they came there, while batch
  limit, token budget and KV cache last. Prompts are computed whole (one beyond the token budget in pieces, and is not
  preempted between them).
- A preempted sequence keeps its KV cache on the GPU until another needs the blocks; then the last in the order goes to
  host memory. Moving a block takes ``block_move_s``, beside the computation, so an iteration lasts at least as long as
  the moves before it. Host memory does not run out.
- Whoever has not been served for 3 s goes to level 0; one looks every second.
"""

from __future__ import annotations

import math

from rl_autoscale.fleet.admission import prefill_time_s
from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.batch import batch_append, batch_remove, precedes, waiting_insert, waiting_remove
from rl_autoscale.sim.kv_cache import blocks_of, free_blocks
from rl_autoscale.sim.layout import NONE
from rl_autoscale.sim.replica import (
    constant_s,
    count_moves,
    iteration_blocks,
    iterations_begun,
    join_decode,
    leap_duration_s,
    stop_decode,
)
from rl_autoscale.sim.schedulers.steps import admit_head, continue_prompt, decode_leap, prompt_goes_on

QUANTUM_S = 0.01
TOP_LEVEL = 30
STARVED_S = 3.0
LOOK_EVERY_S = 1.0


@hot
def quantum_s(level):
    """How long a level lasts."""
    return QUANTUM_S * (1 << level)


@njit
def skip_join(w, r, q, now_s):
    """Rank a request that comes: the first level that lasts as long as its prompt should take."""
    p = w.rep[r].pool
    request = w.req[q]
    tokens = request.prompt_tokens + request.generated_tokens
    prompt_s = prefill_time_s(tokens, tokens * tokens, 0, 0, w.pool[p].token_budget, w.token_time[p], w.coefficients[p])
    level = 0
    while level < TOP_LEVEL and quantum_s(level) < prompt_s:
        level += 1
    request.rank = level
    request.rank_s = now_s
    request.level_s = 0.0
    request.idle_since_s = now_s


@njit
def demote(w, r, now_s):
    """Those who ran since the last call were served that long; who is through with its level descends."""
    rep = w.rep[r]
    served_s = now_s - rep.planned_s
    q = rep.batch_head
    while q >= 0:
        request = w.req[q]
        request.level_s += served_s
        if request.level_s > quantum_s(request.rank) and request.rank < TOP_LEVEL:
            request.rank += 1
            request.rank_s = now_s
            request.level_s = 0.0
        q = request.next
    rep.planned_s = now_s


@njit
def promote_starved(w, r, now_s):
    """Whoever has waited too long since it was last served goes to level 0."""
    rep = w.rep[r]
    if rep.wait_head < 0 or now_s < rep.next_look_s:
        return
    rep.next_look_s = now_s + LOOK_EVERY_S
    q = rep.wait_head
    while q >= 0:
        request = w.req[q]
        after = request.next
        if request.rank > 0 and now_s - request.idle_since_s >= STARVED_S:
            waiting_remove(w, r, q)
            request.rank = 0
            request.rank_s = now_s
            request.level_s = 0.0
            waiting_insert(w, r, q, False)
        q = after


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
def takes_part(w, r, budget):
    """Let the head of the waiting queue run if it can; returns the tokens that it takes, 0 if it cannot."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    q = rep.wait_head
    request = w.req[q]
    total = request.prompt_tokens + request.generated_tokens
    held = request.computed_tokens
    left = total - held
    if held == 0 and prompt_goes_on(w, r):
        return 0
    if rep.num_decode + rep.num_prefill >= pool.batch_limit or budget <= 0 or budget < left <= pool.token_budget:
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
    batch_prepend(w, r, q)
    join_decode(w, r, q)
    return 1


@njit
def batch_prepend(w, r, q):
    """Put a decode sequence at the head of the batch: prompts must be its tail."""
    rep = w.rep[r]
    if rep.batch_head < 0:
        batch_append(w, r, q)
        return
    request = w.req[q]
    request.in_batch = 1
    request.prev = NONE
    request.next = rep.batch_head
    w.req[rep.batch_head].prev = q
    rep.batch_head = q


@njit
def stays_true(w, r, now_s):
    """Iterations until a level ends or one looks for the starved, at most until the batch changes by itself."""
    rep = w.rep[r]
    rep.leap_iteration_s = w.fleet[0].speed * constant_s(w, r)
    left_s = math.inf
    q = rep.batch_head
    while q >= 0:
        if w.req[q].rank < TOP_LEVEL:
            left_s = min(left_s, quantum_s(w.req[q].rank) - w.req[q].level_s)
        q = w.req[q].next
    most = decode_leap(w, r)
    if left_s < leap_duration_s(w, r, most):
        most = min(most, iterations_begun(w, r, max(left_s, 0.0)))
    if rep.wait_head >= 0:
        left_s = max(rep.next_look_s - now_s, 0.0)
        if left_s < leap_duration_s(w, r, most):
            look = iterations_begun(w, r, left_s)
            if look > 1 and leap_duration_s(w, r, look - 1) >= left_s:
                look -= 1
            most = min(most, look)
    return most


@njit
def schedule_fastserve(w, r, now_s):
    """Decide the replica's next iterations; see the package."""
    rep = w.rep[r]
    demote(w, r, now_s)
    promote_starved(w, r, now_s)
    chunk = keep_running(w, r, now_s)
    budget = w.pool[rep.pool].token_budget - rep.num_decode
    if rep.partial >= 0:
        continue_prompt(w, r, chunk)
        budget -= chunk
    while rep.wait_head >= 0:
        tokens = takes_part(w, r, budget)
        if tokens > 0:
            budget -= bring_in(w, r, now_s, tokens, budget)
            continue
        worst = worst_decode(w, r)
        if worst < 0 or not precedes(w, rep.wait_head, worst):
            break
        park(w, r, worst, now_s)
        budget += 1
    if rep.num_decode + rep.num_prefill == 0:
        return 0
    if rep.num_prefill > 0 or rep.moved_blocks > 0:
        return 1
    return stays_true(w, r, now_s)
