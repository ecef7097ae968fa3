"""FastServe's skip-join multi-level feedback queue, with KV caches swapped to the host.

Reference: Wu et al., arXiv 2305.05920, and LLMServe/FastServe, fastserve/scheduler.py. What is left out or simpler is
told in the kernel of the same name (sim/schedulers/fastserve.py).
"""

from __future__ import annotations

from rl_autoscale.fleet.admission import prefill_time_s
from rl_autoscale.sim.reference.request import Request, blocks_for
from rl_autoscale.sim.reference.sequences import Iteration, Sequences
from rl_autoscale.sim.schedulers.fastserve import LOOK_EVERY_S, QUANTUM_S, STARVED_S, TOP_LEVEL


def rank(engine: Sequences, request: Request, now_s: float) -> None:
    """Skip-join: the first level that lasts as long as the prompt should take."""
    pool, tokens = engine.pool, request.num_tokens
    table_s = pool.hardware.token_time_table_s(pool.token_budget)
    prompt_s = prefill_time_s(
        tokens, tokens * tokens, 0, 0, pool.token_budget, table_s, pool.hardware.attention_coefficients_s
    )
    level = next((level for level in range(TOP_LEVEL) if _quantum_s(level) >= prompt_s), TOP_LEVEL)
    request.rank, request.rank_s, request.level_s, request.idle_since_s = level, now_s, 0.0, now_s


def schedule(engine: Sequences, now_s: float) -> Iteration | None:
    """The requests in the order of their levels, while batch limit, token budget and KV cache last."""
    _demote(engine, now_s)
    _promote_starved(engine, now_s)
    _keep_running(engine, now_s)
    scheduled = _next_tokens(engine)
    while engine.waiting:
        head = engine.waiting[0]
        budget = engine.pool.token_budget - sum(scheduled.values())
        if _makes_room(engine, scheduled, head, budget):
            scheduled[head] = _bring_in(engine, head, budget, now_s)
            continue
        worst = _worst_decode(engine)
        if worst is None or worst.order < head.order:
            break
        _park(engine, worst, now_s)
        del scheduled[worst]
    for request, tokens in scheduled.items():
        engine.kv.extend(request, engine.computed_after(request, tokens))
    return engine.iteration(scheduled, 0)


def _quantum_s(level: int) -> float:
    return QUANTUM_S * (1 << level)


def _demote(engine: Sequences, now_s: float) -> None:
    """Those who ran were served so long; who is through with its level goes to the back of the next."""
    for request in engine.running:
        request.level_s += now_s - engine.planned_s
        if request.level_s > _quantum_s(request.rank) and request.rank < TOP_LEVEL:
            request.rank, request.rank_s, request.level_s = request.rank + 1, now_s, 0.0
    engine.planned_s = now_s


def _promote_starved(engine: Sequences, now_s: float) -> None:
    """Whoever has waited too long since it was last served goes to level 0."""
    if not engine.waiting or now_s < engine.next_look_s:
        return
    engine.next_look_s = now_s + LOOK_EVERY_S
    for request in engine.waiting:
        if request.rank > 0 and now_s - request.idle_since_s >= STARVED_S:
            request.rank, request.rank_s, request.level_s = 0, now_s, 0.0
    engine.waiting.sort(key=lambda waiting: waiting.order)


def _keep_running(engine: Sequences, now_s: float) -> None:
    """Make room for the next tokens of those that run: swap out who is parked, then park who runs, the last first."""
    while _growth(engine, _next_tokens(engine)) > engine.kv.num_free:
        if not _swap_out_last(engine):
            worst = _worst_decode(engine)
            if worst is None:
                return
            _park(engine, worst, now_s)


def _next_tokens(engine: Sequences) -> dict[Request, int]:
    """Tokens of those that run: one per decode sequence, and the next chunk of a prompt under way."""
    decodes = dict.fromkeys((request for request in engine.running if request.decoding), 1)
    budget = engine.pool.token_budget - len(decodes)
    prompts = {r: min(engine.tokens_to_compute(r), budget) for r in engine.running if not r.decoding}
    return decodes | prompts


def _growth(engine: Sequences, scheduled: dict[Request, int]) -> int:
    """KV blocks that an iteration takes beyond those in the tables."""
    after = {request: engine.computed_after(request, tokens) for request, tokens in scheduled.items()}
    return sum(max(blocks_for(tokens) - len(request.block_table), 0) for request, tokens in after.items())


def _makes_room(engine: Sequences, scheduled: dict[Request, int], head: Request, budget: int) -> bool:
    """Whether the head of the waiting queue can run; swaps out who is parked where that helps."""
    pool, left = engine.pool, engine.tokens_to_compute(head)
    if len(engine.running) >= pool.batch_limit or budget <= 0 or budget < left <= pool.token_budget:
        return False
    goes_on = any(request.computed_tokens + tokens < request.num_tokens for request, tokens in scheduled.items())
    if goes_on and head.computed_tokens == 0:  # one prompt at a time is computed in pieces
        return False
    while blocks_for(head.num_tokens) - len(head.block_table) > engine.kv.num_free - _growth(engine, scheduled):
        if not _swap_out_last(engine, keep=head):
            return False
    return True


def _bring_in(engine: Sequences, head: Request, budget: int, now_s: float) -> int:
    """The head of the waiting queue joins the batch; returns the tokens that it takes."""
    engine.running.append(engine.waiting.pop(0))
    if not head.scheduled_s >= 0.0:
        head.scheduled_s = now_s
    if head.on_host:
        head.on_host = False
        engine.kv.extend(head, head.computed_tokens)
        engine.count_moves(len(head.block_table))
    if head.computed_tokens > 0:
        head.decoding = True
        return 1
    return min(head.num_tokens, budget)


def _worst_decode(engine: Sequences) -> Request | None:
    """The decode sequence of the batch that is served last."""
    decodes = [request for request in engine.running if request.decoding]
    return max(decodes, key=lambda request: request.order, default=None)


def _park(engine: Sequences, request: Request, now_s: float) -> None:
    """Preempt a decode sequence; its KV cache stays where it is."""
    engine.running.remove(request)
    request.idle_since_s = now_s
    engine.enqueue(request)


def _swap_out_last(engine: Sequences, keep: Request | None = None) -> bool:
    """Move the KV cache of the last parked sequence to the host; returns whether there was one."""
    for request in reversed(engine.waiting):
        if request is not keep and request.block_table:
            engine.count_moves(len(request.block_table))
            engine.kv.free(request)
            request.on_host = True
            return True
    return False
