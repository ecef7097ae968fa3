"""FastServe's skip-join multi-level feedback queue, with KV caches swapped to the host.

Reference: Wu et al., arXiv 2305.05920, and LLMServe/FastServe, fastserve/scheduler.py. What is left out or simpler is
told in the kernel of the same name (sim/schedulers/fastserve.py).
"""

from __future__ import annotations

from rl_autoscale.fleet.admission import prefill_time_s
from rl_autoscale.sim.reference.request import Request
from rl_autoscale.sim.reference.schedulers.swap import (
    bring_in,
    keep_running,
    makes_room,
    next_tokens,
    park,
    worst_decode,
)
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
    keep_running(engine, now_s)
    scheduled = next_tokens(engine)
    while engine.waiting:
        head = engine.waiting[0]
        budget = engine.pool.token_budget - sum(scheduled.values())
        if makes_room(engine, scheduled, head, budget, whole=True):
            scheduled[head] = bring_in(engine, head, budget, now_s)
            continue
        worst = worst_decode(engine)
        if worst is None or worst.order < head.order:
            break
        park(engine, worst, now_s)
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
