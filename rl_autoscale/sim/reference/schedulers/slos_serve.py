"""SLOs-Serve's scheduler in its later, greedy form: admission by deadline, batches as long as the SLOs allow.

Reference: Chen et al., arXiv 2504.08784, and gulang2019/SLOServe. What is left out is told in the kernel of the same
name (sim/schedulers/slos_serve.py); `largest_chunk` is the one copy of its arithmetic.
"""

from __future__ import annotations

import math

from rl_autoscale.sim.layout import FloatArray
from rl_autoscale.sim.reference.request import Request, blocks_for
from rl_autoscale.sim.reference.sequences import Iteration, Sequences
from rl_autoscale.sim.schedulers.slos_serve import BEST_EFFORT, STANDARD, UNDECIDED, largest_chunk


def rank(engine: Sequences, request: Request, now_s: float) -> None:
    """A request that comes is undecided; its deadline is that of its first token, or of its next one."""
    request.rank = UNDECIDED
    request.rank_s = request.arrival_s + request.service_class.ttft_slo_s
    if request.has_begun:
        request.rank_s = _next_token_due_s(request)


def schedule(engine: Sequences, now_s: float) -> Iteration | None:
    """Who runs goes on; then the waiting queue, as long as the next token of every standard sequence is in time."""
    _give_up_late(engine, now_s)
    _decide(engine, now_s)
    due = [_next_token_due_s(r) - now_s for r in engine.running if r.decoding and _is(r, STANDARD)]
    limit_s = min(due, default=math.inf)
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


def _next_token_due_s(request: Request) -> float:
    """When the next token is due for the mean TPOT to hold."""
    return request.first_token_s + request.service_class.tpot_slo_s * request.generated_tokens


def _give_up(request: Request) -> None:
    """A request is best effort from now on."""
    request.rank, request.rank_s = BEST_EFFORT, request.arrival_s


def _give_up_late(engine: Sequences, now_s: float) -> None:
    """Standard requests that have missed a deadline are so no longer."""
    for request in engine.running:
        if _is(request, STANDARD) and request.decoding and _next_token_due_s(request) < now_s:
            _give_up(request)
    for request in engine.waiting:
        if _is(request, STANDARD) and request.rank_s < now_s:
            _give_up(request)
    engine.waiting.sort(key=lambda waiting: waiting.order)


def _decide(engine: Sequences, now_s: float) -> None:
    """Promise the SLOs of requests that have come, or decline to; the first deadline first."""
    while engine.waiting and _is(engine.waiting[0], UNDECIDED):
        request = engine.waiting.pop(0)
        if _can_promise(engine, request, now_s):
            request.rank = STANDARD
        else:
            _give_up(request)
        engine.enqueue(request)


def _can_promise(engine: Sequences, new: Request, now_s: float) -> bool:
    """Whether a request meets its deadline, and makes no standard one late that would meet its own."""
    decodes = [request for request in engine.running if request.decoding]
    partial = [request for request in engine.running if not request.decoding]
    queue = [request for request in engine.waiting if _is(request, STANDARD)]
    standard = [new, *queue, *(request for request in engine.running if _is(request, STANDARD))]
    period_s = min(request.service_class.tpot_slo_s for request in standard)
    num_decode = len(decodes) + len(partial) + len(queue) + 1
    context = sum(r.computed_tokens for r in decodes) + sum(r.num_tokens for r in [*partial, *queue, new])
    most = engine.pool.token_budget - num_decode
    room = 0
    if most > 0:
        room = largest_chunk(period_s, most, 0, 0, 0.0, 0, 0, num_decode, context + num_decode, *_times(engine))
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
    tokens = sum(chunk for chunk, _ in chunks)
    most = min(_tokens_left(prompt), engine.pool.token_budget - len(decodes) - tokens)
    if most <= 0:
        return 0
    pairs = float(sum(chunk * (done + 0.5 * chunk) for chunk, done in chunks))
    decode_context = sum(request.computed_tokens + 1 for request in decodes)
    return int(
        largest_chunk(
            limit_s, most, prompt.computed_tokens, tokens, pairs, sum(done for _, done in chunks), len(chunks),
            len(decodes), decode_context, *_times(engine),
        )
    )  # fmt: skip


def _times(engine: Sequences) -> tuple[FloatArray, FloatArray]:
    """What iterations take by the latency profile."""
    hardware = engine.pool.hardware
    return hardware.token_time_table_s(engine.pool.token_budget), hardware.attention_coefficients_s


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
