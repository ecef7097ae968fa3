"""Schedulers: pure functions from an engine's sequences to its next iteration. Each is the twin of a kernel.

See sim/schedulers for what a scheduler may read, and how to add one.
"""

from __future__ import annotations

from collections.abc import Callable

from rl_autoscale.fleet.spec import SchedulerName
from rl_autoscale.sim.reference.schedulers import vllm
from rl_autoscale.sim.reference.sequences import Iteration, Sequences

SCHEDULERS: dict[SchedulerName, Callable[[Sequences, float], Iteration | None]] = {
    "vllm": vllm.schedule,
    "vllm-priority": vllm.schedule,
}
