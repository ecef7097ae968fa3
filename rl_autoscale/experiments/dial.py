"""A trained policy's dial: what it delivers at several prices of a miss, on validation traffic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from rl_autoscale.agents.export import Layer, forward
from rl_autoscale.envs.mdp import EpisodeSampler, EpisodeSetup, FleetMdp
from rl_autoscale.envs.sampler import ScenarioSampler
from rl_autoscale.envs.scenario import Scenario
from rl_autoscale.workload.spec import TraceSource

DIAL_PRICES = 7
DIAL_EPISODES = 8
DIAL_METRICS = ("slo_attainment", "cost_over_ideal")

MakeMdp = Callable[[Scenario, EpisodeSampler, int], FleetMdp]
"""Scenario, sampler and number of fleets to an MDP."""


def measure_dial(
    layers: list[Layer],
    scenarios: Sequence[Scenario],
    store: TraceSource,
    make_mdp: MakeMdp,
    miss_price: tuple[float, float],
    *,
    seed: int,
) -> list[dict[str, float]]:
    """What a policy delivers at several prices, on validation traffic.

    Args:
        layers: the policy's network.
        scenarios: of one schema.
        store: where traces come from.
        make_mdp: as the policy is deployed.
        miss_price: range of the dial.
        seed: of the episodes.

    Returns:
        Per price ``miss_price``, and ``slo_attainment`` (of several classes each one's as well) and
        ``cost_over_ideal``: means over episodes, and of these the median over the scenarios that have validation
        traffic (where bursts end before a replica has started, no price buys an attainment: a mean would push the dial
        to its end for all). Nothing where none has any.
    """
    measured = [
        (item, ScenarioSampler(item, store, num_workloads=DIAL_EPISODES, validation=True))
        for item in scenarios
        if item.validation_sources
    ]
    if not measured:
        return []
    points = []
    for price in np.geomspace(*miss_price, DIAL_PRICES).tolist():
        means = []
        for scenario, sampler in measured:
            books = play(layers, make_mdp(scenario, partial(_at_price, sampler, price), DIAL_EPISODES), seed)
            names = [name for name in books[0] if name.startswith(DIAL_METRICS)]
            means.append([np.nanmean([book[name] for book in books]) for name in names])
        typical = zip(names, np.nanmedian(np.array(means), axis=0), strict=True)
        known = {name: round(float(value), 5) for name, value in typical if np.isfinite(value)}
        points.append({"miss_price": round(price, 3), **known})
    return points


def _at_price(sampler: ScenarioSampler, miss_price: float, seed: int) -> EpisodeSetup:
    return replace(sampler(seed), miss_price=miss_price, miss_weight=None)


def play(layers: list[Layer], mdp: FleetMdp, seed: int) -> list[dict[str, float]]:
    """One episode in every fleet, without exploration; the books at each one's end."""
    observation = mdp.reset(seed)
    books: dict[int, dict[str, float]] = {}
    while len(books) < mdp.num_fleets:
        step = mdp.step(forward(layers, observation))
        observation = step.observation
        for e in np.flatnonzero(step.truncated):
            books.setdefault(int(e), mdp.books(int(e)))
    return list(books.values())
