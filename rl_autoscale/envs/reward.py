"""The reward is the reported metric: GPU time plus a price on SLO misses, both per unit of ideal work.

Per control step

    cost     = (GPU-seconds of the step + change of the GPU-seconds of batch work put off)
               / (GPU-seconds the episode's work takes at full utilisation, per step)
    misses   = requests that became a miss in the step, weighted by class / (the episode's mean arrivals per step)
    reward   = -(cost + miss_price * misses) / (1 + miss_price / PRICE_SCALE)

Summed over an episode this is, up to constants, ``GPU-hours / ideal GPU-hours + miss_price * (1 - slo_attainment)``:
the cost and the attainment of the result tables. A miss counts in the step in which it becomes certain: at refusal,
at a late first token, at a late finish. The divisor keeps rewards of all prices of one size; it does not change which
policy is best for a price.

*Batch work put off* is that of batch requests that have not ended, at full utilisation: charged when it arrives, given
back when it is done. An episode ends, and a discount forgets, before a deadline of an hour; without it work that is
never done would cost nothing. GPU time that is spent either way does it for nothing.

``miss_weight`` says what a miss of each class costs over that of the dearest class. With all weights 1, as in the
tables unless they say otherwise, ``1 - slo_attainment`` is the share of all requests; with a lower one for batch work
that work waits for GPU time that interactive requests leave.

``miss_price`` is what the operator turns: at price 10 a policy should pay up to 1 % more GPU-hours (of the ideal) to
avoid a 0.1 % loss of attainment. It is a feature of the observation, so one policy covers the whole cost/attainment
front.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rl_autoscale.fleet.state import FloatArray

PRICE_SCALE = 20.0
PRICE_RANGE = (2.0, 120.0)
"""Prices drawn (log-uniformly) in training, and the sensible range of the dial."""
LEAST_WEIGHT = 0.02
"""Weights drawn (log-uniformly) in training reach down to it."""


@dataclass(frozen=True, slots=True)
class Reward:
    """Named terms, each of the batch shape; ``total`` is what the learner gets."""

    cost: FloatArray
    misses: FloatArray
    total: FloatArray


def step_reward(
    gpu_s: FloatArray,
    put_off_gpu_s: FloatArray,
    missed: FloatArray,
    ideal_gpu_s: FloatArray,
    mean_arrivals: FloatArray,
    miss_price: FloatArray,
    miss_weight: FloatArray,
) -> Reward:
    """Reward of one control step.

    Args:
        gpu_s: GPU-seconds spent in the step.
        put_off_gpu_s: how much more batch work waits after it than before, in GPU-seconds.
        missed: requests that became a miss in the step, shape (..., num_classes).
        ideal_gpu_s: GPU-seconds per step of the episode's work at full utilisation, > 0.
        mean_arrivals: mean requests per step of the episode, > 0.
        miss_price: > 0.
        miss_weight: in [0, 1], the shape of ``missed``.
    """
    cost = (gpu_s + put_off_gpu_s) / ideal_gpu_s
    misses = np.asarray((missed * miss_weight).sum(axis=-1) / mean_arrivals)
    return Reward(cost, misses, -(cost + miss_price * misses) / (1.0 + miss_price / PRICE_SCALE))
