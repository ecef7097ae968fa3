"""Andes' scheduler: the requests that gain most quality of experience (QoE) per KV block run, others pause.

Reference: Liu et al., Andes, arXiv 2404.16283, section 4. What is left out or simpler is told in the kernel of the same
name (sim/schedulers/andes.py); `qoe_gain` and `decode_s` are the one copy of their arithmetic.
"""

from __future__ import annotations

from rl_autoscale.fleet.admission import prefill_time_s
from rl_autoscale.sim.reference.request import Request, blocks_for
from rl_autoscale.sim.reference.schedulers.swap import bring_in, keep_running, makes_room, next_tokens, park
from rl_autoscale.sim.reference.sequences import Iteration, Sequences
from rl_autoscale.sim.schedulers.andes import (
    CHOSEN,
    FAVOUR_RUNNING,
    FULL,
    LOOK_EVERY,
    MOST_SIZES,
    NEW,
    PAUSED,
    decode_s,
    qoe_gain,
)


def rank(engine: Sequences, request: Request, now_s: float) -> None:
    """A request that comes is not chosen yet, and goes before those that were passed over."""
    request.rank, request.rank_s = NEW, request.arrival_s


def schedule(engine: Sequences, now_s: float) -> Iteration | None:
    """Those that are chosen, then newcomers, while token budget and KV cache last; chosen anew every 10 iterations."""
    if engine.num_iterations >= engine.next_look or not engine.running:
        _look(engine, now_s)
        engine.next_look = engine.num_iterations + LOOK_EVERY
    keep_running(engine, now_s)
    scheduled = next_tokens(engine)
    while engine.waiting and engine.waiting[0].rank != PAUSED:
        head = engine.waiting[0]
        budget = engine.pool.token_budget - sum(scheduled.values())
        if not makes_room(engine, scheduled, head, budget, whole=False):
            break
        scheduled[head] = bring_in(engine, head, budget, now_s)
    for request, tokens in scheduled.items():
        engine.kv.extend(request, engine.computed_after(request, tokens))
    return engine.iteration(scheduled, 0)


def _look(engine: Sequences, now_s: float) -> None:
    """Let all requests run, or choose which may."""
    here = [*engine.running, *engine.waiting]
    if not here:
        return
    for request in engine.running:
        if request.decoding:
            request.read_until(request.generated_tokens, now_s)
    chosen = set(here)
    fastest_s = min(request.service_class.tpot_slo_s for request in here)
    mean_tokens = sum(request.num_tokens for request in here) / len(here)
    blocks = sum(_blocks(engine, request) for request in here)
    if blocks > FULL * engine.pool.num_kv_blocks or _decode_s(engine, len(here), mean_tokens) > fastest_s:
        chosen = _choose(engine, now_s, here, mean_tokens, fastest_s)
    for request in here:
        request.rank = CHOSEN if request in chosen else PAUSED
    engine.waiting.sort(key=lambda waiting: waiting.order)
    for request in here:
        if request in engine.running and request.rank == PAUSED:
            park(engine, request, now_s)


def _choose(engine: Sequences, now_s: float, here: list[Request], mean_tokens: float, fastest_s: float) -> set[Request]:
    """The batch that gains most QoE; the partly computed prompt is in every batch."""
    partial = {request for request in engine.running if not request.decoding}
    free = engine.pool.num_kv_blocks - sum(_blocks(engine, request) for request in partial)
    most = len(partial)
    left = free
    for blocks in sorted(_blocks(engine, request) for request in here if request not in partial):
        if blocks > left:
            break
        left -= blocks
        most += 1
    sizes = range(len(here), 0, -1)
    fast = next((size for size in sizes if not _decode_s(engine, size, mean_tokens) > fastest_s), 1)
    least = min(fast, most)
    step = max((most - least + MOST_SIZES - 2) // (MOST_SIZES - 1), 1)
    best, chosen = -1.0, set(here)
    for size in range(most, least - 1, -step):
        gap_s = _decode_s(engine, size, mean_tokens)
        gains = {request: _gain(engine, request, now_s, gap_s) for request in here if request not in partial}
        total, taken, left = 0.0, set(partial), free
        for request in sorted(gains, key=lambda item: (-gains[item] / _blocks(engine, item), item.index)):
            if len(taken) < size and _blocks(engine, request) <= left:
                taken.add(request)
                left -= _blocks(engine, request)
                total += gains[request]
        if total > best:
            best, chosen = total, taken
    return chosen


def _blocks(engine: Sequences, request: Request) -> int:
    """KV blocks that a request needs until the next look."""
    return min(blocks_for(request.num_tokens + LOOK_EVERY), engine.pool.num_kv_blocks)


def _decode_s(engine: Sequences, size: int, mean_tokens: float) -> float:
    hardware = engine.pool.hardware
    table_s = hardware.token_time_table_s(engine.pool.token_budget)
    return decode_s(size, mean_tokens, table_s, hardware.attention_coefficients_s)


def _gain(engine: Sequences, request: Request, now_s: float, gap_s: float) -> float:
    """QoE that a request gains by being served in a batch in which tokens come every ``gap_s``."""
    pool, tokens = engine.pool, request.num_tokens
    begins_s = now_s
    if request.on_host:
        begins_s += blocks_for(request.computed_tokens) * pool.block_move_s
    elif request.computed_tokens == 0:
        table_s = pool.hardware.token_time_table_s(pool.token_budget)
        slopes = pool.hardware.attention_coefficients_s
        begins_s += prefill_time_s(tokens, tokens * tokens, 0, 0, pool.token_budget, table_s, slopes)
    read_s = request.expected_s if request.read_tokens == 0 else request.read_s
    gain = qoe_gain(now_s, read_s, begins_s, gap_s, request.expected_s, request.service_class.tpot_slo_s)
    return gain * FAVOUR_RUNNING if request in engine.running else gain
