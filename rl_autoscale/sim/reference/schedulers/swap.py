"""The steps of schedulers that set sequences aside and move their KV caches to the host and back.

What is left out or simpler is told in the kernel of the same name (sim/schedulers/swap.py).
"""

from __future__ import annotations

from rl_autoscale.sim.reference.request import Request, blocks_for
from rl_autoscale.sim.reference.sequences import Sequences


def keep_running(engine: Sequences, now_s: float) -> None:
    """Make room for the next tokens of those that run: swap out who is parked, then park who runs, the last first."""
    while growth(engine, next_tokens(engine)) > engine.kv.num_free:
        if not swap_out_last(engine):
            worst = worst_decode(engine)
            if worst is None:
                return
            park(engine, worst, now_s)


def next_tokens(engine: Sequences) -> dict[Request, int]:
    """Tokens of those that run: one per decode sequence, and the next chunk of a prompt under way."""
    decodes = dict.fromkeys((request for request in engine.running if request.decoding), 1)
    budget = engine.pool.token_budget - len(decodes)
    prompts = {r: min(engine.tokens_to_compute(r), budget) for r in engine.running if not r.decoding}
    return decodes | prompts


def growth(engine: Sequences, scheduled: dict[Request, int]) -> int:
    """KV blocks that an iteration takes beyond those in the tables."""
    after = {request: engine.computed_after(request, tokens) for request, tokens in scheduled.items()}
    return sum(max(blocks_for(tokens) - len(request.block_table), 0) for request, tokens in after.items())


def makes_room(engine: Sequences, scheduled: dict[Request, int], head: Request, budget: int, *, whole: bool) -> bool:
    """Whether the head of the waiting queue can run; swaps out who is parked where that helps.

    Args:
        engine: its sequences.
        scheduled: tokens of those that run already.
        head: who would join them.
        budget: tokens left in this iteration.
        whole: whether a prompt must be computed in one piece, unless it is longer than the token budget.
    """
    pool, left = engine.pool, engine.tokens_to_compute(head)
    if len(engine.running) >= pool.batch_limit or budget <= 0 or (whole and budget < left <= pool.token_budget):
        return False
    goes_on = any(request.computed_tokens + tokens < request.num_tokens for request, tokens in scheduled.items())
    if goes_on and head.computed_tokens == 0:  # one prompt at a time is computed in pieces
        return False
    while blocks_for(head.num_tokens) - len(head.block_table) > engine.kv.num_free - growth(engine, scheduled):
        if not swap_out_last(engine, keep=head):
            return False
    return True


def bring_in(engine: Sequences, head: Request, budget: int, now_s: float) -> int:
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
        head.read_from_s = now_s
        return 1
    return min(head.num_tokens, budget)


def worst_decode(engine: Sequences) -> Request | None:
    """The decode sequence of the batch that is served last."""
    decodes = [request for request in engine.running if request.decoding]
    return max(decodes, key=lambda request: request.order, default=None)


def park(engine: Sequences, request: Request, now_s: float) -> None:
    """Preempt a decode sequence; its KV cache stays where it is."""
    engine.interrupt(request)
    engine.running.remove(request)
    request.idle_since_s = now_s
    engine.enqueue(request)


def swap_out_last(engine: Sequences, keep: Request | None = None) -> bool:
    """Move the KV cache of the last parked sequence to the host; returns whether there was one."""
    for request in reversed(engine.waiting):
        if request is not keep and request.block_table:
            engine.count_moves(len(request.block_table))
            engine.kv.free(request)
            request.on_host = True
            return True
    return False
