"""What each part of the learner is worth: the same training without it, on validation traffic.

    python benchmarks/ablations.py                                      # hours of one core
    python benchmarks/ablations.py --timesteps 20000 --seeds 1          # a look

One network for a few scenarios of one pool, trained with everything and with one part left out at a time: an action
held where it does nothing, features that stay 0, a law that does not hold, a critic that does not see the traffic to
come, fleets that are exactly as their profile says, a beginning elsewhere than at the rule. And with something added:
quantiles of the demand to come, forecast by a network that was taught them first, or the demand to come itself, which
nobody can know: no forecast is worth more. Judged without exploration by what a fleet's owner pays, GPU time and the
price of misses together, at several settings of the dial. Seeds are paired: a variant is compared with the whole of its
own seed. Resumes where it stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from rl_autoscale.agents.export import Layer
from rl_autoscale.agents.ppo import PpoConfig, TrainingProgress, policy_layers, train_ppo
from rl_autoscale.envs.constants import Constants
from rl_autoscale.envs.foresight import HORIZONS_S
from rl_autoscale.envs.mdp import EpisodeSetup, FleetMdp, MdpStep
from rl_autoscale.envs.observation import LIMIT, Anchors, ObservationEncoder
from rl_autoscale.envs.sampler import ScenarioSampler
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.capacity import resumed
from rl_autoscale.experiments.dial import play
from rl_autoscale.experiments.runs import write_text
from rl_autoscale.fleet.admission import SELECTIVITY
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
        selective: whether refusal weighs requests by their work.
        moved: actions and where zero leads, at which training begins; without, it leads to the demand rule.
        randomised: whether iterations and start-ups in training differ from what the profile and the spec say.
        added: features that are appended: nothing, ``forecast`` or ``truth`` of the demand to come.
    """

    unseen: tuple[str, ...] = ()
    held: tuple[tuple[str, float], ...] = ()
    foresight: bool = True
    capped: bool = True
    corrected: bool = True
    selective: bool = True
    moved: tuple[tuple[str, float], ...] = ()
    randomised: bool = True
    added: Literal["", "forecast", "truth"] = ""


HISTORY = ("demand_window", "demand_slow", "demand_slowest", "demand_trend", "demand_peak", "demand_spread")
STARTS = ("starting", "oldest_start", "newest_start", "asked_for")
LATENCIES = ("itl", "queue_wait", "oldest_wait", "ttft_mean", "ttft_p95", "tpot_p95", "unmet", "refused", "dropped")
VARIANTS = {
    WHOLE: Variant(),
    "critic without foresight": Variant(foresight=False),
    "no floor under the headroom": Variant(held=(("floor", -1.0),)),
    "no batch cap": Variant(capped=False),
    "no correction of refusal": Variant(unseen=("correction",), corrected=False),
    "no weighing by work": Variant(selective=False),
    "no say in refusal (what should miss is refused)": Variant(held=(("admission", 0.0),)),
    "no refusal": Variant(held=(("admission", 1.0),)),
    "demand of the last 30 s only": Variant(unseen=HISTORY),
    "starts under way unseen": Variant(unseen=STARTS),
    "latencies and misses unseen": Variant(unseen=LATENCIES),
    "every fleet as its profile says": Variant(randomised=False),
    "no start at the rule": Variant(moved=(("headroom", 0.6), ("floor", 0.6), ("admission", 0.6))),
    "added: quantiles of a forecast": Variant(added="forecast"),
    "added: the demand to come": Variant(added="truth"),
}

NUM_HORIZONS = len(HORIZONS_S)
QUANTILES = (0.1, 0.5, 0.9)
NUM_ADDED = {"": 0, "forecast": NUM_HORIZONS * len(QUANTILES), "truth": NUM_HORIZONS}
FORECAST_STEPS, FORECAST_PASSES, FORECAST_BATCH = 1200, 12, 1024
"""Control steps of every fleet that a forecast is learned from, passes over them, and rows of a minibatch."""

Forecast = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""Observations (n, num_features) to quantiles (n, NUM_HORIZONS * len(QUANTILES))."""


class AblatedEncoder(ObservationEncoder):
    """An encoder whose anchors leave laws out; arguments as there."""

    def __init__(self, scenario: Scenario, batch_shape: tuple[int, ...], variant: Variant) -> None:
        super().__init__(scenario.fleet, batch_shape)
        self._variant = variant
        names = tuple(f"added.{k}" for k in range(NUM_ADDED[variant.added]))
        self.schema = replace(self.schema, features=(*self.schema.features, *names))

    def anchors(self) -> Anchors:
        """As there."""
        anchors = super().anchors()
        in_flight = anchors.in_flight if self._variant.capped else np.full_like(anchors.in_flight, np.inf)
        admission = anchors.admission if self._variant.corrected else np.ones_like(anchors.admission)
        return replace(anchors, in_flight=in_flight, admission=admission)


class AblatedMdp(FleetMdp):
    """A fleet MDP of which a part is out of reach, or to which one is added; arguments as there."""

    def __init__(
        self, scenario: Scenario, sampler: Any, variant: Variant, num_fleets: int, forecast: Forecast | None = None
    ) -> None:
        constants = Constants(selectivity=SELECTIVITY if variant.selective else 0.0)
        super().__init__(scenario.fleet, scenario.shield, sampler, num_fleets=num_fleets, constants=constants)
        self._added, self._forecast = variant.added, forecast
        self.encoder = AblatedEncoder(scenario, (num_fleets,), variant)
        schema = Schema.of(scenario.fleet)
        self._unseen = [k for k, name in enumerate(schema.features) if name.split(".")[-1] in variant.unseen]
        held = dict(variant.held)
        known = {name.split(".")[-1] for name in (*schema.features, *schema.actions)}
        if unknown := {*variant.unseen, *held, *dict(variant.moved)} - known:
            raise SpecError(f"nothing is called {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
        self._held = {k: held[end] for k, name in enumerate(schema.actions) if (end := name.split(".")[-1]) in held}
        moved = dict(variant.moved)
        self._moved = np.array([moved.get(name.split(".")[-1], 0.0) for name in schema.actions], dtype=np.float32)

    def reset(self, seed: int) -> npt.NDArray[np.float32]:
        """As there."""
        return self._seen(super().reset(seed), slice(None))

    def reset_fleets(self, which: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        """As there."""
        return self._seen(super().reset_fleets(which), which)

    def step(self, action: npt.NDArray[np.floating]) -> MdpStep:
        """As there."""
        action = np.clip(action, -1.0, 1.0)
        action = self._moved + action * np.where(action >= 0, 1.0 - self._moved, 1.0 + self._moved)  # -1 and 1 stay
        for k, value in self._held.items():
            action[:, k] = value
        step = super().step(action)
        return replace(step, observation=self._seen(step.observation, slice(None)))

    def to_come(self, which: Any = slice(None)) -> npt.NDArray[np.float32]:
        """True demand between one horizon and the next over the demand now, log2: (num_fleets, NUM_HORIZONS).

        In replicas as fast as the fleet's, not as its profile says: so it tells of both.
        """
        return self.foresight()[which, :NUM_HORIZONS]

    def _seen(self, observation: npt.NDArray[np.float32], which: Any) -> npt.NDArray[np.float32]:
        observation = observation.copy()
        observation[:, self._unseen] = 0.0
        if self._added == "truth":
            return np.concatenate([observation, self.to_come(which)], axis=-1)
        if self._added == "forecast" and self._forecast is not None:
            return np.concatenate([observation, self._forecast(observation)], axis=-1)
        return observation


def learned_forecast(key: str, scenarios: list[Scenario], store: TraceStore, seed: int) -> Forecast:
    """Quantiles of the demand to come, taught on training traffic under the demand rule by the pinball loss.

    Prints what it is worth on validation traffic: its loss over that of knowing only how demand changes on the whole.
    """
    seen, target = _watched(scenarios, store, seed, validation=False)
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Linear(seen.shape[1], 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(),
        torch.nn.Linear(64, NUM_ADDED["forecast"]),
    )  # fmt: skip
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(FORECAST_PASSES):
        for rows in torch.randperm(len(seen)).split(FORECAST_BATCH):
            optimiser.zero_grad()
            pinball(net(seen[rows]), target[rows]).backward()
            optimiser.step()
    net.eval()
    fresh, truth = _watched(scenarios, store, seed, validation=True)
    constant = torch.quantile(target, torch.tensor(QUANTILES), dim=0).T.reshape(1, -1).expand(len(fresh), -1)
    with torch.no_grad():
        worth = [float(pinball(net(fresh), truth, k) / pinball(constant, truth, k)) for k in range(NUM_HORIZONS)]
    told = ", ".join(f"{horizon_s:g} s {ratio:.2f}" for horizon_s, ratio in zip(HORIZONS_S, worth, strict=True))
    print(f"{key}: pinball loss on validation traffic over that of constant quantiles: {told}", file=sys.stderr)

    def forecast(observation: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            return np.clip(net(torch.from_numpy(observation)).numpy(), -LIMIT, LIMIT)

    return forecast


def pinball(predicted: torch.Tensor, target: torch.Tensor, horizon: int | None = None) -> torch.Tensor:
    """Mean pinball loss of quantiles (n, NUM_HORIZONS * len(QUANTILES)) of a target (n, NUM_HORIZONS)."""
    error = target[..., None] - predicted.reshape(len(target), NUM_HORIZONS, len(QUANTILES))
    shares = torch.tensor(QUANTILES)
    loss = torch.maximum(shares * error, (shares - 1.0) * error)
    return loss.mean() if horizon is None else loss[:, horizon].mean()


def _watched(
    scenarios: list[Scenario], store: TraceStore, seed: int, *, validation: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations under the demand rule and the demand that came."""
    seen, target = [], []
    for item in scenarios:
        sampler = ScenarioSampler(item, store, MISS_PRICE, 64, validation=validation)
        mdp = AblatedMdp(item, sampler, Variant(), 8)
        observation = mdp.reset(seed)
        for _ in range(FORECAST_STEPS // 8 if validation else FORECAST_STEPS):
            seen.append(observation)
            target.append(mdp.to_come())
            step = mdp.step(np.zeros((8, mdp.decoder.num_actions), np.float32))
            observation = step.observation
            if step.truncated.any():
                observation[step.truncated] = mdp.reset_fleets(step.truncated)
    return torch.from_numpy(np.concatenate(seen)), torch.from_numpy(np.concatenate(target))


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
                variant = VARIANTS[name]
                forecast = learned_forecast(key, scenarios, store, seed) if variant.added == "forecast" else None
                layers = trained(key, variant, scenarios, store, asked.timesteps, seed, forecast)
                data["bills"][key] = [
                    judged(layers, variant, item, store, price, asked.episodes, forecast)
                    for item in scenarios
                    for price in PRICES
                ]
                write_text(path, json.dumps(data, indent=2))
                gc.collect()  # a training's model and fleets refer to each other
    print(table(data["bills"], names, asked.seeds))


def trained(
    key: str,
    variant: Variant,
    scenarios: list[Scenario],
    store: TraceStore,
    timesteps: int,
    seed: int,
    forecast: Forecast | None,
) -> list[Layer]:
    """The actor of one training."""
    share = NUM_FLEETS // len(scenarios)

    def sampler_of(scenario: Scenario) -> Callable[[int], EpisodeSetup]:
        sampler = ScenarioSampler(scenario, store, MISS_PRICE, 64)
        return sampler if variant.randomised else lambda seed: replace(sampler(seed), speed=1.0, startup_scale=1.0)

    mdps = [AblatedMdp(item, sampler_of(item), variant, share, forecast) for item in scenarios]
    config = PpoConfig(
        total_timesteps=timesteps, num_fleets=share * len(scenarios), rollout_steps=96, minibatch_size=512,
        num_epochs=8, entropy_coefficient=0.0005, gamma=0.98, gae_lambda=0.94, seed=seed,
        foresight_critic=variant.foresight,
    )  # fmt: skip

    def report(progress: TrainingProgress) -> None:
        print(f"{key}: {progress.timesteps:,} steps, {progress.steps_per_s:.0f}/s    ", end="\r", file=sys.stderr)

    return policy_layers(train_ppo(mdps, config, report=report).policy)


def judged(
    layers: list[Layer],
    variant: Variant,
    scenario: Scenario,
    store: TraceStore,
    price: float,
    episodes: int,
    forecast: Forecast | None,
) -> dict[str, float]:
    """Means over episodes of validation traffic: cost over ideal, attainment, and the bill of both at this price."""
    sampler = ScenarioSampler(scenario, store, num_workloads=episodes, validation=True)

    def at_price(seed: int) -> EpisodeSetup:
        return replace(sampler(seed), miss_price=price)

    books = play(layers, AblatedMdp(scenario, at_price, variant, episodes, forecast), seed=0)
    cost = float(np.nanmean([book["cost_over_ideal"] for book in books]))
    attainment = float(np.nanmean([book["slo_attainment"] for book in books]))
    return {"cost": cost, "attainment": attainment, "bill": cost + price * (1.0 - attainment)}


def table(bills: dict[str, list[dict[str, float]]], names: list[str], seeds: int) -> str:
    """How much more a variant pays than the whole, and what it delivers; means over scenarios and prices."""
    lines = [
        "| left out, or added | bill, mean (each seed) | GPU time over ideal | attainment |",
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
