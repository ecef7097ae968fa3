"""Signals that several rules read, each with one meaning: outstanding requests per pool, and values over a window."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, FloatArray


def queue_per_pool(spec: FleetSpec, state: FleetState) -> FloatArray:
    """Requests queued at the gateway, shape (num_pools,), each class's shared among its pools by ready replicas.

    A class with no ready replica anywhere counts for its first-choice pool. NaN where a class the pool may serve has
    no reading. What waits in the bridge is shared among decode pools in the same way.
    """
    queued = share_per_pool(spec, state, state.classes.queue_length)
    if spec.decode_pools and state.stages is not None:
        _share(queued, state, spec.decode_pools, float(state.stages.bridge_queue))
    return queued


def share_per_pool(spec: FleetSpec, state: FleetState, per_class: FloatArray) -> FloatArray:
    """A quantity held at the gateway per class, shared among the pools that may serve it; shape (num_pools,).

    By ready replicas, as `queue_per_pool` shares queue lengths.
    """
    shared = np.zeros(len(spec.pools))
    for class_index, amount in enumerate(per_class):
        _share(shared, state, spec.pools_serving(class_index), float(amount))
    return shared


def _share(shared: FloatArray, state: FleetState, pool_indices: tuple[int, ...], amount: float) -> None:
    """Add an amount to pools by their ready replicas, in place."""
    pools = list(pool_indices)
    ready = np.nan_to_num(state.pools.ready[pools])
    shares = ready if ready.sum() > 0 else np.eye(len(pools))[0]
    shared[pools] += amount * shares / shares.sum()


def outstanding_per_pool(spec: FleetSpec, state: FleetState) -> FloatArray:
    """Requests in the engines and queued at the gateway, shape (num_pools,); NaN where any part is unknown."""
    return state.pools.running + state.pools.waiting + queue_per_pool(spec, state)


def tokens_per_pool(spec: FleetSpec, state: FleetState) -> FloatArray:
    """Tokens held in KV caches and prompt tokens queued at the gateway, shape (num_pools,); NaN where unknown."""
    capacity = np.array([pool.num_kv_blocks * BLOCK_SIZE_TOKENS for pool in spec.pools])
    held = state.pools.kv_usage * state.pools.ready * capacity
    return np.asarray(held + share_per_pool(spec, state, state.classes.queued_prompt_tokens))


def slo_saturation(spec: FleetSpec, state: FleetState) -> FloatArray:
    """Worst of p95 TTFT and p95 TPOT over its SLO among a pool's classes, shape (num_pools,).

    A prefill pool answers for TTFT, a decode pool for TPOT. A class without a latency counts as 0 if it is known to
    have nothing in flight and nothing queued; otherwise it is left out. NaN for a pool of which nothing is known.
    """
    classes = state.classes
    slos = np.array([(item.ttft_slo_s, item.tpot_slo_s) for item in spec.classes])
    ratios = np.stack([classes.ttft_p95_s, classes.tpot_p95_s], axis=-1) / slos
    idle = (classes.in_flight == 0) & (classes.queue_length == 0)
    saturation = np.full(len(spec.pools), np.nan)
    for pool, spec_pool in enumerate(spec.pools):
        mine = ratios[:, {"prefill": slice(0, 1), "decode": slice(1, 2)}.get(spec_pool.role, slice(0, 2))]
        per_class = np.where(np.isnan(mine).all(axis=-1), np.where(idle, 0.0, np.nan), np.fmax.reduce(mine, axis=-1))
        served = [c for c in range(len(spec.classes)) if pool in spec.pools_passed(c)]
        if served:
            saturation[pool] = np.fmax.reduce(per_class[served])
    return saturation


@dataclass(slots=True)
class Samples:
    """The recent values of one signal with their times; missing values are never added."""

    keep_s: float
    samples: deque[tuple[float, float]] = field(default_factory=deque)

    def add(self, time_s: float, value: float) -> None:
        """Record a value; NaN is ignored, and what is older than ``keep_s`` is forgotten."""
        if not np.isnan(value):
            self.samples.append((time_s, value))
        while self.samples and self.samples[0][0] <= time_s - self.keep_s - 1e-9:
            self.samples.popleft()

    def last(self, now_s: float, window_s: float) -> list[float]:
        """Values in (now - window, now]."""
        return [value for time_s, value in self.samples if time_s > now_s - window_s + 1e-9]

    def mean(self, now_s: float, window_s: float) -> float:
        """Mean of the values in (now - window, now]; NaN when there are none."""
        values = self.last(now_s, window_s)
        return sum(values) / len(values) if values else float("nan")
