"""Kernel, the scheduler of vLLM before V1: prompts first, whole, while the decode batch stands still.

Reference: vllm 0.6, vllm/core/scheduler.py (`_schedule_default`), without chunked prefill and without swapping; twin:
sim/reference/schedulers/vllm_v0.py.

- As long as the head of the waiting queue fits the free blocks, the batch limit and the token budget, an iteration
  computes prompts and nothing else. A prompt beyond the budget is computed in pieces, one iteration after the other;
  vLLM refuses to start with a budget below its longest sequence.
- Else the decode batch goes on; when it needs more blocks than are free, its tail is preempted and recomputes.

The watermark (1 % of the blocks stay free at admission) is left out.
"""

from __future__ import annotations

from rl_autoscale.fleet.jit import njit
from rl_autoscale.sim.layout import BLOCK
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
def schedule_vllm_v0(w, r, now_s):
    """Decide the replica's next iterations; see the package."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    budget = pool.token_budget
    running = rep.num_decode
    if rep.partial >= 0:
        request = w.req[rep.partial]
        chunk = min(request.prompt_tokens + request.generated_tokens - request.computed_tokens, budget)
        continue_prompt(w, r, chunk)
        budget -= chunk
        running += 1
    while rep.wait_head >= 0 and budget > 0 and running < pool.batch_limit:
        tokens, num_hit, need = head_blocks(w, r)
        if not head_fits(w, r, need, 0) or budget < tokens - num_hit * BLOCK <= pool.token_budget:
            break
        budget -= admit_head(w, r, now_s, tokens, num_hit, budget)
        running += 1
    if rep.num_prefill > 0:
        rep.stalled = 1
        return 1
    if rep.num_decode == 0:
        return 0
    preempted, _, decode_need = make_room(w, r, False)
    reserve_decodes(w, r, decode_need)
    return 1 if preempted else decode_leap(w, r)
