"""What only hindsight knows about an episode, for the critic in training; no policy ever sees it.

Arrivals come from outside: no action changes them. A baseline may therefore look at the arrivals to come without
biasing the policy gradient, and takes most of the noise of bursty traffic out of it (input-dependent baselines: Mao et
al., "Variance Reduction for Reinforcement Learning in Input-Driven Environments", ICLR 2019, section 4). The same holds
for the draws of an episode that telemetry does not show: capacity error, start-up scale, its normalisers.

| feature | meaning | scale |
|---|---|---|
| per pool and horizon | true demand between the previous horizon and this one, over the 30 s average now | log2 |
| per pool: level | 30 s average over the episode's mean demand | log2, half |
| speed, startup_scale | the episode's draws (envs/mdp.py: EpisodeSetup) | log2 |
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FloatArray
from rl_autoscale.workload.trace import Workload

HORIZONS_S = (30.0, 60.0, 120.0, 240.0, 480.0, 960.0)

_FLOOR_REPLICAS = 0.2
_LIMIT = 5.0


class Foresight:
    """The true course of demand in each of several fleets.

    Args:
        spec: of all fleets.
        num_fleets: how many.
    """

    def __init__(self, spec: FleetSpec, num_fleets: int) -> None:
        self._interval_s = spec.control_interval_s
        self._num_pools = len(spec.pools)
        self._demand = DemandEstimator(spec)
        self._ahead = np.zeros((num_fleets, 1, self._num_pools, len(HORIZONS_S)))
        self._mean = np.ones((num_fleets, self._num_pools))
        self._draws = np.zeros((num_fleets, 2))

    @property
    def num_features(self) -> int:
        """Length of `features` of one fleet."""
        return self._num_pools * (len(HORIZONS_S) + 1) + 2

    def load(self, e: int, workload: Workload, speed: float, startup_scale: float) -> None:
        """A new episode begins in fleet ``e``; its arguments as `EpisodeSetup` has them."""
        replicas = self._replicas_by_step(workload) * speed
        num_steps = len(replicas)
        until = np.concatenate([np.zeros((1, self._num_pools)), np.cumsum(replicas, axis=0)])
        edges = np.round(np.array([0.0, *HORIZONS_S]) / self._interval_s).astype(np.int64)
        step = np.arange(num_steps + 1)[:, None]
        start, end = (np.minimum(step + part, num_steps) for part in (edges[:-1], edges[1:]))
        ahead = (until[end] - until[start]) / np.maximum(end - start, 1)[..., None]
        for k in range(1, len(HORIZONS_S)):  # beyond the end nothing is known: as before it
            ahead[:, k] = np.where((end == start)[:, k, None], ahead[:, k - 1], ahead[:, k])
        ahead[num_steps] = ahead[num_steps - 1]  # traffic does not end, the episode does
        if num_steps + 1 > self._ahead.shape[1]:
            grown = np.zeros((len(self._ahead), num_steps + 1, *self._ahead.shape[2:]))
            grown[:, : self._ahead.shape[1]] = self._ahead
            self._ahead = grown
        self._ahead[e, : num_steps + 1] = ahead.transpose(0, 2, 1)
        self._ahead[e, num_steps + 1 :] = self._ahead[e, num_steps]
        self._mean[e] = replicas.mean(axis=0)
        self._draws[e] = np.log2([speed, startup_scale])

    def _replicas_by_step(self, workload: Workload) -> FloatArray:
        """Replicas of work that arrives in each control step, shape (num_steps, num_pools)."""
        num_steps = max(int(workload.span_s / self._interval_s), 1)
        prompt, output = workload.prompt_tokens.astype(np.float64), workload.output_tokens.astype(np.float64)
        step = np.minimum((workload.arrival_s / self._interval_s).astype(np.int64), num_steps - 1)
        by_pool = [
            np.bincount(step, self._demand.pool_work_s(prompt, output, workload.class_index, p), num_steps)
            for p in range(self._num_pools)
        ]
        return np.stack(by_pool, axis=-1) / self._interval_s

    def features(self, now_s: FloatArray, demand_replicas: FloatArray) -> npt.NDArray[np.float32]:
        """What is to come, seen from now.

        Args:
            now_s: shape (num_fleets,).
            demand_replicas: measured demand now, shape (num_fleets, num_pools).

        Returns:
            Shape (num_fleets, num_features).
        """
        step = np.minimum(np.round(now_s / self._interval_s).astype(np.int64), self._ahead.shape[1] - 1)
        here = np.log2(demand_replicas + _FLOOR_REPLICAS)
        ahead = np.log2(self._ahead[np.arange(len(step)), step] + _FLOOR_REPLICAS) - here[..., None]
        level = 0.5 * (here - np.log2(self._mean + _FLOOR_REPLICAS))
        parts = [ahead.reshape(len(step), -1), level, self._draws]
        return np.asarray(np.clip(np.concatenate(parts, axis=-1), -_LIMIT, _LIMIT), dtype=np.float32)
