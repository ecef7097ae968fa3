"""Kernel, TensorRT-LLM's in-flight batching: GUARANTEED_NO_EVICT and MAX_UTILIZATION.

Reference: NVIDIA/TensorRT-LLM, cpp/tensorrt_llm/batch_manager/{capacityScheduler,microBatchScheduler}.cpp, without
context chunking, which is its default; twin: sim/reference/schedulers/trtllm.py.

- Decode sequences and *whole* prompts share an iteration, first come first served, while the token budget lasts. A
  prompt beyond the budget, which TensorRT-LLM refuses, is computed in pieces here.
- GUARANTEED_NO_EVICT admits a request only if the blocks of the longest that it may become fit beside what is promised
  to all that run: prompt and ``max_output_tokens`` of its class, which its client asked for. It never pauses anybody.
- MAX_UTILIZATION admits what fits now and pauses the last one when the cache is full; a paused request starts again in
  its old place, and nobody behind it is admitted in that iteration.
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
def schedule_trtllm(w, r, now_s):
    """Decide the replica's next iterations; see the package."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    preempted, chunk, decode_need = make_room(w, r, False)
    reserve_decodes(w, r, decode_need)
    budget = pool.token_budget - rep.num_decode * pool.verified_tokens
    running = rep.num_decode
    if rep.partial >= 0:
        continue_prompt(w, r, chunk)
        budget -= chunk
        running += 1
    while not preempted and rep.wait_head >= 0 and budget > 0 and running < pool.batch_limit:
        tokens, num_hit, need = head_blocks(w, r)
        if not head_fits(w, r, need, decode_need) or budget < tokens - num_hit * BLOCK <= pool.token_budget:
            break
        budget -= admit_head(w, r, now_s, tokens, num_hit, budget)
        running += 1
    if running == 0:
        return 0
    if rep.num_prefill > 0 or preempted:
        return 1
    return decode_leap(w, r)
