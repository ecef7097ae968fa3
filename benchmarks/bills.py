"""What trained policies cost their owner, GPU time and the price of misses together, on validation traffic.

    python benchmarks/bills.py pretrained/single-pool runs/mine/policy --traces FOLDER   # a minute or two a scenario
    python benchmarks/bills.py runs/a/policy runs/b/policy --scenarios bursty coder      # a look

By this, and not by test traffic, it is decided which of two networks ships. Played as deployed, without exploration, at
seven prices of a miss, all policies in the same episodes; the bill is the reward's, ``cost + miss_price * misses``
(rl_autoscale/envs/reward.py). Printed: the first policy's bill over the ideal GPU-hours, and the others' change to it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rl_autoscale.agents.export import read_actor
from rl_autoscale.agents.learned import read_card, read_network
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.sampler import ScenarioSampler
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.offset_search import NUM_PRICES, NUM_WORKLOADS, PricedEpisodes
from rl_autoscale.workload.store import TraceStore


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+", help="folders, or pretrained/NAME; all of one schema")
    parser.add_argument("--scenarios", nargs="+", default=[], help="default those the first was trained on")
    parser.add_argument("--episodes", type=int, default=8, help="at each price")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traces", type=Path, nargs="*", default=[])
    asked = parser.parse_args()
    cards = [read_card(Path(path)) for path in asked.policies]
    if len({card["schema"] for card in cards}) > 1:
        parser.error("the policies are of several schemas; compare those of one")
    networks = [read_actor(read_network(Path(path), card)[1]) for path, card in zip(asked.policies, cards, strict=True)]
    low, high = cards[0]["miss_price_range"]
    prices = np.geomspace(low, high, NUM_PRICES)
    store = TraceStore(asked.traces)
    print("| scenario | policy | " + " | ".join(f"{price:.3g}" for price in prices) + " |")
    print("|---|---|" + "---:|" * len(prices))
    logs = []
    for name in asked.scenarios or cards[0]["training"]["scenarios"]:
        scenario = load_scenario(name)
        if Schema.of(scenario.fleet).digest != cards[0]["schema"] or not scenario.validation_sources:
            print(f"| {name} | left out: another schema, or no validation traffic |")
            continue
        bills = [
            episodes_of(scenario, card, store, prices, asked.episodes).bills(layers, seed=asked.seed)
            for layers, card in zip(networks, cards, strict=True)
        ]
        print(f"| {name} | {asked.policies[0]} | " + " | ".join(f"{bill:.2f}" for bill in bills[0]) + " |")
        for path, bill in zip(asked.policies[1:], bills[1:], strict=True):
            print(
                f"| | {path} | " + " | ".join(f"{change:+.1%}" for change in bill / bills[0] - 1.0) + " |", flush=True
            )
        logs.append(np.log(np.array(bills) / bills[0]))
    if not logs:
        parser.error("none of the scenarios fits; name others with --scenarios")
    for path, mean in zip(asked.policies[1:], np.exp(np.mean(logs, axis=0)[1:]) - 1.0, strict=True):
        print(f"| **mean** | {path} | " + " | ".join(f"{change:+.1%}" for change in mean) + " |")


def episodes_of(
    scenario: Scenario, card: dict[str, Any], store: TraceStore, prices: Any, episodes: int
) -> PricedEpisodes:
    """Validation episodes of a scenario, under the policy's own hysteresis and refusal."""
    sampler = ScenarioSampler(scenario, store, num_workloads=NUM_WORKLOADS, validation=True, weighted=False)
    make_mdp = partial(one_mdp, scenario, float(card.get("hysteresis", 0.0)), bool(card["refuse"]))
    return PricedEpisodes(make_mdp, sampler, prices, episodes)


def one_mdp(scenario: Scenario, hysteresis: float, refuse: bool, sampler: ScenarioSampler, num_fleets: int) -> FleetMdp:
    """As the policy is deployed."""
    return FleetMdp(
        scenario.fleet, scenario.shield, sampler, num_fleets=num_fleets, refuse=refuse, hysteresis=hysteresis
    )


if __name__ == "__main__":
    main()
