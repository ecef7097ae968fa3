"""The search behind every capacity: the highest rate that keeps a promise, and the file that it goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rl_autoscale.envs.scenario import Scenario
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.rng import stream
from rl_autoscale.workload.spec import TraceSource
from rl_autoscale.workload.trace import Workload


@dataclass(frozen=True, slots=True)
class Settings:
    """How carefully it is looked for; results of other settings are not mixed.

    Attributes:
        num_requests: at every rate.
        seeds: of the requests and their gaps; a result is the mean.
        tolerance: relative width at which the search for a rate ends.
    """

    num_requests: int = 10_000
    seeds: int = 3
    tolerance: float = 0.02


def largest_rate(attainment: Callable[[float], float], target: float, tolerance: float) -> float:
    """The highest rate that attains the target, by doubling and bisection; 0 if even one request per minute does not.

    Args:
        attainment: share of requests that meet their SLOs, by rate; falls with the rate.
        target: the share asked for.
        tolerance: relative width at which the search ends.
    """
    low, high = 0.0, 1.0
    while attainment(high) >= target:
        low, high = high, 2.0 * high
    while low == 0.0 and high > 1 / 60:
        if attainment(high / 2.0) >= target:
            low = high / 2.0
        else:
            high /= 2.0
    while low > 0.0 and high > low * (1.0 + tolerance):
        middle = (low + high) / 2.0
        if attainment(middle) >= target:
            low = middle
        else:
            high = middle
    return low


def at_rate(sample: Workload, rate_per_s: float) -> Workload:
    """The same requests and gaps, scaled to another rate; they must come at one per second."""
    arrival_s = sample.arrival_s / rate_per_s
    return Workload(
        arrival_s, sample.prompt_tokens, sample.output_tokens, sample.class_index, sample.class_names,
        float(arrival_s[-1]),
    )  # fmt: skip


def draw_requests(
    scenario: Scenario, store: TraceSource, num_requests: int, seed: int, arrival_cv: float = 1.0
) -> Workload:
    """Requests of the scenario's test traffic in random order, arrivals at one per second; Poisson where CV is 1."""
    traffic = scenario.build_test(seed, store).workload
    rng = stream(seed, f"compare-systems/{scenario.name}")
    chosen = rng.choice(traffic.num_requests, num_requests, replace=traffic.num_requests < num_requests)
    gaps_s = rng.exponential(1.0, num_requests)
    if arrival_cv != 1.0:
        gaps_s = rng.gamma(arrival_cv**-2, arrival_cv**2, num_requests)
    arrival_s = np.cumsum(gaps_s)
    return Workload(
        arrival_s, traffic.prompt_tokens[chosen], traffic.output_tokens[chosen], traffic.class_index[chosen],
        traffic.class_names, float(arrival_s[-1]),
    )  # fmt: skip


def resumed(path: Path, settings: dict[str, Any], *names: str) -> dict[str, Any]:
    """What a run's file holds, or what a new one begins with: its settings, and by each name what was found.

    Raises:
        SpecError: it holds results of other settings.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"settings": settings, **{name: {} for name in names}}
    if path.exists():
        data |= json.loads(path.read_text())
    if data["settings"] != settings:
        raise SpecError(f"{path} holds results of {data['settings']}, asked for {settings}; choose another --out")
    return data
