"""What each part of the learner is worth: the same training without it, on validation traffic.

    python benchmarks/ablations.py                                      # an hour and a half of one core
    python benchmarks/ablations.py --timesteps 20000 --seeds 1          # a look

One network for a few scenarios of one pool, trained with everything and with one part left out at a time: an action
held where it does nothing, features that stay 0, a law that does not hold, a critic that does not see the traffic to
come. Judged without exploration by what a fleet's owner pays, GPU time and the price of misses together, at several
settings of the dial. Seeds are paired: a variant is compared with the whole of its own seed. Resumes where it stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_autoscale.agents.export import Layer
from rl_autoscale.agents.ppo import PpoConfig, TrainingProgress, policy_layers, train_ppo
from rl_autoscale.envs.mdp import EpisodeSetup, FleetMdp, MdpStep
from rl_autoscale.envs.observation import Anchors, ObservationEncoder
from rl_autoscale.envs.sampler import ScenarioSampler
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.capacity import resumed
from rl_autoscale.experiments.dial import play
from rl_autoscale.experiments.runs import write_text
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.store import TraceStore

PRICES = (5.0, 20.0, 60.0)
MISS_PRICE = (3.0, 120.0)
NUM_FLEETS = 32
WHOLE = "everything"


@dataclass(frozen=True, slots=True)
class Variant:
    """A training with something left out.

    Attributes:
        unseen: features that stay 0, by the ends of their names.
        held: actions and where they are held.
        foresight: whether the critic sees the traffic to come.
        capped: whether the batch cap is what meets the SLOs, and not the engine's limit.
        corrected: whether strictness is relative to what refusal was found to be off by.
    """

    unseen: tuple[str, ...] = ()
    held: tuple[tuple[str, float], ...] = ()
    foresight: bool = True
    capped: bool = True
    corrected: bool = True


HISTORY = ("demand_window", "demand_slow", "demand_slowest", "demand_trend", "demand_peak", "demand_spread")
STARTS = ("starting", "oldest_start", "newest_start", "asked_for")
LATENCIES = ("itl", "queue_wait", "oldest_wait", "ttft_mean", "ttft_p95", "tpot_p95", "unmet", "refused", "dropped")
VARIANTS = {
    WHOLE: Variant(),
    "critic without foresight": Variant(foresight=False),
    "no floor under the headroom": Variant(held=(("floor", -1.0),)),
    "no batch cap": Variant(capped=False),
    "no correction of refusal": Variant(unseen=("correction",), corrected=False),
    "no say in refusal (what should miss is refused)": Variant(held=(("admission", 0.0),)),
    "no refusal": Variant(held=(("admission", 1.0),)),
    "demand of the last 30 s only": Variant(unseen=HISTORY),
    "starts under way unseen": Variant(unseen=STARTS),
    "latencies and misses unseen": Variant(unseen=LATENCIES),
}


class AblatedEncoder(ObservationEncoder):
    """An encoder whose anchors leave laws out; arguments as there."""

    def __init__(self, scenario: Scenario, batch_shape: tuple[int, ...], variant: Variant) -> None:
        super().__init__(scenario.fleet, batch_shape)
        self._variant = variant

    def anchors(self) -> Anchors:
        """As there."""
        anchors = super().anchors()
        in_flight = anchors.in_flight if self._variant.capped else np.full_like(anchors.in_flight, np.inf)
        admission = anchors.admission if self._variant.corrected else np.ones_like(anchors.admission)
        return replace(anchors, in_flight=in_flight, admission=admission)


class AblatedMdp(FleetMdp):
    """A fleet MDP of which a part is out of reach; arguments as there."""

    def __init__(self, scenario: Scenario, sampler: Any, variant: Variant, num_fleets: int) -> None:
        super().__init__(scenario.fleet, scenario.shield, sampler, num_fleets=num_fleets)
        self.encoder = AblatedEncoder(scenario, (num_fleets,), variant)
        schema = Schema.of(scenario.fleet)
        self._unseen = [k for k, name in enumerate(schema.features) if name.split(".")[-1] in variant.unseen]
        held = dict(variant.held)
        known = {name.split(".")[-1] for name in (*schema.features, *schema.actions)}
        if unknown := {*variant.unseen, *dict(variant.held)} - known:
            raise SpecError(f"nothing is called {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
        self._held = {k: held[end] for k, name in enumerate(schema.actions) if (end := name.split(".")[-1]) in held}

    def reset(self, seed: int) -> npt.NDArray[np.float32]:
        """As there."""
        return self._seen(super().reset(seed))

    def reset_fleets(self, which: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        """As there."""
        return self._seen(super().reset_fleets(which))

    def step(self, action: npt.NDArray[np.floating]) -> MdpStep:
        """As there."""
        action = np.array(action)
        for k, value in self._held.items():
            action[:, k] = value
        step = super().step(action)
        return replace(step, observation=self._seen(step.observation))

    def _seen(self, observation: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        observation = observation.copy()
        observation[:, self._unseen] = 0.0
        return observation


def main() -> None:
    """Train, judge, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=["bursty", "chatbot", "sudden-burst", "cold-start-300s"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--timesteps", type=int, default=150_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=16, help="of validation traffic per scenario and price")
    parser.add_argument("--traces", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    asked = parser.parse_args()
    if len(asked.scenarios) > NUM_FLEETS:
        parser.error(f"{len(asked.scenarios)} scenarios for {NUM_FLEETS} fleets; name fewer")
    names = asked.variants if WHOLE in asked.variants else [WHOLE, *asked.variants]
    scenarios = [load_scenario(name) for name in asked.scenarios]
    store = TraceStore(asked.traces)
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "bills.json"
    question = {"scenarios": asked.scenarios, "timesteps": asked.timesteps, "episodes": asked.episodes}
    question |= {"prices": list(PRICES), "traces": [str(folder) for folder in asked.traces]}
    data = resumed(path, question, "bills")
    for seed in range(asked.seeds):
        for name in names:
            key = f"{name}, seed {seed}"
            if key not in data["bills"]:
                layers = trained(key, VARIANTS[name], scenarios, store, asked.timesteps, seed)
                data["bills"][key] = [
                    judged(layers, VARIANTS[name], item, store, price, asked.episodes)
                    for item in scenarios
                    for price in PRICES
                ]
                write_text(path, json.dumps(data, indent=2))
                gc.collect()  # a training's model and fleets refer to each other
    print(table(data["bills"], names, asked.seeds))


def trained(
    key: str, variant: Variant, scenarios: list[Scenario], store: TraceStore, timesteps: int, seed: int
) -> list[Layer]:
    """The actor of one training."""
    share = NUM_FLEETS // len(scenarios)
    mdps = [AblatedMdp(item, ScenarioSampler(item, store, MISS_PRICE, 64), variant, share) for item in scenarios]
    config = PpoConfig(
        total_timesteps=timesteps, num_fleets=share * len(scenarios), rollout_steps=96, minibatch_size=512,
        num_epochs=8, entropy_coefficient=0.0005, gamma=0.98, gae_lambda=0.94, seed=seed,
        foresight_critic=variant.foresight,
    )  # fmt: skip

    def report(progress: TrainingProgress) -> None:
        print(f"{key}: {progress.timesteps:,} steps, {progress.steps_per_s:.0f}/s    ", end="\r", file=sys.stderr)

    return policy_layers(train_ppo(mdps, config, report=report).policy)


def judged(
    layers: list[Layer], variant: Variant, scenario: Scenario, store: TraceStore, price: float, episodes: int
) -> dict[str, float]:
    """Means over episodes of validation traffic: cost over ideal, attainment, and the bill of both at this price."""
    sampler = ScenarioSampler(scenario, store, num_workloads=episodes, validation=True)

    def at_price(seed: int) -> EpisodeSetup:
        return replace(sampler(seed), miss_price=price)

    books = play(layers, AblatedMdp(scenario, at_price, variant, episodes), seed=0)
    cost = float(np.nanmean([book["cost_over_ideal"] for book in books]))
    attainment = float(np.nanmean([book["slo_attainment"] for book in books]))
    return {"cost": cost, "attainment": attainment, "bill": cost + price * (1.0 - attainment)}


def table(bills: dict[str, list[dict[str, float]]], names: list[str], seeds: int) -> str:
    """How much more a variant pays than the whole, and what it delivers; means over scenarios and prices."""
    lines = [
        "| left out | bill, mean (each seed) | GPU time over ideal | attainment |",
        "|---|---:|---:|---:|",
    ]
    for name in names:
        runs = [bills[f"{name}, seed {seed}"] for seed in range(seeds)]
        ratios = []
        for seed, run in enumerate(runs):
            whole = bills[f"{WHOLE}, seed {seed}"]
            ratios.append(np.mean([math.log(a["bill"] / b["bill"]) for a, b in zip(run, whole, strict=True)]))
        shown = ", ".join(f"{np.expm1(ratio):+.1%}" for ratio in ratios)
        change = "" if name == WHOLE else f"{np.expm1(np.mean(ratios)):+.1%} ({shown})"
        cost, attainment = (np.mean([[item[key] for item in run] for run in runs]) for key in ("cost", "attainment"))
        lines.append(f"| {'nothing' if name == WHOLE else name} | {change} | {cost:.2f} | {attainment:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
