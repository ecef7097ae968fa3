"""After PPO: what is left to win by moving actions and constants at single prices, found by direct search.

A policy trained for six million steps was found to hold too little where misses are dear, and too much where they are
cheap (docs/learner.md). How an action should depend on the price is slow for PPO to learn: the price is one feature
among fifty, and what a reserve is worth shows in rare bursts only.

It is cheap to see directly. Here the policy is played as it is deployed, twice with common random numbers: with an
*offset* on one action, and without. It is played on training traffic, and, where a policy is adapted to one fleet, on
that fleet's past as well: what its bursts come to, broad training traffic does not say. A price is in force for a whole
episode, so an offset at one price says nothing of the others, and one pair of runs tells of all prices. The bill of an
episode is the reward's, ``cost + miss_price * misses`` (envs/reward.py); bills of one kind of traffic and price are
averaged, and what is compared is the mean over kinds of their logarithms, smoothed over neighbouring prices; the past
weighs three times as much as training traffic, which keeps the policy fit for loads that the past has not had.
For each constant of the policy (envs/constants.py), each class's admission and the batch cap, floor and headroom of
each pool in turn the move with the smallest bill is chosen at each price, and kept where other episodes confirm it:
dear misses are rare, and the best of several trials is partly luck. Then the steps are made smaller, and it begins
again. What pays only together moves of one thing do not find: fleets that keep more and scale less are tried before
them, and *joint moves* of several things, drawn at random and ever smaller, after them.

Offsets of actions between prices are interpolated, and become part of the network (`with_offsets`): a few more units in
each hidden layer. Constants go into the card, a value for each price.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt, PositiveInt

from rl_autoscale.agents.export import Layer
from rl_autoscale.envs.constants import CONSTANTS, MOST, Constants
from rl_autoscale.envs.mdp import EpisodeSampler, FleetMdp
from rl_autoscale.envs.observation import price_feature
from rl_autoscale.envs.sampler import HistorySampler, ScenarioSampler
from rl_autoscale.envs.scenario import Scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.bills import HISTORY_SPAN_S, NUM_WORKLOADS, PricedEpisodes, prices_of, with_traffic
from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.rng import stream
from rl_autoscale.workload.spec import TraceSource

FloatArray = npt.NDArray[np.float64]

FIRST_STEPS = {
    "cap_share": (-1.0, -0.5, 0.5),
    "found_share": (-0.3, 0.3, 0.6, 0.9),
    "least_replicas": (-2.0, 1.0, 1.75, 3.0, 5.0, 9.0),
    "hysteresis": (-0.1, 0.1, 0.3),
    "selectivity": (-0.25, 0.25, 0.5),
    "admission": (-0.6, -0.3, 0.3),
    "batch_cap": (-0.3, 0.3, 0.6),
    "floor": (-0.4, 0.4, 0.8),
    "headroom": (-0.25, 0.25),
}
"""Moves tried in the first round, by constant and action, in the order in which they are searched, halved in every
other; of a cap share octaves, of least replicas multiples of the mean demand, else what is added. Over many scenarios
together admission and batch cap bring next to nothing; on a single one they can bring most."""
FIXED_FLEETS = (1.0, 1.75, 2.5, 3.5, 5.0, 6.5, 9.0)
"""Sizes of a fleet that hardly scales at all, tried before all else where least replicas are searched, in multiples of
the mean demand: so many are kept, and floor and headroom lowered by 1. On ``coder`` every rule ends there, and no move
of one of the three leads there."""
JOINT_STEPS = {
    "found_share": 0.3,
    "least_replicas": 2.0,
    "hysteresis": 0.1,
    "admission": 0.3,
    "batch_cap": 0.3,
    "floor": 0.4,
    "headroom": 0.25,
}
"""Standard deviations of what joint moves begin with; in the same units."""
JOINT_SHARE = 0.5
"""Of actions and constants, those that a joint move changes, on average."""
LAST_JOINT_STEP = 0.25
"""What the last joint move is to the first."""
SAME_AT_ALL_PRICES = ("cap_share", "selectivity")
"""Constants of which one move is chosen for all prices: what differs by price there is mostly the luck of episodes."""
LEAST_GAIN = 0.002
"""An offset that lowers the bill by less than this share is noise, and not kept."""
SMOOTHING = 0.25
"""Weight of each neighbouring price in what an offset is said to gain."""
HISTORY_WEIGHT = 0.75
"""Of a fleet's past beside its training traffic, in what is compared. Weighed alike, the low loads of training traffic
outweighed on ``coder`` what a reserve was worth on its past."""
CARRY = 0.1
"""Scale at which a unit passes another tanh; a value of 1 loses 0.3 %."""

_TRIED, _CONFIRMING = 0, 1


@dataclass(frozen=True, slots=True)
class SearchProgress:
    """How far a search is: runs done, and how many there are at most."""

    runs: int
    most_runs: int


class OffsetSearchConfig(Config):
    """How long to search."""

    rounds: NonNegativeInt = Field(default=2, description="of moves of one action or constant; 0: none")
    episodes: PositiveInt = Field(
        default=8, description="of each scenario at each price; as many others confirm what they say"
    )
    joint_moves: NonNegativeInt = Field(
        default=0, description="after the rounds: moves of several actions and constants at once"
    )
    history: bool = Field(
        default=False,
        description="half as many of the fleet's own past count three times as much, where a scenario has one",
    )

    @property
    def searches(self) -> bool:
        """Whether anything is searched."""
        return self.rounds + self.joint_moves > 0


@dataclass(frozen=True, slots=True, eq=False)
class Offsets:
    """What was found.

    Attributes:
        miss_price: shape (num_prices,), increasing.
        offsets: added to the actions at each price, shape (num_prices, num_actions).
        change: of the bill at each price, as a share, in the episodes that confirmed it; shape (num_prices,).
        num_steps: control steps that were simulated.
        constants: of the policy, those that were searched.
    """

    miss_price: FloatArray
    offsets: FloatArray
    change: FloatArray
    num_steps: int
    constants: Constants = field(default_factory=Constants)

    def to_card(self, schema: Schema) -> dict[str, object]:
        """Entries of a card's ``training`` section."""
        return {
            "offset_search": {
                "miss_price": np.round(self.miss_price, 3).tolist(),
                "change_of_bill": np.round(self.change, 4).tolist(),
                "offsets": {name: np.round(self.offsets[:, k], 3).tolist() for k, name in enumerate(schema.actions)},
                "constants": self.constants.to_card(),
                "timesteps": self.num_steps,
            }
        }


def search_offsets(
    layers: list[Layer],
    scenarios: Sequence[Scenario],
    store: TraceSource,
    make_mdp: Callable[[Scenario, EpisodeSampler, int], FleetMdp],
    constants: Constants,
    config: OffsetSearchConfig,
    *,
    seed: int,
    progress: Callable[[SearchProgress], None] | None = None,
) -> Offsets:
    """Search the offsets of a policy, and its constants.

    Args:
        layers: the policy's network.
        scenarios: of one schema; their training traffic is played, and their history where it is to count.
        store: where traces come from.
        make_mdp: scenario, sampler and number of fleets to an MDP, without telemetry faults.
        constants: that it has; their prices are the dial's range.
        config: how long.
        seed: of the episodes.
        progress: told how far it is.
    """
    prices = prices_of(constants.miss_price)
    fleet = scenarios[0].fleet
    actions = Schema.of(fleet).actions
    names = (*actions, *_constants_to_turn(scenarios))
    players = [
        PricedEpisodes(
            partial(make_mdp, item), ScenarioSampler(item, store, num_workloads=NUM_WORKLOADS), prices, config.episodes
        )
        for item in scenarios
    ]
    players += [
        PricedEpisodes(
            *(partial(make_mdp, item), HistorySampler(item, store, span_s=HISTORY_SPAN_S), prices),
            episodes=-(-config.episodes // 2),
        )
        for item in (with_traffic(scenarios, history=True) if config.history else ())
    ]
    weights = traffic_weights(len(scenarios), len(players) - len(scenarios))
    unit = float(np.mean([player.mean_demand(seed) for player in players])) if "least_replicas" in names else 1.0
    trials = [
        (k, tuple(step * (unit if kind == "least_replicas" else 1.0) / 2.0**number for step in steps))
        for number in range(config.rounds)
        for kind, steps in FIRST_STEPS.items()
        for k, name in enumerate(names)
        if name.split(".")[-1] == kind
    ]
    fixed = _fixed_fleets(names, unit) if config.rounds else np.empty((0, len(names)))
    batches = ([len(fixed)] if len(fixed) else []) + [len(steps) for _, steps in trials] + [1] * config.joint_moves
    most_runs, done = 2 + sum(trials_of + 1 for trials_of in batches), 0

    def bills(moves: FloatArray, episodes: int) -> FloatArray:
        nonlocal done
        offsets, set_to = moves[:, : len(actions)], moved_by(constants, dict(zip(names, moves.T, strict=True)), prices)
        found = np.array([player.bills(layers, offsets, set_to, seed=2 * seed + episodes) for player in players])
        done += 1
        if progress is not None:
            progress(SearchProgress(done, most_runs))
        return found

    best = np.zeros((len(prices), len(names)))
    now, first = bills(best, _TRIED), bills(best, _CONFIRMING)
    confirmed = first

    def consider(steps: FloatArray, *, together: bool = False) -> None:
        """Try steps of shape (num_trials, num_names), all of them at every price, and keep what is confirmed."""
        nonlocal best, now, confirmed
        moved = np.array([best, *(best + step for step in steps)])
        tried = np.array([now, *(bills(moves, _TRIED) for moves in moved[1:])])
        chosen = choose_steps(tried, weights, together=together)
        if not chosen.any():
            return
        candidate = moved[chosen, np.arange(len(prices))]
        again = bills(candidate, _CONFIRMING)
        kept = (choose_steps(np.array([confirmed, again]), weights, together=together) == 1) & (chosen > 0)
        if not together:  # a large move that pays at both neighbours may not at the price between them
            kept &= weights @ np.log(again / confirmed) <= 0.0
        best = np.where(kept[:, None], candidate, best)
        confirmed = np.where(kept, again, confirmed)
        now = np.where(kept, tried[chosen, :, np.arange(len(prices))].T, now)

    if len(fixed):
        consider(fixed)
    for k, steps in trials:
        consider(np.outer(steps, np.arange(len(names)) == k), together=names[k] in SAME_AT_ALL_PRICES)
    for step in joint_steps(names, unit, config.joint_moves, seed):
        consider(step[None])
    change = np.exp(weights @ np.log(confirmed / first)) - 1.0
    num_steps = sum(player.num_steps for player in players)
    found = moved_by(constants, dict(zip(names, best.T, strict=True)), prices)
    return Offsets(prices, best[:, : len(actions)], change, num_steps, found)


def _fixed_fleets(names: Sequence[str], unit: float) -> FloatArray:
    """Moves to a fleet that keeps its size, shape (number, num_names); none where least replicas are not searched."""
    if "least_replicas" not in names:
        return np.empty((0, len(names)))
    lowered = np.array([-1.0 if name.endswith((".floor", ".headroom")) else 0.0 for name in names])
    kept = np.array([name == "least_replicas" for name in names])
    return lowered + np.outer(np.array(FIXED_FLEETS) * unit, kept)


def joint_steps(names: Sequence[str], unit: float, number: int, seed: int) -> FloatArray:
    """Moves of several things at once, ever smaller ones, shape (number, num_names).

    Args:
        names: of what is searched.
        unit: of least replicas.
        number: how many.
        seed: of the draws.
    """
    rng = stream(seed, "joint moves")
    size = np.array([JOINT_STEPS.get(name.split(".")[-1], 0.0) for name in names])
    size[[name == "least_replicas" for name in names]] *= unit
    moved = rng.random((number, len(names))) < JOINT_SHARE
    narrowing = np.geomspace(1.0, LAST_JOINT_STEP, number)[:, None] if number else np.ones((0, 1))
    return np.asarray(moved * size * narrowing * rng.standard_normal(moved.shape))


def _constants_to_turn(scenarios: Sequence[Scenario]) -> tuple[str, ...]:
    """All but a cap share where that is an action, and least replicas where not one pool of one fleet is meant."""
    fleet = scenarios[0].fleet
    turned = {"cap_share": fleet.is_simple, "least_replicas": len(fleet.pools) == len(scenarios) == 1}
    return tuple(name for name in CONSTANTS if turned.get(name, True))


def moved_by(constants: Constants, moves: Mapping[str, FloatArray], prices: FloatArray) -> Constants:
    """Constants after moves at each price; of those that nothing moves, as they were."""
    at, values = constants.at(prices)._asdict(), {}
    for name in CONSTANTS:
        move = moves.get(name, np.zeros(1))
        if move.any():
            value = at[name] * 2.0**move if name == "cap_share" else np.clip(at[name] + move, 0.0, MOST.get(name))
            values[name] = tuple(np.round(value, 4).tolist())
    return replace(constants, **values)


def search_timesteps(training: Mapping[str, Any]) -> int:
    """Control steps of the search that a card's ``training`` section tells of, and of those before it."""
    searched = training.get("offset_search", {}).get("timesteps", 0)
    return int(searched) + int(training.get("search_timesteps_before", 0))


def traffic_weights(num_training: int, num_histories: int) -> FloatArray:
    """How much each kind of traffic counts, shape (num_training + num_histories,), sum 1; training traffic first."""
    share = HISTORY_WEIGHT if num_histories else 0.0
    return np.repeat([(1.0 - share) / num_training, share / max(num_histories, 1)], [num_training, num_histories])


def choose_steps(bills: FloatArray, weights: FloatArray, *, together: bool = False) -> npt.NDArray[np.int64]:
    """At each price the trial with the smallest bill; the first, which moves nothing, unless that gains enough.

    Args:
        bills: shape (num_trials, num_kinds, num_prices), > 0.
        weights: of kinds of traffic, shape (num_kinds,), sum 1.
        together: whether it is to be the same at all prices.

    Returns:
        Indices of trials, shape (num_prices,).
    """
    gain = np.einsum("tkp,k->tp", np.log(bills / bills[0]), weights)
    padded = np.pad(gain, ((0, 0), (1, 1)), mode="edge")
    smooth = (1.0 - 2.0 * SMOOTHING) * gain + SMOOTHING * (padded[:, :-2] + padded[:, 2:])
    if together:
        smooth = np.broadcast_to(gain.mean(axis=1, keepdims=True), gain.shape)
    best = smooth.argmin(axis=0)
    return np.where(smooth.min(axis=0) < -LEAST_GAIN, best, 0)


def with_offsets(layers: list[Layer], found: Offsets, price_column: int) -> list[Layer]:
    """The network with the offsets in it, and its hidden layers wider by one unit per gap between two prices.

    Where nothing was found it stays as it is.

    The unit of a gap is a soft step of the price feature from -1 to 1 across it; their weighted sum goes through the
    offsets at the prices that were searched, and smoothly from one to the next.

    Args:
        layers: of a tanh MLP with at least one hidden layer.
        found: the offsets.
        price_column: of the feature ``miss_price``.
    """
    if not found.offsets.any():
        return layers
    if len(found.miss_price) == 1:
        weight, bias = layers[-1]
        return [*layers[:-1], (weight, (bias + found.offsets[0]).astype(np.float32))]
    places = price_feature(found.miss_price)
    centres, slope = (places[1:] + places[:-1]) / 2.0, 2.0 / np.diff(places).mean()
    carried = np.tanh(slope * (places[:, None] - centres))
    for _ in layers[2:]:
        carried = np.tanh(CARRY * carried) / CARRY
    solution = np.linalg.lstsq(np.column_stack([carried, np.ones(len(places))]), found.offsets, rcond=None)[0]
    num_steps, num_features = len(centres), layers[0][0].shape[1]
    rows = np.zeros((num_steps, num_features))
    rows[:, price_column] = slope
    widened = [_joined(layers[0], np.vstack([layers[0][0], rows]), -slope * centres)]
    for depth, layer in enumerate(layers[1:-1]):
        unit = CARRY if depth == 0 else 1.0  # later layers see a value of the scale already
        block = np.zeros((len(layer[1]) + num_steps, layer[0].shape[1] + num_steps))
        block[: len(layer[1]), : layer[0].shape[1]] = layer[0]
        block[len(layer[1]) :, layer[0].shape[1] :] = unit * np.eye(num_steps)
        widened.append(_joined(layer, block, np.zeros(num_steps)))
    scale = CARRY if len(layers) > 2 else 1.0
    weight, bias = layers[-1]
    last = np.hstack([weight, solution[:-1].T / scale])
    return [*widened, (last.astype(np.float32), (bias + solution[-1]).astype(np.float32))]


def _joined(layer: Layer, weight: FloatArray, more_bias: FloatArray) -> Layer:
    return weight.astype(np.float32), np.concatenate([layer[1], more_bias]).astype(np.float32)
