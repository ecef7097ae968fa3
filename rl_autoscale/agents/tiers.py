"""Pools that can stand in for each other, their traffic of late, and what a replica of each can serve of it.

Rules that choose *which* hardware grows (`infaas`, `cocktail`, `qlm`) see a fleet as tiers: all pools of one role and
model, and the classes whose first choice they are. A pool in no tier stands in for those
that are until they have the replicas they want (fleet/demand.py: `StandIns`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rl_autoscale.agents.capacity import replica_requests_per_s
from rl_autoscale.agents.signals import Samples
from rl_autoscale.fleet.answer_lengths import AnswerLengths
from rl_autoscale.fleet.profile import TYPICAL_PROMPT_TOKENS
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, FloatArray


@dataclass(frozen=True, slots=True)
class Tier:
    """Pools of one role and model, as listed, and the classes that are sent there first; both as indices."""

    pools: tuple[int, ...]
    classes: tuple[int, ...]


def tiers_of(spec: FleetSpec) -> list[Tier]:
    """The tiers of a fleet, by their first class."""
    tiers = [spec.pools[p].tier for p in spec.first_choice]
    return [
        Tier(
            tuple(p for p, pool in enumerate(spec.pools) if pool.tier == tier),
            tuple(c for c, of_class in enumerate(tiers) if of_class == tier),
        )
        for tier in dict.fromkeys(tiers)
    ]


class RecentTraffic:
    """Mean arrival rate and lengths of every class over the recent past.

    Args:
        spec: the fleet.
        window_s: how long a reading counts; output lengths are those of `AnswerLengths`.
    """

    def __init__(self, spec: FleetSpec, window_s: float) -> None:
        self._window_s = window_s
        self._rate, self._prompt = ([Samples(window_s) for _ in spec.classes] for _ in range(2))
        self._answers = AnswerLengths((len(spec.classes),))

    def observe(self, state: FleetState) -> None:
        """Take in one observation; missing readings are left out."""
        if not state.window_s > 0:
            return
        self._answers.update(state)
        now_s, classes = float(state.time_s), state.classes
        for c, rate_per_s in enumerate(classes.arrivals_per_s):
            self._rate[c].add(now_s, float(rate_per_s))
            if rate_per_s > 0:
                self._prompt[c].add(now_s, float(classes.arrived_prompt_tokens_per_s[c] / rate_per_s))

    def rates_per_s(self, tier: Tier, now_s: float) -> FloatArray:
        """Mean arrivals of each class of a tier; NaN for one without a reading."""
        return np.array([self._rate[c].mean(now_s, self._window_s) for c in tier.classes])

    def peak_per_s(self, now_s: float) -> float:
        """Largest arrival rate of all classes together in one window; NaN while a class has no reading."""
        readings = [samples.last(now_s, self._window_s) for samples in self._rate]
        common = min(len(values) for values in readings)
        return max((sum(values[k - common] for values in readings) for k in range(common)), default=float("nan"))

    def lengths(self, class_index: int, now_s: float) -> tuple[float, float]:
        """Mean prompt and output tokens, >= 1; typical ones where there is no reading."""
        prompt = self._prompt[class_index].mean(now_s, self._window_s)
        return (
            TYPICAL_PROMPT_TOKENS if np.isnan(prompt) else max(prompt, 1.0),
            float(self._answers.mean_tokens[class_index]),
        )


def replica_rates_per_s(spec: FleetSpec, tier: Tier, traffic: RecentTraffic, now_s: float) -> FloatArray:
    """Requests per second that one replica of each pool of a tier serves of the tier's mix within all SLOs.

    Classes share a replica's time: 1 / rate = sum over classes of share / rate of the class alone.

    Returns:
        Shape (len(tier.pools),); NaN before any arrival, 0 for a pool that cannot keep a class's SLOs at any rate.
    """
    arrivals = np.nan_to_num(traffic.rates_per_s(tier, now_s))
    if not arrivals.sum() > 0:
        return np.full(len(tier.pools), np.nan)
    shares = arrivals / arrivals.sum()
    busy_s = np.zeros(len(tier.pools))
    for c, share in zip(tier.classes, shares, strict=True):
        prompt_tokens, output_tokens = traffic.lengths(c, now_s)
        if not share > 0:
            continue
        for k, p in enumerate(tier.pools):
            service_class = spec.classes[c]
            rate = replica_requests_per_s(
                spec.pools[p],
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                ttft_slo_s=service_class.ttft_slo_s,
                itl_slo_s=service_class.tpot_slo_s,
                strict=True,
            )
            busy_s[k] += share / rate if rate > 0 else np.inf
    return np.asarray(1.0 / busy_s)


def price_per_replica_hour(spec: FleetSpec, tier: Tier) -> FloatArray:
    """Dollars per hour of one replica of each pool; GPUs where prices are 0. Shape (len(tier.pools),)."""
    prices = np.array([spec.pools[p].price_usd_per_gpu_hour for p in tier.pools])
    gpus = spec.gpus_per_replica[list(tier.pools)]
    return np.asarray(np.where(prices.sum() > 0, prices, 1.0) * gpus)
