"""TensorRT-LLM's in-flight batching; what it reserves is the pool's ``reserves_output``.

Reference: NVIDIA/TensorRT-LLM, cpp/tensorrt_llm/batch_manager/{capacityScheduler,microBatchScheduler}.cpp, without
context chunking.
"""

from __future__ import annotations

from rl_autoscale.sim.reference.schedulers.vllm import admit_waiting, schedule_running
from rl_autoscale.sim.reference.sequences import Iteration, Sequences


def schedule(engine: Sequences, now_s: float) -> Iteration | None:
    """Running sequences, then whole prompts while the token budget lasts; None with nothing to run."""
    scheduled, num_paused = schedule_running(engine)
    if num_paused == 0:
        admit_waiting(engine, scheduled, now_s, whole=True)
    return engine.iteration(scheduled, num_paused)
