"""Kernel, vLLM V1's scheduler, FCFS or by priority.

Reference: vllm 0.33.0, v1/core/sched/scheduler.py; twin: sim/reference/schedulers/vllm.py.

- An iteration serves running sequences first (one token per decode, the rest of a partly computed prompt), then admits
  from the waiting queue while the token budget and ``max_num_seqs`` last and the head's *whole* input fits the free
  blocks.
- When running sequences need more blocks than are free, the batch's tail (FCFS) or the worst (priority, arrival) is
  preempted: it loses its KV, goes to the front of the waiting queue and recomputes prompt and output so far. Nothing is
  admitted in that iteration.
- A request whose KV was transferred, or is in host memory, decodes as soon as its blocks fit. A finished stream that
  post-processing has no room for is still one of ``max_num_seqs``.
"""

from __future__ import annotations

from rl_autoscale.fleet.jit import hot
from rl_autoscale.sim.schedulers.steps import (
    admit_head,
    head_blocks,
    head_fits,
    iterations_ahead,
    serve_running,
    take_over,
)


@hot
def schedule_vllm(w, r, now_s):
    """Decide the replica's next iterations; see the package."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    preempted, decode_need, budget, running = serve_running(w, r, False)
    running += rep.num_parked
    if not preempted or rep.batch_tail < 0:  # the last one had no room beside what is parked: another may
        while rep.wait_head >= 0 and budget > 0 and running < pool.batch_limit:
            if w.req[rep.wait_head].kv_in_bridge or w.req[rep.wait_head].on_host:
                need = take_over(w, r, now_s, pool.kv_blocks - rep.kv_used - decode_need, budget)
                if need < 0:
                    break
                decode_need += need
                budget -= pool.verified_tokens
                running += 1
                continue
            tokens, num_hit, need = head_blocks(w, r)
            if not head_fits(w, r, need, decode_need):
                break
            budget -= admit_head(w, r, now_s, tokens, num_hit, budget)
            running += 1
    return iterations_ahead(w, r, preempted)
