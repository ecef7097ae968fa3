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
    head_blocks,
    head_fits,
    iterations_ahead,
    serve_running,
)


@njit
def schedule_trtllm(w, r, now_s):
    """Decide the replica's next iterations; see the package."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    preempted, decode_need, budget, running = serve_running(w, r, False)
    soon = False
    while not preempted and rep.wait_head >= 0 and budget > 0 and running < pool.batch_limit:
        tokens, num_hit, need = head_blocks(w, r)
        if not head_fits(w, r, need, decode_need):
            break
        if budget < tokens - num_hit * BLOCK <= pool.token_budget:
            # Decodes may overwrite what it finds; if it then exceeds the whole budget, it enters in pieces at once.
            soon = num_hit > 0
            break
        budget -= admit_head(w, r, now_s, tokens, num_hit, budget)
        running += 1
    return iterations_ahead(w, r, preempted or soon)
