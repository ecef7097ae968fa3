"""What a training is told (``rl-autoscale train --config FILE``), and the policy that it starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, PositiveInt, model_validator

from rl_autoscale.agents.export import Layer, read_actor
from rl_autoscale.agents.learned import check_schema, read_card, read_network
from rl_autoscale.agents.ppo import PpoConfig
from rl_autoscale.envs.reward import PRICE_RANGE
from rl_autoscale.envs.scenario import Scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.offset_search import OffsetSearchConfig, search_timesteps
from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import PolicyFileError, SpecError


class FaultConfig(Config):
    """Telemetry faults to train under, probabilities per control step."""

    missing: float = Field(default=0.0, ge=0, lt=1)
    frozen: float = Field(default=0.0, ge=0, lt=1)


class TrainConfig(Config):
    """What ``rl-autoscale train --config FILE`` reads."""

    scenarios: tuple[str, ...] = Field(
        default=("azure-conversation",), min_length=1, description="one policy for all of them; of one schema"
    )
    ppo: PpoConfig = PpoConfig()
    miss_price: tuple[float, float] = Field(default=PRICE_RANGE, description="range of the dial, log-uniform")
    num_workloads: PositiveInt = Field(default=96, description="different traffic draws")
    faults: FaultConfig = FaultConfig()
    offset_search: OffsetSearchConfig = OffsetSearchConfig()
    start_from: str | None = Field(
        default=None, description="an exported policy to train on: a folder, or pretrained/NAME"
    )

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        low, high = self.miss_price
        if not 0 < low <= high:
            raise ValueError(f"miss_price={[low, high]} must be [low, high] with 0 < low <= high")
        return self


ADAPTING_PPO: Mapping[str, float] = {
    "total_timesteps": 115_200,
    "num_fleets": 40,
    "rollout_steps": 96,
    "minibatch_size": 960,
    "num_epochs": 6,
    "learning_rate": 2e-4,
    "final_learning_rate": 2e-5,
    "gamma": 0.985,
    "gae_lambda": 0.95,
    "entropy_coefficient": 5e-4,
    "initial_log_std": -1.9,
}
"""How a policy is adapted to the traffic of one fleet, where nothing else is said: 320 simulated hours, minutes of one
core. Rollouts are as large as in the training of `single-pool`: a smaller one sees too few bursts."""
ADAPTING_FAULTS = FaultConfig(missing=0.003, frozen=0.003)
ADAPTING_SEARCH = OffsetSearchConfig(rounds=1, episodes=4)


def timesteps_before(config: TrainConfig) -> int:
    """Timesteps of the policy that the training starts from, by its card."""
    return 0 if config.start_from is None else int(read_card(Path(config.start_from))["training"].get("timesteps", 0))


def search_timesteps_before(config: TrainConfig) -> int:
    """Timesteps that the searches of offsets took of which that policy came."""
    return 0 if config.start_from is None else search_timesteps(read_card(Path(config.start_from))["training"])


def train_on(config: TrainConfig, policy: str) -> TrainConfig:
    """A configuration that starts from an exported policy and keeps its layers, prices, refusal and hysteresis.

    What it does not say otherwise is as for adapting: `ADAPTING_PPO`, `ADAPTING_FAULTS`, `ADAPTING_SEARCH`.
    """
    card = read_card(Path(policy))
    low, high = card["miss_price_range"]
    adapting = {name: value for name, value in ADAPTING_PPO.items() if name not in config.ppo.model_fields_set}
    kept = {
        "hidden_sizes": _sizes_in(policy),
        "refuse": bool(card["refuse"]),
        "hysteresis": float(card.get("hysteresis", 0.0)),
    }
    unsaid = {"faults": ADAPTING_FAULTS, "offset_search": ADAPTING_SEARCH}
    changes = {name: value for name, value in unsaid.items() if name not in config.model_fields_set}
    ppo = config.ppo.model_copy(update=adapting | kept)
    return config.model_copy(update={**changes, "start_from": policy, "miss_price": (low, high), "ppo": ppo})


def with_layers_to_start_from(config: TrainConfig) -> TrainConfig:
    """A configuration with the hidden layers of the policy that it starts from, unless it says which it wants."""
    if config.start_from is None or "hidden_sizes" in config.ppo.model_fields_set:
        return config
    ppo = config.ppo.model_copy(update={"hidden_sizes": _sizes_in(config.start_from)})
    return config.model_copy(update={"ppo": ppo})


def _sizes_in(policy: str) -> tuple[int, ...]:
    folder = Path(policy)
    return _hidden_sizes(read_actor(read_network(folder, read_card(folder))[1]))


def _hidden_sizes(layers: list[Layer]) -> tuple[int, ...]:
    return tuple(len(bias) for _, bias in layers[:-1])


def first_actor(config: TrainConfig, scenarios: Sequence[Scenario]) -> list[Layer] | None:
    """The layers of the policy that the training starts from."""
    if config.start_from is None:
        return None
    path, schema = Path(config.start_from), Schema.of(scenarios[0].fleet)
    card = read_card(path)
    check_schema(card, schema, f"start_from={config.start_from}")
    layers = read_actor(read_network(path, card)[1])
    if (layers[0][0].shape[1], len(layers[-1][1])) != (len(schema.features), len(schema.actions)):
        raise PolicyFileError(f"start_from={config.start_from}: its network does not match its card; export it again")
    if (sizes := _hidden_sizes(layers)) != config.ppo.hidden_sizes:
        raise SpecError(
            f"start_from={config.start_from}: its hidden_sizes are {list(sizes)}, ppo.hidden_sizes "
            f"{list(config.ppo.hidden_sizes)}; they must be the same"
        )
    return layers
