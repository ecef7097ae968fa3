"""Schedulers: pure functions from an engine's sequences to its next iteration. Each is the twin of a kernel.

See sim/schedulers for what a scheduler may read, and how to add one.
"""

from __future__ import annotations

from collections.abc import Callable

from rl_autoscale.fleet.pool import SchedulerName
from rl_autoscale.sim.reference.request import Request
from rl_autoscale.sim.reference.schedulers import andes, fastserve, sarathi, slos_serve, trtllm, vllm, vllm_v0
from rl_autoscale.sim.reference.sequences import Iteration, Sequences

SCHEDULERS: dict[SchedulerName, Callable[[Sequences, float], Iteration | None]] = {
    "vllm": vllm.schedule,
    "vllm-priority": vllm.schedule,
    "vllm-v0": vllm_v0.schedule,
    "sarathi": sarathi.schedule,
    "trtllm-no-evict": trtllm.schedule,
    "trtllm-max-utilization": trtllm.schedule,
    "fastserve": fastserve.schedule,
    "slos-serve": slos_serve.schedule,
    "andes": andes.schedule,
}

RANKS: dict[SchedulerName, Callable[[Sequences, Request, float], None]] = {
    "vllm-priority": vllm.rank,
    "fastserve": fastserve.rank,
    "slos-serve": slos_serve.rank,
    "andes": andes.rank,
}
"""How a request is ranked when it comes, where the waiting queue is sorted."""
