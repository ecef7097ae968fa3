"""Kernel, SLOs-Serve's scheduler: admission by a dynamic programme, batches as long as the SLOs allow.

Reference: Chen et al., arXiv 2504.08784, and gulang2019/SLOServe; twin: sim/reference/schedulers/slos_serve.py.

- When requests come, the largest set of those that wait is chosen of which all meet their TTFT deadlines
  (slos_plan.py). They are *standard* and computed in the order of deadlines. Others are *best effort*: served in the
  order of arrival, with what is left.
- An iteration may last until the first next token of a standard sequence is due (its mean TPOT so far banks slack);
  within that time prompts get as many tokens as they can. A best-effort prompt enters only whole.
- With `speculation` each iteration verifies as many drafts as have the prompt at hand computed the soonest at the pace
  of the tightest TPOT; without prompts, as bring the most tokens per second. All sequences have the same number (more
  in slos_plan.py).
- Best-effort sequences are evicted, the newest first, when a standard one needs their KV blocks; they recompute. A
  standard request that misses a deadline becomes best effort.

Each part can be left out (SlosServeSpec); the greedy admission is that of the authors' later code: one after the
other, as they come. Iteration times are those of the latency profile.
"""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.batch import precedes
from rl_autoscale.sim.drafts import verify_drafts
from rl_autoscale.sim.kv_cache import blocks_of
from rl_autoscale.sim.layout import ADMIT_ALL, NONE
from rl_autoscale.sim.replica import iteration_blocks
from rl_autoscale.sim.schedulers.slos_admission import (
    BEST_EFFORT,
    STANDARD,
    costs_of,
    decide,
    decode_context,
    give_up_late,
    token_due_s,
    tokens_left,
    tokens_so_far,
)
from rl_autoscale.sim.schedulers.slos_plan import (
    drafting_s,
    largest_chunk,
    most_output,
    prompt_s,
)
from rl_autoscale.sim.schedulers.steps import admit_head, continue_prompt, decode_leap, preempt, prompt_goes_on


@njit
def time_left_s(w, r, now_s):
    """How long the next iteration may last."""
    left_s = math.inf
    q = w.rep[r].batch_head
    while q >= 0:
        if w.req[q].rank == STANDARD and w.req[q].finish_iteration > 0:
            left_s = min(left_s, token_due_s(w, q, math.floor(tokens_so_far(w, r, q))) - now_s)
        q = w.req[q].next
    return left_s


@hot
def prompt_at_hand(w, r):
    """The prompt that the next iteration could compute, or NONE."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    if rep.partial >= 0 or rep.wait_head < 0:
        return rep.partial
    fits = blocks_of(tokens_left(w, rep.wait_head)) <= pool.kv_blocks - rep.kv_used
    return rep.wait_head if fits and rep.num_decode < pool.batch_limit else NONE


@njit
def pace_s(w, r):
    """The tightest TPOT of the standard sequences that decode; inf where nobody minds."""
    tightest_s = math.inf
    q = w.rep[r].batch_head
    while q >= 0 and w.pool[w.rep[r].pool].slack_batches:
        if w.req[q].rank == STANDARD and w.req[q].finish_iteration > 0:
            tightest_s = min(tightest_s, w.cls[w.req[q].class_index].tpot_slo_s)
        q = w.req[q].next
    return tightest_s


@njit
def choose_drafts(w, r, limit_s):
    """Choose how many drafts of each decode sequence the next iteration verifies, which may last so long."""
    rep = w.rep[r]
    costs = costs_of(w, r)
    context = decode_context(w, r, 0)
    drafts, time_s = 0, math.inf
    q = prompt_at_hand(w, r)
    if q >= 0:
        drafts, _, time_s = prompt_s(tokens_left(w, q), limit_s, pace_s(w, r), rep.num_decode, context, costs)
    if time_s == math.inf:
        drafts = most_output(rep.num_decode, context, costs)
    verify_drafts(w, r, drafts, costs.kept_tokens[drafts], drafting_s(drafts, rep.num_decode, costs))


@njit
def same_drafts(w, r, iterations):
    """For how many of the next iterations without prompts, at most, as many drafts are chosen as for the first."""
    rep = w.rep[r]
    costs = costs_of(w, r)
    same, too_many, middle = 1, iterations + 1, iterations
    while same + 1 < too_many:
        if most_output(rep.num_decode, decode_context(w, r, middle - 1), costs) == rep.verified_tokens - 1:
            same = middle
        else:
            too_many = middle
        middle = (same + too_many) >> 1
    return same


@njit
def chunk_within(w, r, q, limit_s):
    """Tokens that a prompt gets in the next iteration."""
    rep = w.rep[r]
    p = rep.pool
    verified = rep.num_decode * rep.verified_tokens
    most = min(tokens_left(w, q), w.pool[p].token_budget - verified - rep.chunk_tokens)
    if most <= 0:
        return 0
    tokens = rep.chunk_tokens + verified - rep.num_decode
    if rep.num_decode > 0:
        limit_s -= rep.draft_s
    return largest_chunk(
        limit_s, most, w.req[q].computed_tokens, tokens, rep.chunk_pairs, rep.chunk_context, rep.num_prefill,
        rep.num_decode, decode_context(w, r, 0) + verified, w.token_time[p], w.coefficients[p],
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
    pool = w.pool[rep.pool]
    if pool.slos_admission != ADMIT_ALL:
        give_up_late(w, r, now_s)
    decide(w, r, now_s)
    limit_s = time_left_s(w, r, now_s) if pool.slack_batches else math.inf
    chooses = pool.token_shift > 0 and rep.num_decode > 0
    if chooses:
        choose_drafts(w, r, limit_s)
    preempted = go_on(w, r, limit_s)
    out_of_time = False
    while not preempted and rep.wait_head >= 0 and not prompt_goes_on(w, r):
        q = rep.wait_head
        if rep.num_decode + rep.num_prefill >= pool.batch_limit or not fits_after_evictions(w, r, q):
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
    if chooses and prompt_at_hand(w, r) >= 0:
        return 1
    iterations = decode_leap(w, r)
    return same_drafts(w, r, iterations) if chooses else iterations
