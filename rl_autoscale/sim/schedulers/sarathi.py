"""Kernel, Sarathi-Serve's scheduler: chunked prefill without stalls.

Reference: Agrawal et al., OSDI 2024, algorithm 3, and microsoft/sarathi-serve,
sarathi/core/scheduler/sarathi_scheduler.py; twin: sim/reference/schedulers/sarathi.py.

- Every decode sequence gets its token; a partly computed prompt, then the waiting queue share what is left of the
  token budget. The budget is what bounds the time between tokens: `token_budget_for` (fleet/token_budget.py).
- A prompt takes the blocks of all its chunks when it is admitted, so chunks never preempt; decode sequences preempt the
  batch's tail, which recomputes. The waiting queue is looked at all the same.

vLLM V1 has adopted the rule: what is left of the difference is the sentence before this one. The watermark (1 % of the
blocks stay free at admission) is left out.
"""

from __future__ import annotations

from rl_autoscale.fleet.jit import njit
from rl_autoscale.sim.schedulers.steps import (
    admit_head,
    continue_prompt,
    decode_leap,
    head_blocks,
    head_fits,
    make_room,
    reserve_decodes,
)


@njit
def schedule_sarathi(w, r, now_s):
    """Decide the replica's next iterations; see the package."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    preempted, chunk, decode_need = make_room(w, r, True)
    reserve_decodes(w, r, decode_need)
    budget = pool.token_budget - rep.num_decode * pool.verified_tokens
    running = rep.num_decode
    if rep.partial >= 0:
        continue_prompt(w, r, chunk)
        budget -= chunk
        running += 1
    while rep.wait_head >= 0 and budget > 0 and running < pool.batch_limit:
        tokens, num_hit, need = head_blocks(w, r)
        if not head_fits(w, r, need, decode_need):
            break
        budget -= admit_head(w, r, now_s, tokens, num_hit, budget)
        running += 1
    if running == 0:
        return 0
    if rep.num_prefill > 0 or preempted:
        return 1
    return decode_leap(w, r)
