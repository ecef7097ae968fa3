"""vLLM V1's scheduler: which sequences run in the next iteration, and with how many tokens each.

Reference: vllm 0.33.0, v1/core/sched/scheduler.py (`Scheduler.schedule`).

Two deviations, both only under priority scheduling, where the victim may stand before the sequence that needs its
blocks: a sequence that preempts itself does not make those behind it pause for an iteration, and a prompt chunk uses
the token budget that a victim gives back. And one that only prefix caching can tell: blocks are handed out when it is
settled who goes on, so what victims leave behind is in the queue of free blocks before the first is taken.
"""

from __future__ import annotations

from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.sim.reference.kv_blocks import Block
from rl_autoscale.sim.reference.request import Request, blocks_for
from rl_autoscale.sim.reference.sequences import Iteration, Sequences


def schedule(engine: Sequences, now_s: float) -> Iteration | None:
    """Running sequences first, then the waiting queue; None with nothing to run."""
    scheduled, num_preempted = schedule_running(engine)
    if num_preempted == 0 or not engine.running:  # the last one had no room beside what is parked: another may
        admit_waiting(engine, scheduled, now_s)
    return engine.iteration(scheduled, num_preempted)


def schedule_running(engine: Sequences, *, whole_prompt: bool = False) -> tuple[dict[Request, int], int]:
    """Give every running sequence its tokens and blocks; when blocks run out, preempt.

    Args:
        engine: its sequences.
        whole_prompt: whether all of a partly computed prompt must fit, and not only its next chunk.

    Returns:
        (tokens of every sequence that goes on, how many were preempted).
    """
    scheduled: dict[Request, int] = {}
    promised: dict[Request, int] = {}
    num_preempted = 0
    for request in list(engine.running):
        while request in engine.running:
            budget = engine.pool.token_budget - sum(scheduled.values())
            wanted = engine.tokens_to_compute(request)
            tokens = min(wanted, budget)
            ahead = wanted if whole_prompt and not request.decoding else tokens
            blocks = blocks_for(engine.computed_after(request, ahead)) - len(request.block_table)
            if sum(promised.values()) + blocks <= engine.kv.num_free:
                scheduled[request], promised[request] = tokens, blocks
                break
            victim = _victim(engine)
            engine.preempt(victim)
            scheduled.pop(victim, None)
            promised.pop(victim, None)
            num_preempted += 1
    for request, tokens in scheduled.items():
        engine.kv.extend(request, engine.computed_after(request, tokens))
    return scheduled, num_preempted


def admit_waiting(engine: Sequences, scheduled: dict[Request, int], now_s: float, *, whole: bool = False) -> None:
    """Admit from the head of the waiting queue while budget, batch and blocks last.

    Args:
        engine: its sequences.
        scheduled: tokens of those that run already; the admitted ones are added.
        now_s: the time.
        whole: whether a prompt is computed in one piece or not yet, unless it is longer than the token budget.
    """
    budget = engine.pool.token_budget - sum(scheduled.values())
    while engine.waiting and budget > 0 and len(engine.running) + len(engine.parked) < engine.pool.batch_limit:
        request = engine.waiting[0]
        if request.kv_in_bridge or request.on_host:
            if not _take_over(engine, request, budget):
                break
            scheduled[request] = engine.pool.verified_tokens
            budget -= engine.pool.verified_tokens
            continue
        hit = engine.kv.longest_hit(request)
        left = request.num_tokens - len(hit) * BLOCK_SIZE_TOKENS
        if not _fits(engine, request, hit) or (whole and budget < left <= engine.pool.token_budget):
            break
        engine.kv.reuse(request, hit)
        request.computed_tokens = len(hit) * BLOCK_SIZE_TOKENS
        _count_lookup(engine, request)
        tokens = min(left, budget)
        engine.kv.extend(request, request.computed_tokens + tokens)
        engine.running.append(engine.waiting.pop(0))
        scheduled[request] = tokens
        budget -= tokens
        if not request.scheduled_s >= 0.0:
            request.scheduled_s = now_s


def _take_over(engine: Sequences, request: Request, budget: int) -> bool:
    """Let the head of the waiting queue decode, whose KV waits in bridge or host memory; False if it does not fit."""
    num_tokens = request.computed_tokens + request.tokens_after(engine.pool.tokens_per_iteration)
    if blocks_for(num_tokens) > engine.kv.num_free or engine.pool.verified_tokens > budget:
        return False
    if request.on_host:
        engine.count_moves(blocks_for(request.computed_tokens))
    engine.kv.extend(request, num_tokens)
    engine.running.append(engine.waiting.pop(0))
    request.kv_in_bridge = request.on_host = False
    request.read_until(request.generated_tokens, request.first_token_s)
    request.read_from_s = engine.now_s
    request.decoding = True
    return True


def _fits(engine: Sequences, request: Request, hit: list[Block]) -> bool:
    """Whether the whole input fits the free blocks, or, where the pool reserves, all that the request may become."""
    if engine.pool.reserves_output:
        return engine.num_reserved + engine.most_blocks(request) <= engine.pool.num_kv_blocks
    num_idle = sum(block.num_users == 0 for block in hit)
    return blocks_for(request.num_tokens) - len(hit) + num_idle <= engine.kv.num_free  # scheduler_reserve_full_isl


def _count_lookup(engine: Sequences, request: Request) -> None:
    """Book a look into the prefix cache; as in vLLM, requests that were preempted are not counted."""
    if engine.pool.prefix_caching and request.num_preemptions == 0:
        engine.books.prefix_queried_tokens += request.num_tokens
        engine.books.prefix_hit_tokens += request.computed_tokens


def _victim(engine: Sequences) -> Request:
    """The sequence to preempt: the last admitted, or under priority scheduling the least urgent."""
    return max(engine.running, key=lambda running: running.order) if engine.ranked else engine.running[-1]


def rank(engine: Sequences, request: Request, now_s: float) -> None:
    """Priority scheduling: lower priority first, then the earlier arrival."""
    request.rank = request.service_class.priority
