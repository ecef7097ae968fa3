"""SLOs-Serve's scheduler: admission by a dynamic programme, batches as long as the SLOs allow.

Reference: Chen et al., arXiv 2504.08784, and gulang2019/SLOServe. What it does is told in the kernel of the same name
(sim/schedulers/slos_serve.py); the dynamic programme and all other planning (slos_plan.py) are the one copy of both.
"""

from __future__ import annotations

import math

import numpy as np

from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.sim.reference.request import Request, blocks_for
from rl_autoscale.sim.reference.sequences import Iteration, Sequences
from rl_autoscale.sim.schedulers.slos_admission import BEST_EFFORT, STANDARD, UNDECIDED
from rl_autoscale.sim.schedulers.slos_plan import (
    MOST_CANDIDATES,
    PLAN_PROMPT,
    Costs,
    choose_prompts,
    largest_chunk,
    most_output,
    most_room,
    plan_labels,
    prompt_s,
)


def rank(engine: Sequences, request: Request, now_s: float) -> None:
    """A request that comes is undecided."""
    request.rank, request.rank_s = UNDECIDED, _deadline_s(request)


def schedule(engine: Sequences, now_s: float) -> Iteration | None:
    """Who runs goes on; then the waiting queue, as long as the next token of every standard sequence is in time."""
    options = engine.pool.slos_serve
    if options.admission != "all":
        _give_up_late(engine, now_s)
    if engine.waiting and _is(engine.waiting[0], UNDECIDED):
        (_decide_together if options.admission in ("dp", "firm") else _decide_in_turn)(engine, now_s)
    due = [_next_token_due_s(request) - now_s for request in _standard_decodes(engine)]
    limit_s = min(due, default=math.inf) if options.slack_batches else math.inf
    if engine.pool.speculation is not None and any(request.decoding for request in engine.running):
        engine.num_drafts = _choose_drafts(engine, limit_s)
    scheduled, num_preempted = _go_on(engine, limit_s)
    num_evicted = 0
    while not num_preempted and engine.waiting and not _prompt_goes_on(scheduled):
        head = engine.waiting[0]
        if len(engine.running) >= engine.pool.batch_limit:
            break
        fits, evicted = _fits_after_evictions(engine, scheduled, head)
        num_evicted += evicted
        if not fits:
            break
        chunk = _chunk_within(engine, scheduled, head, limit_s)
        if chunk == 0 or (_is(head, BEST_EFFORT) and chunk < head.num_tokens and limit_s < math.inf):
            break
        engine.running.append(engine.waiting.pop(0))
        scheduled[head] = chunk
        if not head.scheduled_s >= 0.0:
            head.scheduled_s = now_s
    for request, tokens in scheduled.items():
        engine.kv.extend(request, engine.computed_after(request, tokens))
    return engine.iteration(scheduled, num_preempted + num_evicted)


def _is(request: Request, tier: int) -> bool:
    return request.rank == tier


def _deadline_s(request: Request) -> float:
    """When the first token of a request that does not decode is due, or its next one."""
    if request.has_begun:
        return _next_token_due_s(request)
    return request.arrival_s + request.service_class.ttft_slo_s


def _next_token_due_s(request: Request) -> float:
    """When the next token is due for the mean TPOT to hold."""
    return request.first_token_s + request.service_class.tpot_slo_s * request.generated_tokens


def _standard_decodes(engine: Sequences) -> list[Request]:
    return [request for request in engine.running if request.decoding and _is(request, STANDARD)]


def _choose_drafts(engine: Sequences, limit_s: float) -> int:
    """How many drafts of each decode sequence the next iteration verifies, which may last so long."""
    decodes = [request for request in engine.running if request.decoding]
    paces_s = [r.service_class.tpot_slo_s for r in _standard_decodes(engine) if engine.pool.slos_serve.slack_batches]
    pace_s = min(paces_s, default=math.inf)
    prompt = _prompt_at_hand(engine)
    if prompt is not None:
        left = _tokens_left(prompt)
        drafts, _, time_s = prompt_s(left, limit_s, pace_s, len(decodes), _context(decodes), _costs(engine))
        if time_s < math.inf:
            return int(drafts)
    return int(most_output(len(decodes), _context(decodes), _costs(engine)))


def _prompt_at_hand(engine: Sequences) -> Request | None:
    """The prompt that the next iteration could compute."""
    for request in engine.running:
        if not request.decoding:
            return request
    if not engine.waiting or len(engine.running) >= engine.pool.batch_limit:
        return None
    head = engine.waiting[0]
    return head if blocks_for(_tokens_left(head)) <= engine.kv.num_free else None


def _context(decodes: list[Request]) -> int:
    """KV tokens of decode sequences, what drafts have earned of others included."""
    return math.ceil(sum(request.computed_tokens + request.token_fraction for request in decodes))


def give_up(request: Request) -> None:
    """A request is best effort from now on."""
    request.rank, request.rank_s = BEST_EFFORT, request.arrival_s


def _give_up_late(engine: Sequences, now_s: float) -> None:
    """Standard requests that have missed a deadline are so no longer."""
    for request in _standard_decodes(engine):
        earned_s = request.service_class.tpot_slo_s * (request.generated_tokens + request.token_fraction)
        if request.first_token_s + earned_s < now_s:
            give_up(request)
    for request in engine.waiting:
        if _is(request, STANDARD) and request.rank_s < now_s:
            give_up(request)
    engine.waiting.sort(key=lambda waiting: waiting.order)


def _decide_together(engine: Sequences, now_s: float) -> None:
    """Choose whom of those that wait to promise their SLOs."""
    firm = engine.pool.slos_serve.admission == "firm"
    candidates: list[Request] = []
    kept: list[Request] = []
    for request in engine.waiting:
        if _is(request, STANDARD) and (firm or len(candidates) == MOST_CANDIDATES):
            kept.append(request)
        elif len(candidates) < MOST_CANDIDATES and not (
            _is(request, BEST_EFFORT) and (firm or _deadline_s(request) < now_s)
        ):
            candidates.append(request)
    prompts = sorted([*candidates, *kept], key=lambda request: (_promised_s(request), request.index))
    candidates.sort(key=prompts.index)
    accepted = _accepted(engine, [r for r in engine.running if not r.decoding] + prompts, candidates, now_s)
    for k, request in enumerate(candidates):
        _set_tier(engine, request, standard=accepted >> k & 1 == 1)
    while engine.waiting and _is(engine.waiting[0], UNDECIDED):  # more than the programme can choose from
        _set_tier(engine, engine.waiting[0], standard=False)


def _set_tier(engine: Sequences, request: Request, *, standard: bool) -> None:
    """A waiting request is standard from now on; or it is declined, and is best effort or leaves."""
    if _is(request, STANDARD if standard else BEST_EFFORT):
        return
    engine.waiting.remove(request)
    request.num_declined += not standard
    if standard:
        request.rank, request.rank_s = STANDARD, _deadline_s(request)
    elif not request.scheduled_s >= 0.0 and request.num_declined < engine.most_tries:
        engine.declined.append(request)
        return
    else:
        give_up(request)
    engine.enqueue(request)


def _promised_s(request: Request) -> float:
    return _deadline_s(request) if _is(request, BEST_EFFORT) else request.rank_s


def _accepted(engine: Sequences, prompts: list[Request], candidates: list[Request], now_s: float) -> int:
    """Run the dynamic programme; bit k of what it returns is set if candidate k is accepted."""
    tpots_s = {request.service_class.tpot_slo_s for request in [*engine.running, *prompts]}
    periods_s = [*sorted(tpots_s), math.inf]
    rows = np.zeros(len(prompts), dtype=PLAN_PROMPT)
    for row, request in zip(rows, prompts, strict=True):
        row["tier"] = periods_s.index(request.service_class.tpot_slo_s)
        row["kept"] = request not in candidates
        binds = request not in engine.running or _is(request, STANDARD)
        row["deadline_s"] = _promised_s(request) if binds else math.inf
        row["left_tokens"], row["done_tokens"] = _tokens_left(request), request.computed_tokens
    decodes = [request for request in engine.running if request.decoding]
    tiers = [periods_s.index(request.service_class.tpot_slo_s) for request in decodes if _is(request, STANDARD)]
    evictable = sum(request.computed_tokens for request in decodes if _is(request, BEST_EFFORT))
    return int(
        choose_prompts(
            rows, len(rows), now_s, len(decodes), _context(decodes), min(tiers, default=len(periods_s) - 1),
            engine.pool.num_kv_blocks * BLOCK_SIZE_TOKENS + evictable, np.array(periods_s), _costs(engine),
            plan_labels(len(periods_s)),
        )
    )  # fmt: skip


def _decide_in_turn(engine: Sequences, now_s: float) -> None:
    """Promise the SLOs of requests that have come, or decline to; the first deadline first."""
    tests = engine.pool.slos_serve.admission == "greedy"
    while engine.waiting and _is(engine.waiting[0], UNDECIDED):
        request = engine.waiting[0]
        _set_tier(engine, request, standard=not tests or _can_promise(engine, request, now_s))


def _can_promise(engine: Sequences, new: Request, now_s: float) -> bool:
    """Whether a request meets its deadline, and makes no standard one late that would meet its own."""
    decodes = [request for request in engine.running if request.decoding]
    partial = [request for request in engine.running if not request.decoding]
    queue = [request for request in engine.waiting if _is(request, STANDARD)]
    standard = [new, *queue, *(request for request in engine.running if _is(request, STANDARD))]
    period_s = min(request.service_class.tpot_slo_s for request in standard)
    num_decode = len(decodes) + len(partial) + len(queue) + 1
    context = _context(decodes) + sum(request.num_tokens for request in [*partial, *queue, new])
    drafts, room = most_room(period_s, num_decode, context, _costs(engine))
    period_s *= engine.pool.kept_tokens[drafts]
    ahead = sum(_tokens_left(request) for request in partial)
    own = _tokens_left(new)
    before = [request for request in queue if not new.rank_s < request.rank_s]
    ahead += sum(_tokens_left(request) for request in before)
    if (ahead + own) * period_s > room * (new.rank_s - now_s):
        return False
    for request in queue[len(before) :]:
        ahead += _tokens_left(request)
        if ahead * period_s <= room * (request.rank_s - now_s) < (ahead + own) * period_s:
            return False
    return True


def _tokens_left(request: Request) -> int:
    return request.num_tokens - request.computed_tokens


def _go_on(engine: Sequences, limit_s: float) -> tuple[dict[Request, int], int]:
    """Tokens of those that run, the prompt under way one at least; preempts until they fit the KV cache."""
    num_preempted = 0
    while True:
        scheduled = dict.fromkeys((request for request in engine.running if request.decoding), 1)
        for request in engine.running:
            if not request.decoding:
                scheduled[request] = max(_chunk_within(engine, scheduled, request, limit_s), 1)
        if _growth(engine, scheduled) <= engine.kv.num_free or not engine.running:
            return scheduled, num_preempted
        engine.preempt(max(engine.running, key=lambda request: request.order))
        num_preempted += 1


def _growth(engine: Sequences, scheduled: dict[Request, int]) -> int:
    """KV blocks that an iteration takes beyond those in the tables."""
    after = {request: engine.computed_after(request, tokens) for request, tokens in scheduled.items()}
    return sum(blocks_for(tokens) - len(request.block_table) for request, tokens in after.items())


def _prompt_goes_on(scheduled: dict[Request, int]) -> bool:
    """Whether a prompt will be computed only in part after this iteration; then no other may begin."""
    return any(request.computed_tokens + tokens < request.num_tokens for request, tokens in scheduled.items())


def _chunk_within(engine: Sequences, scheduled: dict[Request, int], prompt: Request, limit_s: float) -> int:
    """Tokens that a prompt gets in the next iteration."""
    decodes = [request for request in scheduled if request.decoding]
    chunks = [(tokens, request.computed_tokens) for request, tokens in scheduled.items() if not request.decoding]
    tokens = sum(chunk for chunk, _ in chunks) + len(decodes) * engine.num_drafts
    most = min(_tokens_left(prompt), engine.pool.token_budget - len(decodes) - tokens)
    if most <= 0:
        return 0
    pairs = float(sum(chunk * (done + 0.5 * chunk) for chunk, done in chunks))
    decode_context = _context(decodes) + len(decodes) * (1 + engine.num_drafts)
    costs = _costs(engine)
    return int(
        largest_chunk(
            limit_s - engine.draft_s if decodes else limit_s, most, prompt.computed_tokens, tokens, pairs,
            sum(done for _, done in chunks), len(chunks), len(decodes), decode_context, costs.table_s, costs.slopes,
        )
    )  # fmt: skip


def _costs(engine: Sequences) -> Costs:
    """What iterations take and bring, by the latency profile."""
    pool = engine.pool
    return Costs(
        pool.token_budget, pool.hardware.token_time_table_s(pool.token_budget), pool.hardware.attention_coefficients_s,
        np.array(pool.kept_tokens), pool.fewest_drafts, pool.draft_s,
    )  # fmt: skip


def _fits_after_evictions(engine: Sequences, scheduled: dict[Request, int], head: Request) -> tuple[bool, int]:
    """Whether a prompt fits the free blocks, and how many best-effort sequences a standard one evicts for that."""
    num_evicted = 0
    while blocks_for(_tokens_left(head)) > engine.kv.num_free - _growth(engine, scheduled):
        decodes = [request for request in engine.running if request.decoding]
        last = max(decodes, key=lambda request: request.order, default=None)
        if _is(head, BEST_EFFORT) or last is None or _is(last, STANDARD):
            return False, num_evicted
        engine.preempt(last)
        del scheduled[last]
        num_evicted += 1
    return True, num_evicted
