"""Kernel, SLOs-Serve's scheduler in its later, greedy form: admission by deadline, batches as long as the SLOs allow.

Reference: Chen et al., arXiv 2504.08784, and gulang2019/SLOServe; twin: sim/reference/schedulers/slos_serve.py.

- A request that comes is *standard* if its prompt can be computed by its TTFT deadline, in the order of deadlines, and
  no standard one that now can is made late by it: prompts share what an iteration of the tightest TPOT has room for
  beside all decodes. Otherwise it is *best effort*: served in the order of arrival, with what is left.
- An iteration may last until the first next token of a standard sequence is due (its mean TPOT so far banks slack);
  within that time prompts get as many tokens as they can. A best-effort prompt enters only whole.
- Best-effort sequences are evicted, the newest first, when a standard one needs their KV blocks; they recompute. A
  standard request that misses a deadline becomes best effort.

Admission is the authors' greedy test by deadline; the paper's dynamic programme, its speculation and its routing of
declined requests to other replicas are left out. Iteration times are those of the latency profile.
"""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import hot, njit, shared_njit
from rl_autoscale.sim.batch import precedes, waiting_insert, waiting_remove
from rl_autoscale.sim.kv_cache import blocks_of
from rl_autoscale.sim.layout import FloatArray
from rl_autoscale.sim.replica import iteration_blocks
from rl_autoscale.sim.schedulers.steps import admit_head, continue_prompt, decode_leap, preempt, prompt_goes_on

UNDECIDED, STANDARD, BEST_EFFORT = -1, 0, 1
"""Ranks in the waiting queue, where standard requests are sorted by deadline and the others by arrival."""


@shared_njit
def largest_chunk(
    limit_s: float, most: int, done: int, tokens: int, pairs: float, context: int, num_chunks: int, num_decode: int,
    decode_context: int, table_s: FloatArray, slopes: FloatArray,
) -> int:  # fmt: skip
    """Prompt tokens that can join an iteration without making it longer than allowed.

    Args:
        limit_s: how long it may last.
        most: tokens that are left of the prompt and of the token budget.
        done: tokens of the prompt that are computed.
        tokens: of the chunks that are in the iteration already; likewise their ``pairs`` and ``context``.
        pairs: (query, key) pairs.
        context: tokens computed before.
        num_chunks: their number.
        num_decode: decode sequences.
        decode_context: KV tokens that those read.
        table_s: seconds by new tokens, as in World.token_time.
        slopes: as in World.coefficients.
    """
    fixed_s = (slopes[1] + slopes[6]) * num_decode + (slopes[0] + slopes[5]) * decode_context
    fixed_s += slopes[3] * (context + done) + slopes[4] * (num_chunks + 1) + slopes[2] * pairs
    fits = 0
    too_many = most + 1
    while fits + 1 < too_many:
        middle = (fits + too_many) >> 1
        if table_s[num_decode + tokens + middle] + fixed_s + slopes[2] * (middle * (done + 0.5 * middle)) <= limit_s:
            fits = middle
        else:
            too_many = middle
    return fits


@hot
def next_token_due_s(w, r, q):
    """When a decode sequence's next token is due for its mean TPOT to hold."""
    request = w.req[q]
    left = request.finish_iteration - w.rep[r].iteration
    return request.first_token_s + w.cls[request.class_index].tpot_slo_s * (request.output_tokens - left)


@njit
def rank_by_slo(w, r, q):
    """A request that comes is undecided; its deadline is that of its first token, or of its next one."""
    request = w.req[q]
    cls = w.cls[request.class_index]
    request.rank = UNDECIDED
    request.rank_s = request.arrival_s + cls.ttft_slo_s
    if request.first_token_s >= 0.0:
        request.rank_s = request.first_token_s + cls.tpot_slo_s * request.generated_tokens


@njit
def give_up(w, q):
    """A request is best effort from now on."""
    w.req[q].rank = BEST_EFFORT
    w.req[q].rank_s = w.req[q].arrival_s


@njit
def give_up_late(w, r, now_s):
    """Standard requests that have missed a deadline are so no longer."""
    rep = w.rep[r]
    q = rep.batch_head
    while q >= 0:
        if w.req[q].rank == STANDARD and w.req[q].finish_iteration > 0 and next_token_due_s(w, r, q) < now_s:
            give_up(w, q)
        q = w.req[q].next
    q = rep.wait_head
    while q >= 0 and w.req[q].rank <= STANDARD:
        after = w.req[q].next
        if w.req[q].rank == STANDARD and w.req[q].rank_s < now_s:
            waiting_remove(w, r, q)
            give_up(w, q)
            waiting_insert(w, r, q, False)
        q = after


@hot
def tokens_left(w, q):
    """Tokens of a request that are to be computed before it decodes."""
    request = w.req[q]
    return request.prompt_tokens + request.generated_tokens - request.computed_tokens


@njit
def can_promise(w, r, new, now_s):
    """Whether a request meets its deadline, and makes no standard one late that would meet its own."""
    rep = w.rep[r]
    p = rep.pool
    period_s = w.cls[w.req[new].class_index].tpot_slo_s
    num_decode = rep.num_decode + 1
    context = rep.decode_units + tokens_left(w, new)
    q = rep.batch_head
    while q >= 0:
        if w.req[q].rank == STANDARD:
            period_s = min(period_s, w.cls[w.req[q].class_index].tpot_slo_s)
        q = w.req[q].next
    ahead = 0
    if rep.partial >= 0:
        ahead += tokens_left(w, rep.partial)
        num_decode += 1
        context += w.req[rep.partial].prompt_tokens + w.req[rep.partial].generated_tokens
    q = rep.wait_head
    while q >= 0 and w.req[q].rank <= STANDARD:
        if w.req[q].rank == STANDARD:
            period_s = min(period_s, w.cls[w.req[q].class_index].tpot_slo_s)
            num_decode += 1
            context += tokens_left(w, q)
        q = w.req[q].next
    most = w.pool[p].token_budget - num_decode
    room = 0
    if most > 0:
        room = largest_chunk(
            period_s, most, 0, 0, 0.0, 0, 0, num_decode, context + num_decode, w.token_time[p], w.coefficients[p]
        )
    own = tokens_left(w, new)
    placed = False
    q = rep.wait_head
    while q >= 0 and w.req[q].rank <= STANDARD:
        if w.req[q].rank == STANDARD:
            if not placed and w.req[new].rank_s < w.req[q].rank_s:
                placed = True
                if (ahead + own) * period_s > room * (w.req[new].rank_s - now_s):
                    return False
            ahead += tokens_left(w, q)
            time_s = room * (w.req[q].rank_s - now_s)
            if placed and ahead * period_s <= time_s < (ahead + own) * period_s:
                return False
        q = w.req[q].next
    return placed or (ahead + own) * period_s <= room * (w.req[new].rank_s - now_s)


@njit
def decide(w, r, now_s):
    """Promise the SLOs of requests that have come, or decline to; the first deadline first."""
    rep = w.rep[r]
    while rep.wait_head >= 0 and w.req[rep.wait_head].rank == UNDECIDED:
        q = rep.wait_head
        waiting_remove(w, r, q)
        if can_promise(w, r, q, now_s):
            w.req[q].rank = STANDARD
        else:
            give_up(w, q)
        waiting_insert(w, r, q, False)


@njit
def time_left_s(w, r, now_s):
    """How long the next iteration may last."""
    left_s = math.inf
    q = w.rep[r].batch_head
    while q >= 0:
        if w.req[q].rank == STANDARD and w.req[q].finish_iteration > 0:
            left_s = min(left_s, next_token_due_s(w, r, q) - now_s)
        q = w.req[q].next
    return left_s


@njit
def chunk_within(w, r, q, limit_s):
    """Tokens that a prompt gets in the next iteration."""
    rep = w.rep[r]
    p = rep.pool
    most = min(tokens_left(w, q), w.pool[p].token_budget - rep.num_decode - rep.chunk_tokens)
    if most <= 0:
        return 0
    return largest_chunk(
        limit_s, most, w.req[q].computed_tokens, rep.chunk_tokens, rep.chunk_pairs, rep.chunk_context, rep.num_prefill,
        rep.num_decode, rep.decode_units + rep.num_decode, w.token_time[p], w.coefficients[p],
    )  # fmt: skip


@njit
def last_in_order(w, r, decodes_only):
    """The sequence of the batch that is served last, or -1."""
    last = -1
    q = w.rep[r].batch_head
    while q >= 0:
        if (w.req[q].finish_iteration > 0 or not decodes_only) and (last < 0 or precedes(w, last, q)):
            last = q
        q = w.req[q].next
    return last


@njit
def go_on(w, r, limit_s):
    """The prompt under way gets its chunk, at least one token; preempts until that and the decodes fit the KV cache."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    preempted = False
    while True:
        need = iteration_blocks(w, r)
        chunk = 0
        if rep.partial >= 0:
            done = w.req[rep.partial].computed_tokens
            chunk = max(chunk_within(w, r, rep.partial, limit_s), 1)
            need += blocks_of(done + chunk) - blocks_of(done)
        if need <= pool.kv_blocks - rep.kv_used or rep.batch_tail < 0:
            break
        preempt(w, r, last_in_order(w, r, False))
        preempted = True
    if rep.partial >= 0:
        continue_prompt(w, r, chunk)
    return preempted


@njit
def fits_after_evictions(w, r, q):
    """Whether a prompt fits the free blocks; a standard one may evict best-effort sequences."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    while blocks_of(tokens_left(w, q)) > pool.kv_blocks - rep.kv_used - iteration_blocks(w, r):
        last = last_in_order(w, r, True)
        if w.req[q].rank == BEST_EFFORT or last < 0 or w.req[last].rank == STANDARD:
            return False
        preempt(w, r, last)
    return True


@njit
def schedule_slos_serve(w, r, now_s):
    """Decide the replica's next iterations; see the package."""
    rep = w.rep[r]
    give_up_late(w, r, now_s)
    decide(w, r, now_s)
    limit_s = time_left_s(w, r, now_s)
    preempted = go_on(w, r, limit_s)
    out_of_time = False
    while not preempted and rep.wait_head >= 0 and not prompt_goes_on(w, r):
        q = rep.wait_head
        if rep.num_decode + rep.num_prefill >= w.pool[rep.pool].batch_limit or not fits_after_evictions(w, r, q):
            break
        chunk = chunk_within(w, r, q, limit_s)
        if chunk == 0 or (w.req[q].rank == BEST_EFFORT and chunk < tokens_left(w, q) and limit_s < math.inf):
            out_of_time = True
            break
        admit_head(w, r, now_s, tokens_left(w, q), 0, chunk)
    if rep.num_decode + rep.num_prefill == 0:
        return 0
    if rep.num_prefill > 0 or preempted or out_of_time:
        return 1
    if rep.wait_head >= 0 and w.req[rep.wait_head].rank == STANDARD:  # until its deadline, or another's, has passed
        return 1
    return decode_leap(w, r)
