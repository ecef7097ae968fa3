"""Sarathi-Serve's scheduler: chunked prefill without stalls.

Reference: Agrawal et al., OSDI 2024, algorithm 3, and microsoft/sarathi-serve,
sarathi/core/scheduler/sarathi_scheduler.py, without watermark.
"""

from __future__ import annotations

from rl_autoscale.sim.reference.schedulers.vllm import admit_waiting, schedule_running
from rl_autoscale.sim.reference.sequences import Iteration, Sequences


def schedule(engine: Sequences, now_s: float) -> Iteration | None:
    """Decodes, then the prompt under way, then new ones, while the token budget lasts; None with nothing to run."""
    scheduled, num_preempted = schedule_running(engine, whole_prompt=True)
    admit_waiting(engine, scheduled, now_s)
    return engine.iteration(scheduled, num_preempted)
