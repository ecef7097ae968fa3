"""The scheduler of vLLM before V1: prompts first, whole, while the decode batch stands still.

Reference: vllm 0.6, vllm/core/scheduler.py (`_schedule_default`), without chunked prefill, swapping and watermark.
"""

from __future__ import annotations

from dataclasses import replace

from rl_autoscale.sim.reference.request import Request
from rl_autoscale.sim.reference.schedulers.vllm import admit_waiting, schedule_running
from rl_autoscale.sim.reference.sequences import Iteration, Sequences


def schedule(engine: Sequences, now_s: float) -> Iteration | None:
    """Prompts alone while any can be admitted, else the decode batch; None with nothing to run."""
    decoding = [request for request in engine.running if request.decoding]
    chunks: dict[Request, int] = {}
    for request in engine.running:
        if not request.decoding:  # a prompt beyond the budget goes on
            chunks[request] = min(engine.tokens_to_compute(request), engine.pool.token_budget)
            engine.kv.extend(request, engine.computed_after(request, chunks[request]))
    admit_waiting(engine, chunks, now_s, whole=True)
    prompts = engine.iteration(chunks, 0)
    if prompts is not None:
        return replace(prompts, num_stalled=len(decoding))
    scheduled, num_preempted = schedule_running(engine)
    return engine.iteration(scheduled, num_preempted)
