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
    head_blocks,
    head_fits,
    iterations_ahead,
    serve_running,
)


@njit
def schedule_sarathi(w, r, now_s):
    """Decide the replica's next iterations; see the package."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    preempted, decode_need, budget, running = serve_running(w, r, True)
    while rep.wait_head >= 0 and budget > 0 and running < pool.batch_limit:
        tokens, num_hit, need = head_blocks(w, r)
        if not head_fits(w, r, need, decode_need):
            break
        budget -= admit_head(w, r, now_s, tokens, num_hit, budget)
        running += 1
    return iterations_ahead(w, r, preempted)
