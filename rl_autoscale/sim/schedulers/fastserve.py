"""Kernel, FastServe's skip-join multi-level feedback queue: preemption by time served, KV caches swapped to the host.

Reference: Wu et al., arXiv 2305.05920, and LLMServe/FastServe, fastserve/scheduler.py; twin:
sim/reference/schedulers/fastserve.py.

- Level p lasts 10 ms x 2**p. A request joins the first level that lasts as long as its prompt should take (skip-join);
  nobody knows how long its output will be. Who was served longer than the level lasts goes to the back of the next.
- An iteration takes the requests in the order of their levels, and within one of when they came there, while batch
  limit, token budget and KV cache last. Prompts are computed whole (one beyond the token budget in pieces, and is not
  preempted between them).
- A preempted sequence keeps its KV cache on the GPU until another needs the blocks, then in host memory (swap.py).
- Whoever has not been served for 3 s goes to level 0; one looks every second.
"""

from __future__ import annotations

import math

from rl_autoscale.fleet.admission import prefill_time_s
from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.batch import precedes, waiting_insert, waiting_remove
from rl_autoscale.sim.replica import constant_s, iterations_begun, leap_duration_s
from rl_autoscale.sim.schedulers.steps import continue_prompt, decode_leap
from rl_autoscale.sim.schedulers.swap import bring_in, keep_running, park, takes_part, worst_decode

QUANTUM_S = 0.01
TOP_LEVEL = 30
STARVED_S = 3.0
LOOK_EVERY_S = 1.0


@hot
def quantum_s(level):
    """How long a level lasts."""
    return QUANTUM_S * (1 << level)


@njit
def skip_join(w, r, q, now_s):
    """Rank a request that comes: the first level that lasts as long as its prompt should take."""
    p = w.rep[r].pool
    request = w.req[q]
    tokens = request.prompt_tokens + request.generated_tokens
    prompt_s = prefill_time_s(tokens, tokens * tokens, 0, 0, w.pool[p].token_budget, w.token_time[p], w.coefficients[p])
    level = 0
    while level < TOP_LEVEL and quantum_s(level) < prompt_s:
        level += 1
    request.rank = level
    request.rank_s = now_s
    request.level_s = 0.0
    request.idle_since_s = now_s


@njit
def demote(w, r, now_s):
    """Those who ran since the last call were served that long; who is through with its level descends."""
    rep = w.rep[r]
    served_s = now_s - rep.planned_s
    q = rep.batch_head
    while q >= 0:
        request = w.req[q]
        request.level_s += served_s
        if request.level_s > quantum_s(request.rank) and request.rank < TOP_LEVEL:
            request.rank += 1
            request.rank_s = now_s
            request.level_s = 0.0
        q = request.next
    rep.planned_s = now_s


@njit
def promote_starved(w, r, now_s):
    """Whoever has waited too long since it was last served goes to level 0."""
    rep = w.rep[r]
    if rep.wait_head < 0 or now_s < rep.next_look_s:
        return
    rep.next_look_s = now_s + LOOK_EVERY_S
    q = rep.wait_head
    while q >= 0:
        request = w.req[q]
        after = request.next
        if request.rank > 0 and now_s - request.idle_since_s >= STARVED_S:
            waiting_remove(w, r, q)
            request.rank = 0
            request.rank_s = now_s
            request.level_s = 0.0
            waiting_insert(w, r, q, False)
        q = after


@njit
def stays_true(w, r, now_s):
    """Iterations until a level ends or one looks for the starved, at most until the batch changes by itself."""
    rep = w.rep[r]
    rep.leap_iteration_s = w.fleet[0].speed * constant_s(w, r)
    left_s = math.inf
    q = rep.batch_head
    while q >= 0:
        if w.req[q].rank < TOP_LEVEL:
            left_s = min(left_s, quantum_s(w.req[q].rank) - w.req[q].level_s)
        q = w.req[q].next
    most = decode_leap(w, r)
    if left_s < leap_duration_s(w, r, most):
        most = min(most, iterations_begun(w, r, max(left_s, 0.0)))
    if rep.wait_head >= 0:
        left_s = max(rep.next_look_s - now_s, 0.0)
        if left_s < leap_duration_s(w, r, most):
            look = iterations_begun(w, r, left_s)
            if look > 1 and leap_duration_s(w, r, look - 1) >= left_s:
                look -= 1
            most = min(most, look)
    return most


@njit
def schedule_fastserve(w, r, now_s):
    """Decide the replica's next iterations; see the package."""
    rep = w.rep[r]
    demote(w, r, now_s)
    promote_starved(w, r, now_s)
    chunk = keep_running(w, r, now_s)
    budget = w.pool[rep.pool].token_budget - rep.num_decode
    if rep.partial >= 0:
        continue_prompt(w, r, chunk)
        budget -= chunk
    while rep.wait_head >= 0:
        tokens = takes_part(w, r, budget, True)
        if tokens > 0:
            budget -= bring_in(w, r, now_s, tokens, budget)
            continue
        worst = worst_decode(w, r)
        if worst < 0 or not precedes(w, rep.wait_head, worst):
            break
        park(w, r, worst, now_s)
        budget += 1
    if rep.num_decode + rep.num_prefill == 0:
        return 0
    if rep.num_prefill > 0 or rep.moved_blocks > 0:
        return 1
    return stays_true(w, r, now_s)
