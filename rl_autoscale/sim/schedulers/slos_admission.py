"""Kernel, SLOs-Serve's admission: which waiting requests are promised their SLOs, and which are best effort.

The semantics, the source and the twin: `slos_serve.py`, which composes iterations of what is decided here.
"""

from __future__ import annotations

import math

import numpy as np

from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.batch import waiting_insert, waiting_remove
from rl_autoscale.sim.layout import ADMIT_DP, ADMIT_FIRM, ADMIT_GREEDY, BLOCK, NONE, READY
from rl_autoscale.sim.schedulers.slos_plan import (
    MOST_CANDIDATES,
    Costs,
    PlanLabels,
    choose_prompts,
    most_room,
)

UNDECIDED, STANDARD, BEST_EFFORT = -1, 0, 1
"""Ranks in the waiting queue, where standard requests are sorted by deadline and the others by arrival."""


@hot
def tokens_so_far(w, r, q):
    """Output tokens of a decode sequence, and what drafts have earned of the next one."""
    left = w.req[q].finish_iteration - w.rep[r].iteration
    return w.req[q].output_tokens - left * w.pool[w.rep[r].pool].unit_tokens


@hot
def token_due_s(w, q, tokens):
    """When the token after so many is due for the mean TPOT to hold."""
    request = w.req[q]
    return request.first_token_s + w.cls[request.class_index].tpot_slo_s * tokens


@hot
def decode_context(w, r, iterations):
    """KV tokens of the decode sequences after so many more iterations, what drafts have earned of others included."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    units = rep.decode_units + rep.num_decode * iterations * rep.step_units
    return (units + (1 << pool.token_shift) - 1) >> pool.token_shift


@hot
def costs_of(w, r):
    """What the replica's iterations take and bring, by its profile."""
    p = w.rep[r].pool
    pool = w.pool[p]
    return Costs(
        np.int64(pool.token_budget), w.token_time[p], w.coefficients[p], w.kept_tokens[p, : pool.verified_tokens],
        np.int64(pool.fewest_drafts), pool.draft_s,
    )  # fmt: skip


@hot
def deadline_s(w, q):
    """When the first token of a sequence that does not decode is due, or its next one."""
    request = w.req[q]
    cls = w.cls[request.class_index]
    if request.first_token_s >= 0.0:
        return request.first_token_s + cls.tpot_slo_s * request.generated_tokens
    return request.arrival_s + cls.ttft_slo_s


@njit
def rank_by_slo(w, r, q):
    """A request that comes is undecided."""
    w.req[q].rank = UNDECIDED
    w.req[q].rank_s = deadline_s(w, q)


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
        standard = w.req[q].rank == STANDARD and w.req[q].finish_iteration > 0
        if standard and token_due_s(w, q, tokens_so_far(w, r, q)) < now_s:
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
    period_s = w.cls[w.req[new].class_index].tpot_slo_s
    num_decode = rep.num_decode + 1
    context = decode_context(w, r, 0) + tokens_left(w, new)
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
    costs = costs_of(w, r)
    drafts, room = most_room(period_s, num_decode, context, costs)
    period_s *= costs.kept_tokens[drafts]
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


@hot
def place_prompt(w, q, position, deadline_s, kept):
    """Put a request into the programme's prompts, behind those with an earlier deadline and the first ``position``.

    Returns:
        Whether there was room.
    """
    prompts = w.plan_prompt
    place = w.fleet[0].num_planned
    if place == prompts.shape[0]:
        return False
    while place > position:
        before = prompts[place - 1]
        if before.deadline_s < deadline_s or (before.deadline_s == deadline_s and before.request < q):
            break
        after = prompts[place]
        after.request = before.request
        after.tier = before.tier
        after.kept = before.kept
        after.deadline_s = before.deadline_s
        after.left_tokens = before.left_tokens
        after.done_tokens = before.done_tokens
        place -= 1
    prompt = prompts[place]
    prompt.request = q
    prompt.tier = w.cls[w.req[q].class_index].tier
    prompt.kept = kept
    prompt.deadline_s = deadline_s
    prompt.left_tokens = tokens_left(w, q)
    prompt.done_tokens = w.req[q].computed_tokens
    w.fleet[0].num_planned += 1
    return True


@njit
def gather_prompts(w, r, now_s):
    """What the programme chooses from: the prompt under way, then by deadline who waits and can still be in time."""
    rep = w.rep[r]
    firm = w.pool[rep.pool].slos_admission == ADMIT_FIRM
    w.fleet[0].num_planned = 0
    begun = 0
    if rep.partial >= 0:
        promised = w.req[rep.partial].rank == STANDARD
        place_prompt(w, rep.partial, 0, w.req[rep.partial].rank_s if promised else math.inf, 1)
        begun = 1
    num_candidates = 0
    q = rep.wait_head
    while q >= 0:
        rank = w.req[q].rank
        due_s = deadline_s(w, q) if rank == BEST_EFFORT else w.req[q].rank_s
        kept = rank == STANDARD and (firm or num_candidates == MOST_CANDIDATES)
        if not kept and (num_candidates == MOST_CANDIDATES or (rank == BEST_EFFORT and (firm or due_s < now_s))):
            q = w.req[q].next
            continue
        if place_prompt(w, q, begun, due_s, kept) and not kept:
            num_candidates += 1
        q = w.req[q].next


@njit
def accept(w, r, now_s):
    """Run the programme; returns the set of candidates that it accepts."""
    rep = w.rep[r]
    p = rep.pool
    tier = w.periods_s.shape[0] - 1
    most_context = w.pool[p].kv_blocks * BLOCK
    q = rep.batch_head
    while q >= 0:
        request = w.req[q]
        if request.finish_iteration > 0:
            if request.rank == STANDARD:
                tier = min(tier, w.cls[request.class_index].tier)
            else:  # evicted if need be
                most_context += request.prompt_tokens + math.floor(tokens_so_far(w, r, q)) - 1
        q = request.next
    return choose_prompts(
        w.plan_prompt, w.fleet[0].num_planned, now_s, rep.num_decode, decode_context(w, r, 0), tier, most_context,
        w.periods_s, costs_of(w, r), PlanLabels(w.plan_count, w.plan_time, w.plan_context, w.plan_chosen),
    )  # fmt: skip


@hot
def may_forward(w, r, q):
    """Whether another replica may be offered a request that this one declines."""
    pool = w.pool[w.rep[r].pool]
    if w.rep[r].state != READY or w.req[q].scheduled_s >= 0.0:  # what was computed of it is here
        return False
    return w.req[q].num_declined < min(pool.tries, pool.ready)


@njit
def set_tier(w, r, q, standard):
    """A waiting request is standard from now on; or it is declined, and is best effort or leaves."""
    rep = w.rep[r]
    request = w.req[q]
    if request.rank == (STANDARD if standard else BEST_EFFORT):
        return
    waiting_remove(w, r, q)
    if standard:
        request.rank = STANDARD
        request.rank_s = deadline_s(w, q)
        waiting_insert(w, r, q, False)
        return
    request.num_declined += 1
    if may_forward(w, r, q):
        request.next = NONE
        if rep.declined_head < 0:
            rep.declined_head = q
        else:
            w.req[rep.declined_tail].next = q
        rep.declined_tail = q
    else:
        give_up(w, q)
        waiting_insert(w, r, q, False)


@njit
def decide_together(w, r, now_s):
    """Choose whom of those that wait to promise their SLOs."""
    gather_prompts(w, r, now_s)
    accepted = accept(w, r, now_s)
    candidate = 0
    for position in range(w.fleet[0].num_planned):
        prompt = w.plan_prompt[position]
        if not prompt.kept:
            set_tier(w, r, prompt.request, (accepted >> candidate) & 1)
            candidate += 1
    rep = w.rep[r]
    while rep.wait_head >= 0 and w.req[rep.wait_head].rank == UNDECIDED:  # more than the programme can choose from
        set_tier(w, r, rep.wait_head, 0)


@njit
def decide(w, r, now_s):
    """Promise the SLOs of requests that have come, or decline to."""
    rep = w.rep[r]
    admission = w.pool[rep.pool].slos_admission
    if rep.wait_head < 0 or w.req[rep.wait_head].rank != UNDECIDED:
        return
    if admission >= ADMIT_DP:
        decide_together(w, r, now_s)
        return
    while rep.wait_head >= 0 and w.req[rep.wait_head].rank == UNDECIDED:  # the first deadline first
        q = rep.wait_head
        set_tier(w, r, q, admission < ADMIT_GREEDY or can_promise(w, r, q, now_s))
