"""What a trained policy costs its owner: GPU time and the price of misses together, at several prices of a miss.

The bill of an episode is the reward's, ``cost + miss_price * misses`` (envs/reward.py). A price is in force for a whole
episode, so it can be asked for at all prices at once. By bills on validation traffic, and not by test traffic, it is
decided which of two networks ships, by bills on a fleet's own history which of them its owner runs
(`compare_policies`), and by bills on training traffic what a search of offsets keeps
(`rl_autoscale.experiments.offset_search`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_autoscale.agents.export import Layer, forward, read_actor
from rl_autoscale.agents.policy_file import check_schema, constants_of, read_card, read_network
from rl_autoscale.agents.pretrained import policy_folder
from rl_autoscale.envs.constants import Constants
from rl_autoscale.envs.mdp import EpisodeSampler, FleetMdp
from rl_autoscale.envs.observation import price_feature
from rl_autoscale.envs.sampler import HistorySampler, ScenarioSampler
from rl_autoscale.envs.scenario import Scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.spec import TraceSource

FloatArray = npt.NDArray[np.float64]

NUM_PRICES = 7
NUM_WORKLOADS = 1_000_000
"""Traffic is drawn anew for each episode: a few draws, seen at every price, would be learned by heart."""
HISTORY_SPAN_S = 1800.0
"""Length of an episode of a history, as of the benchmark's suites."""
MOST_FLEETS = 16
"""Fleets in memory at a time: at hundreds of requests per second one takes as much as half a gigabyte."""


def prices_of(miss_price: tuple[float, float]) -> FloatArray:
    """Prices that cover a dial's range evenly in their logarithm, or the one that it has."""
    low, high = miss_price
    return np.geomspace(low, high, NUM_PRICES) if low < high else np.array([low])


class PricedEpisodes:
    """One scenario's episodes, at each price so many.

    Args:
        make_mdp: sampler and number of fleets to an MDP.
        sampler: of the episodes.
        prices: shape (num_prices,).
        episodes: at each price.
    """

    def __init__(
        self,
        make_mdp: Callable[[EpisodeSampler, int], FleetMdp],
        sampler: EpisodeSampler,
        prices: FloatArray,
        episodes: int,
    ) -> None:
        self._make_mdp, self._sampler = make_mdp, sampler
        self._episodes, self._num_prices = episodes, len(prices)
        self._price = np.repeat(prices, episodes)
        self.num_steps = 0

    def mean_demand(self, seed: int) -> float:
        """Replicas of its one pool that the work of such episodes takes at full load."""
        mdp = self._make_mdp(self._sampler, min(len(self._price), MOST_FLEETS))
        mdp.reset(seed)
        return float(mdp.ideal_gpus.mean() / mdp.spec.gpus_per_replica[0])

    def bills(
        self,
        layers: list[Layer],
        offsets: FloatArray | None = None,
        constants: Constants | None = None,
        *,
        seed: int,
    ) -> FloatArray:
        """Mean bill at each price in the episodes of a seed.

        Args:
            layers: of the policy.
            offsets: shape (num_prices, num_actions).
            constants: in place of those that ``make_mdp`` gives.
            seed: the same again are the same episodes.

        Returns:
            Shape (num_prices,).
        """
        every = np.arange(len(self._price))
        parts = np.array_split(every, -(-len(every) // MOST_FLEETS))
        shift = None if offsets is None else np.repeat(offsets, self._episodes, axis=0).astype(np.float32)
        found = [
            self._play(layers, self._price[part], None if shift is None else shift[part], constants, (seed, number))
            for number, part in enumerate(parts)
        ]
        return np.asarray(np.concatenate(found).reshape(self._num_prices, self._episodes).mean(axis=1))

    def _play(
        self,
        layers: list[Layer],
        price: FloatArray,
        shift: npt.NDArray[np.float32] | None,
        constants: Constants | None,
        seed: tuple[int, int],
    ) -> FloatArray:
        """Bill of one episode at each of these prices, with these offsets."""
        mdp = self._make_mdp(self._sampler, len(price))
        mdp.constants = mdp.constants if constants is None else constants
        observation = mdp.reset(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        mdp.miss_price[:] = price
        observation[:, mdp.encoder.schema.features.index("miss_price")] = price_feature(price)
        added = np.float32(0.0) if shift is None else shift
        found, ended = np.zeros(mdp.num_fleets), np.zeros(mdp.num_fleets, dtype=np.bool_)
        while not ended.all():
            step = mdp.step(forward(layers, observation, added))
            observation = step.observation
            self.num_steps += mdp.num_fleets
            for e in np.flatnonzero(step.truncated & ~ended):
                book = mdp.books(int(e))
                misses = np.nan_to_num(book["weighted_misses"])  # not a number where nothing arrived
                found[e] = book["cost_over_ideal"] + book["put_off_over_ideal"] + price[e] * misses
            ended |= step.truncated
        return found


@dataclass(frozen=True, slots=True, eq=False)
class ScenarioBills:
    """What each of several policies pays on one scenario.

    Attributes:
        scenario: its name.
        bills: over the ideal GPU time, shape (num_policies, num_prices).
        notes: what is to be told of its traffic, for example a trace that a generator stands in for.
    """

    scenario: str
    bills: FloatArray
    notes: tuple[str, ...] = ()


def compare_policies(
    policies: Sequence[str],
    scenarios: Sequence[Scenario],
    store: TraceSource,
    *,
    episodes: int,
    seed: int,
    history: bool = False,
    report: Callable[[ScenarioBills], None] | None = None,
) -> tuple[FloatArray, list[ScenarioBills]]:
    """Play trained policies as they are deployed, without exploration, in the same episodes.

    Args:
        policies: folders, or ``pretrained/NAME``; the first one's dial gives the prices.
        scenarios: whose validation traffic it is, or history; left out are those that have none.
        store: where traces come from.
        episodes: of each scenario at each price.
        seed: of the episodes.
        history: play the scenarios' history, from the replicas that they begin with, instead of validation traffic.
        report: called after each scenario.

    Returns:
        The prices, shape (num_prices,), and the bills of each scenario.

    Raises:
        SpecError: no scenario has such traffic.
        PolicyFileError: a policy is damaged, or of another schema than a scenario.
    """
    folders = [policy_folder(path) for path in policies]
    cards = [read_card(folder) for folder in folders]
    for card, path in zip(cards, policies, strict=True):
        for item in scenarios:
            check_schema(card, Schema.of(item.fleet), path)
    networks = [read_actor(read_network(*pair)[1]) for pair in zip(folders, cards, strict=True)]
    judged = with_traffic(scenarios, history=history)
    if not judged:
        names = ", ".join(item.name for item in scenarios)
        if history:
            raise SpecError(
                f"no history: {names}; their tests begin with a trace's first second; give them a later slice_s"
            )
        raise SpecError(
            f"no validation traffic: {names}; every training source of theirs holds a trace, which is all for "
            "training; name a scenario with generators"
        )
    low, high = cards[0]["miss_price_range"]
    prices = prices_of((low, high))
    found = []
    for item in judged:
        sampler = (
            HistorySampler(item, store, span_s=HISTORY_SPAN_S)
            if history
            else ScenarioSampler(item, store, num_workloads=NUM_WORKLOADS, validation=True, weighted=False)
        )
        bills = [
            PricedEpisodes(partial(_as_deployed, item, card), sampler, prices, episodes).bills(layers, seed=seed)
            for layers, card in zip(networks, cards, strict=True)
        ]
        found.append(ScenarioBills(item.name, np.array(bills), tuple(sorted(sampler.notes))))
        if report is not None:
            report(found[-1])
    return prices, found


def with_traffic(scenarios: Sequence[Scenario], *, history: bool) -> list[Scenario]:
    """Those that have a history, or validation traffic."""
    return [item for item in scenarios if (item.history is not None if history else item.validation_sources)]


def mean_changes(found: Sequence[ScenarioBills]) -> FloatArray:
    """Geometric mean over scenarios of each policy's bill over the first one's, less 1: (num_policies, num_prices)."""
    return np.asarray(np.exp(np.mean([np.log(item.bills / item.bills[0]) for item in found], axis=0)) - 1.0)


def _as_deployed(scenario: Scenario, card: dict[str, Any], sampler: EpisodeSampler, num_fleets: int) -> FleetMdp:
    """With the policy's own refusal and constants."""
    return FleetMdp(
        scenario.fleet,
        scenario.shield,
        sampler,
        num_fleets=num_fleets,
        refuse=bool(card["refuse"]),
        constants=constants_of(card),
    )
