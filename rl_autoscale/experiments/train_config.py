"""What a training is told (``rl-autoscale train --config FILE``), and the policy that it starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, field_validator, model_validator

from rl_autoscale.agents.export import Layer, mean_network, read_actor
from rl_autoscale.agents.policy_file import check_schema, constants_of, read_card, read_network
from rl_autoscale.agents.ppo import PpoConfig
from rl_autoscale.agents.pretrained import policy_folder
from rl_autoscale.envs.constants import CONSTANTS, ByPrice, Constants, mean_constants
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
    start_from: tuple[str, ...] = Field(
        default=(), description="an exported policy to train on, a folder or pretrained/NAME; of several, their mean"
    )

    @field_validator("start_from", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if value is None:
            return ()
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        low, high = self.miss_price
        if not 0 < low <= high:
            raise ValueError(f"miss_price={[low, high]} must be [low, high] with 0 < low <= high")
        try:
            _ = self.constants
        except SpecError as error:
            raise ValueError(f"ppo.{error}") from None
        return self

    @property
    def constants(self) -> Constants:
        """The policy's, at the prices of this training."""
        return Constants(**{name: getattr(self.ppo, name) for name in CONSTANTS}, miss_price=self.miss_price)

    def with_constants(self, constants: Constants) -> TrainConfig:
        """The same for a policy with other constants."""
        values = {name: getattr(constants, name) for name in CONSTANTS}
        return self.model_copy(update={"ppo": self.ppo.model_copy(update=values)})


def read_training(path: Path) -> TrainConfig:
    """A training's configuration: a YAML file, or what the card of a policy says that it was trained with.

    Args:
        path: the file, a policy's folder, or ``pretrained/NAME``. Of a mean of seeds: what they were trained with,
            and the search of the mean.

    Raises:
        SpecError: no such file, or it does not hold a training's configuration.
        PolicyFileError: no such policy, or its card does not say.
    """
    folder = policy_folder(path)
    if not (folder / "policy.json").exists():
        return TrainConfig.from_yaml(folder)
    training = read_card(folder)["training"]
    if "config" not in training:
        raise PolicyFileError(f"{path}: its card does not say how it was trained; write a --config file")
    config = TrainConfig.from_dict(training["config"])
    seeds = [origin["config"] for origin in training.get("started_from", [])]
    if config.ppo.total_timesteps > 0 or len(seeds) < 2 or None in seeds:
        return config
    trained = [TrainConfig.from_dict(seed) for seed in seeds]
    alike = {
        one.model_copy(update={"ppo": one.ppo.model_copy(update={"seed": 0})}).model_dump_json() for one in trained
    }
    return trained[0].model_copy(update={"offset_search": config.offset_search}) if len(alike) == 1 else config


ADAPTING_PPO: Mapping[str, float] = {
    "total_timesteps": 0,
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
"""How a policy is adapted to the traffic of one fleet, where nothing else is said: by the search alone, to which
115,200 steps of PPO before it add nothing in about as many simulated hours (docs/learner.md). For a training that is
given steps, rollouts are as large as in the training of `single-pool`: a smaller one sees too few bursts."""
ADAPTING_FAULTS = FaultConfig(missing=0.003, frozen=0.003)
ADAPTING_SEARCH = OffsetSearchConfig(rounds=1, joint_moves=40, episodes=8, history=True)


def timesteps_before(config: TrainConfig) -> int:
    """Timesteps of the policies that the training starts from, by their cards."""
    return sum(int(read_card(Path(name))["training"].get("timesteps", 0)) for name in config.start_from)


def search_timesteps_before(config: TrainConfig) -> int:
    """Timesteps that the searches of offsets took of which those policies came."""
    return sum(search_timesteps(read_card(Path(name))["training"]) for name in config.start_from)


def origins(config: TrainConfig) -> list[dict[str, Any]]:
    """What a card says of the policies that the training starts from: network, timesteps and configuration of each."""
    cards = [read_card(Path(name)) for name in config.start_from]
    return [
        {
            "onnx_sha256": card["onnx_sha256"],
            "timesteps": card["training"].get("timesteps", 0),
            "config": card["training"].get("config"),
        }
        for card in cards
    ]


def train_on(config: TrainConfig, policies: Sequence[str]) -> TrainConfig:
    """A configuration that starts from exported policies and keeps their layers, prices and what `_kind_of` names.

    What it does not say otherwise is as for adapting: `ADAPTING_PPO`, `ADAPTING_FAULTS`, `ADAPTING_SEARCH`.

    Raises:
        SpecError: of several policies, one is of another kind.
        PolicyFileError: one cannot be read.
    """
    kind = _kind_of(policies)
    adapting = {name: value for name, value in ADAPTING_PPO.items() if name not in config.ppo.model_fields_set}
    kept = {"hidden_sizes": _sizes_in(policies), "refuse": kind["refuse"], **_constants_in(policies)}
    unsaid = {"faults": ADAPTING_FAULTS, "offset_search": ADAPTING_SEARCH}
    changes = {name: value for name, value in unsaid.items() if name not in config.model_fields_set}
    ppo = config.ppo.model_copy(update=adapting | kept)
    started = {"start_from": tuple(policies), "miss_price": kind["miss_price_range"], "ppo": ppo}
    return config.model_copy(update=changes | started)


def averaging(config: TrainConfig, policies: Sequence[str]) -> TrainConfig:
    """A configuration that only searches and measures the mean of policies which the given one trained."""
    ppo = config.ppo.model_copy(update={"total_timesteps": 0, "hidden_sizes": _sizes_in(policies)})
    return config.model_copy(update={"start_from": tuple(policies), "ppo": ppo})


def with_what_it_starts_from(config: TrainConfig) -> TrainConfig:
    """A configuration with the hidden layers and constants of what it starts from, unless it says which it wants."""
    if not config.start_from:
        return config
    theirs = {"hidden_sizes": _sizes_in(config.start_from), **_constants_in(config.start_from, config.miss_price)}
    unsaid = {name: value for name, value in theirs.items() if name not in config.ppo.model_fields_set}
    return config.model_copy(update={"ppo": config.ppo.model_copy(update=unsaid)})


def first_actor(config: TrainConfig, scenarios: Sequence[Scenario]) -> list[Layer] | None:
    """The layers that the training starts from: the policy's, or the mean of several."""
    if not config.start_from:
        return None
    _kind_of(config.start_from)
    schema = Schema.of(scenarios[0].fleet)
    networks = []
    for name in config.start_from:
        check_schema(read_card(Path(name)), schema, f"start_from={name}")
        layers = _layers_of(name)
        if (layers[0][0].shape[1], len(layers[-1][1])) != (len(schema.features), len(schema.actions)):
            raise PolicyFileError(f"start_from={name}: its network does not match its card; export it again")
        networks.append(layers)
    if (sizes := _hidden_sizes(networks)) != config.ppo.hidden_sizes:
        raise SpecError(
            f"start_from={', '.join(config.start_from)}: hidden_sizes are {list(sizes)}, ppo.hidden_sizes "
            f"{list(config.ppo.hidden_sizes)}; they must be the same"
        )
    return mean_network(networks)


def _kind_of(policies: Sequence[str]) -> dict[str, Any]:
    """Prices and refusal; a mean means something only where these are the same."""
    kinds = []
    for name in policies:
        card = read_card(Path(name))
        kinds.append({"miss_price_range": tuple(card["miss_price_range"]), "refuse": bool(card["refuse"])})
    for name, kind in zip(policies, kinds, strict=True):
        if kind != kinds[0]:
            raise SpecError(
                f"start_from: {name} has {_written(kind)}, {policies[0]} {_written(kinds[0])}; "
                "a mean needs policies that were trained alike"
            )
    return kinds[0]


def _written(kind: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in kind.items())


def _constants_in(policies: Sequence[str], miss_price: tuple[float, float] | None = None) -> dict[str, ByPrice]:
    """Constants of the mean of policies, by name, for a dial of this range or of theirs."""
    several = [constants_of(read_card(Path(name))) for name in policies]
    mean = mean_constants([item.over(miss_price or several[0].miss_price) for item in several])
    return {name: getattr(mean, name) for name in CONSTANTS}


def _sizes_in(policies: Sequence[str]) -> tuple[int, ...]:
    return _hidden_sizes([_layers_of(name) for name in policies])


def _layers_of(policy: str) -> list[Layer]:
    folder = Path(policy)
    return read_actor(read_network(folder, read_card(folder))[1])


def _hidden_sizes(networks: Sequence[list[Layer]]) -> tuple[int, ...]:
    """Hidden sizes of the mean of networks.

    Raises:
        SpecError: they are not equally deep.
    """
    depths = [len(layers) - 1 for layers in networks]
    if len(set(depths)) > 1:
        raise SpecError(f"start_from: networks with {depths} hidden layers have no mean; give equally deep ones")
    return tuple(sum(len(layers[k][1]) for layers in networks) for k in range(depths[0]))
