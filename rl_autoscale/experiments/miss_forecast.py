"""The miss forecast: what share of the requests of the next minutes a trained policy will miss at each price.

A price of misses buys much in smooth traffic and little in bursts, so no table says which price delivers an attainment
on traffic that nobody has seen. This network does: after training the policy is played on training traffic at prices
that change now and then, what was missed in the minutes after each observation is counted, and a small network learns
the share of each class from the observation, price and weights included. The *horizon* is ten minutes; three start-ups
where these take longer, before which a price has bought nothing; or as long as a class may wait for its first token, up
to half an hour. The network is exported beside the policy as the ONNX output ``miss_share``, and turns the dial at run
time (agents/dials.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rl_autoscale.agents.export import Layer, forward
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.observation import price_feature
from rl_autoscale.envs.sampler import ScenarioSampler, draw_weights
from rl_autoscale.envs.scenario import Scenario
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.rng import stream
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.workload.spec import TraceSource

Array = npt.NDArray[Any]

HORIZON_S = 600.0
HORIZON_STARTUPS = 3.0
LONGEST_WAIT_S = 1800.0
KEPT_HORIZONS = 2
"""For so many horizons a price stays: half of its observations are followed by a whole one at that price."""
EPISODE_HORIZONS = 4
NUM_FLEETS = 8
"""Played at once; every episode has traffic of its own."""
OBSERVATIONS = 16_000
OBSERVATIONS_PER_SCENARIO = 4_000
"""So many are played, whichever is more of the two; but no more than this share of the training's own steps, and one
episode in every fleet at least:"""
SHARE_OF_TRAINING = 0.25
HELD_OUT = 4
"""Of so many fleets one is not learned from: it tells when to stop."""
HIDDEN = 64
EPOCHS = 40
MINIBATCH = 1024
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Observations and what came of them.

    Attributes:
        observation: shape (num_samples, num_features).
        share: misses over arrivals of each class in the horizon after it, shape (num_samples, num_classes).
        weight: the class's arrivals over their mean in what was played together; of that shape.
        held_out: whether it is not learned from.
    """

    observation: Array
    share: Array
    weight: Array
    held_out: Array

    @staticmethod
    def join(parts: Sequence[Outcomes]) -> Outcomes:
        """All of them."""
        names = ("observation", "share", "weight", "held_out")
        return Outcomes(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def play_policy(
    layers: list[Layer],
    scenarios: Sequence[Scenario],
    store: TraceSource,
    make_mdp: Callable[[Scenario, ScenarioSampler, int], FleetMdp],
    miss_price: tuple[float, float],
    *,
    timesteps: int,
    seed: int,
) -> tuple[Outcomes | None, set[str]]:
    """Play a policy on training traffic, as it is deployed, at prices that change now and then.

    Args:
        layers: of its actor.
        scenarios: it was trained on.
        store: where traces come from.
        make_mdp: makes the training's MDP of a scenario, a sampler and a number of fleets.
        miss_price: range of the prices; the weights of several classes are drawn as in training.
        timesteps: of the training.
        seed: of the training.

    Returns:
        What it saw and what came of it, None where no traffic is as long as a horizon; and notes on the traffic.
    """
    enough = max(OBSERVATIONS, OBSERVATIONS_PER_SCENARIO * len(scenarios))
    observations = min(enough, SHARE_OF_TRAINING * timesteps) / len(scenarios)
    parts, notes = [], set()
    for scenario in scenarios:
        span_s = EPISODE_HORIZONS * horizon_s(scenario.fleet)
        at_once = NUM_FLEETS * span_s / scenario.fleet.control_interval_s
        for number in range(max(math.ceil(observations / at_once), 1)):
            sampler = ScenarioSampler(scenario, store, num_workloads=1_000_000, span_s=span_s)
            mdp = make_mdp(scenario, sampler, NUM_FLEETS)
            try:
                parts.append(play_at_changing_prices(layers, mdp, miss_price, seed + 1000 * number))
            except SpecError as error:  # a draw without requests: a training of hours is not lost for it
                notes.add(f"miss forecast: traffic of {scenario.name} was left out ({error})")
            notes |= sampler.notes
    return (Outcomes.join(parts) if any(len(part.observation) for part in parts) else None), notes


def horizon_s(spec: FleetSpec) -> float:
    """How far a forecast for this fleet looks ahead."""
    wait_s = min(max(item.ttft_slo_s for item in spec.classes), LONGEST_WAIT_S)
    return max(HORIZON_S, HORIZON_STARTUPS * max(pool.startup_mean_s for pool in spec.pools), wait_s)


def play_at_changing_prices(layers: list[Layer], mdp: FleetMdp, miss_price: tuple[float, float], seed: int) -> Outcomes:
    """One episode in every fleet: its observations and what came of them; arguments as for `play_policy`."""
    horizon_steps = max(round(horizon_s(mdp.spec) / mdp.spec.control_interval_s), 1)
    num_steps, kept_steps = EPISODE_HORIZONS * horizon_steps, KEPT_HORIZONS * horizon_steps
    rng = stream(seed, "miss-forecast")
    low, high = np.log(miss_price)
    features, num_classes = mdp.encoder.schema.features, len(mdp.spec.classes)
    price_column = features.index("miss_price")
    weight_columns = [k for k, name in enumerate(features) if name.endswith(".miss_weight")]
    observation = mdp.reset(seed)
    seen = np.zeros((num_steps, *observation.shape), dtype=np.float32)
    missed, arrived = (np.zeros((num_steps, mdp.num_fleets, num_classes)) for _ in range(2))
    playing = np.zeros((num_steps, mdp.num_fleets))
    offset = rng.integers(0, kept_steps, mdp.num_fleets)  # prices do not change everywhere at once
    since_change = (np.arange(num_steps)[:, None] + offset) % kept_steps
    still = np.ones(mdp.num_fleets, dtype=bool)
    for t in range(num_steps):
        changes = (since_change[t] == 0) | (t == 0)
        mdp.miss_price[changes] = np.exp(rng.uniform(low, high, int(changes.sum())))
        observation[:, price_column] = price_feature(mdp.miss_price)
        if weight_columns:
            for e in np.flatnonzero(changes):
                mdp.miss_weight[e] = draw_weights(rng, num_classes)
            observation[:, weight_columns] = price_feature(mdp.miss_weight)
        seen[t], playing[t] = observation, still
        before = mdp.batch.missed(), mdp.batch.ledger("arrived")
        step = mdp.step(forward(layers, observation))
        missed[t], arrived[t] = mdp.batch.missed() - before[0], mdp.batch.ledger("arrived") - before[1]
        observation = step.observation
        still = still & ~step.truncated
        if not still.any():
            break
    return _outcomes(seen, missed, arrived, playing, since_change, kept_steps, horizon_steps)


def _outcomes(
    seen: Array, missed: Array, arrived: Array, playing: Array, since_change: Array, kept_steps: int, horizon_steps: int
) -> Outcomes:
    """The observations after which a whole horizon was played at their price; arrays of shape (steps, fleets, ...)."""
    steps, num_fleets, num_classes = missed.shape
    sums = [
        np.concatenate((np.zeros((1, num_fleets, num_classes)), np.cumsum(item * playing[..., None], axis=0)))
        for item in (missed, arrived)
    ]
    ends = np.minimum(np.arange(steps) + horizon_steps, steps)
    misses, arrivals = (item[ends] - item[:-1] for item in sums)
    played = np.concatenate((np.zeros((1, num_fleets)), np.cumsum(playing, axis=0)))
    whole = (played[ends] - played[:-1] == horizon_steps) & (since_change <= kept_steps - horizon_steps)
    whole &= arrivals.sum(axis=-1) > 0
    held_out = np.broadcast_to(np.arange(num_fleets) % HELD_OUT == HELD_OUT - 1, whole.shape)
    misses, arrivals = misses[whole], arrivals[whole]
    mean = np.maximum(arrivals.mean(axis=0) if whole.any() else 1.0, 1e-9)
    # A request that came before the observation may be missed after it: the share is cut at 1.
    share = np.minimum(misses / np.maximum(arrivals, 1.0), 1.0)
    return Outcomes(seen[whole], share, arrivals / mean, held_out[whole])


def learn_misses(outcomes: Outcomes, seed: int) -> list[Layer] | None:
    """Layers of a tanh MLP from the observation to the logit of each class's share; None without anything to hold out.

    Fitted by cross-entropy, weighted with arrivals; the epoch counts that was best on the fleets held out.
    """
    if outcomes.held_out.all() or not outcomes.held_out.any():
        return None
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(seed)
    observation = torch.as_tensor(outcomes.observation, dtype=torch.float32)
    share, weight = (torch.as_tensor(item, dtype=torch.float32) for item in (outcomes.share, outcomes.weight))
    held_out = torch.as_tensor(outcomes.held_out)
    sizes = (observation.shape[1], HIDDEN, HIDDEN, share.shape[1])
    network = torch.nn.Sequential()
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        layer = torch.nn.Linear(inputs, outputs)
        with torch.no_grad():
            torch.nn.init.xavier_uniform_(layer.weight, generator=random)
            layer.bias.zero_()
        network.append(layer)
        if number < len(sizes) - 2:
            network.append(torch.nn.Tanh())
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-5)
    learned_from = torch.nonzero(~held_out)[:, 0]

    def loss(which: torch.Tensor) -> torch.Tensor:
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            network(observation[which]), share[which], reduction="none"
        )
        return (weight[which] * each).mean()

    best, least = network.state_dict(), float("inf")
    for _ in range(EPOCHS):
        shuffled = learned_from[torch.randperm(len(learned_from), generator=random)]
        for chosen in torch.split(shuffled, MINIBATCH):
            optimiser.zero_grad()
            loss(chosen).backward()  # type: ignore[no-untyped-call,unused-ignore]
            optimiser.step()
        with torch.no_grad():
            now = float(loss(torch.nonzero(held_out)[:, 0]))
        if now < least:
            best, least = {name: value.clone() for name, value in network.state_dict().items()}, now
    network.load_state_dict(best)
    linear = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
    return [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]
