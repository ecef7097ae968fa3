"""PPO on the fleet environment, with Stable-Baselines3 (extra ``train``).

One policy is trained for a whole scenario: the price of a miss, the capacity error, the start-up time and the traffic
are drawn anew for each episode, and the price is part of the observation, so that the trained policy covers the
cost/attainment front and is turned by one dial. The reward is the reported metric (envs/reward.py).

A checkpoint is tensors (read back with ``weights_only=True``) and JSON: nothing in it is ever unpickled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rl_autoscale.agents.export import Layer
from rl_autoscale.agents.sb3_fleets import SB3Fleets
from rl_autoscale.envs.constants import ByPrice
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.reward import PRICE_SCALE
from rl_autoscale.fleet.admission import SELECTIVITY
from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import MissingExtraError, PolicyFileError

try:
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.torch_layers import MlpExtractor
except ImportError as error:  # pragma: no cover - depends on the installation
    raise MissingExtraError("training", "train") from error


class PpoConfig(Config):
    """Hyper-parameters; the defaults are the ones the demo trains with."""

    total_timesteps: NonNegativeInt = Field(
        default=400_000, description="0, of a policy to start from: nothing is trained, its offsets are searched"
    )
    num_fleets: PositiveInt = 16
    num_threads: PositiveInt = 2
    rollout_steps: PositiveInt = 128
    minibatch_size: PositiveInt = 256
    num_epochs: PositiveInt = 10
    learning_rate: PositiveFloat = 5e-4
    final_learning_rate: NonNegativeFloat = 5e-5
    gamma: float = Field(default=0.97, gt=0, lt=1)
    gae_lambda: float = Field(default=0.92, gt=0, le=1)
    clip_range: PositiveFloat = 0.2
    entropy_coefficient: NonNegativeFloat = 0.0
    value_coefficient: PositiveFloat = 0.5
    target_kl: PositiveFloat | None = 0.03
    max_gradient_norm: PositiveFloat = 0.5
    initial_log_std: float = -1.6
    hidden_sizes: tuple[PositiveInt, ...] = (64, 64)
    checkpoint_every: PositiveInt = 100_000
    foresight_critic: bool = Field(
        default=True, description="the critic, in training only, sees the traffic to come (envs/foresight.py)"
    )
    refuse: bool = True
    hysteresis: ByPrice = Field(
        default=0.0, description="share above what is wanted at which a pool gives back (envs/constants.py)"
    )
    selectivity: ByPrice = Field(default=SELECTIVITY, description="of refusal: 0 treats all requests alike")
    cap_share: ByPrice = Field(default=1.0, description="requests in flight per replica over what the load allows")
    found_share: ByPrice = Field(default=0.0, description="of the fleet it finds, kept at least (envs/constants.py)")
    least_replicas: ByPrice = Field(default=0.0, description="kept at least, of one fleet (envs/constants.py)")
    seed: NonNegativeInt = 0


CRITIC_FIRST = 0.05
"""Share of the steps in which an actor that was given waits for a critic that knows it."""


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """What a training run reports after each rollout."""

    timesteps: int
    total_timesteps: int
    steps_per_s: float
    mean_reward: float
    cost_over_ideal: float
    slo_attainment: float
    metrics: dict[str, float]


class _Networks(MlpExtractor):  # type: ignore[misc,unused-ignore]
    """Actor and critic apart; the actor sees the first ``num_observed`` features only."""

    def __init__(self, num_features: int, num_observed: int, net_arch: Any, device: Any) -> None:
        super().__init__(num_features, net_arch, torch.nn.Tanh, device)
        self._num_observed = num_observed
        self.policy_net = MlpExtractor(num_observed, net_arch, torch.nn.Tanh, device).policy_net

    def forward_actor(self, features: torch.Tensor) -> torch.Tensor:
        """The actor's last hidden layer."""
        return torch.as_tensor(self.policy_net(features[:, : self._num_observed]))


class ForesightPolicy(ActorCriticPolicy):  # type: ignore[misc,unused-ignore]
    """SB3's tanh MLPs; what `SB3Fleets` appends to the observation reaches the critic only."""

    def __init__(self, *args: Any, num_observed: int, **kwargs: Any) -> None:
        self._num_observed = num_observed
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _Networks(self.features_dim, self._num_observed, self.net_arch, self.device)


def build_ppo(mdps: Sequence[FleetMdp], config: PpoConfig) -> PPO:
    """An untrained PPO on MDPs of one schema."""
    torch.set_num_threads(1)  # the network is small: more threads cost more than they give
    fleets = SB3Fleets(mdps, config.seed, config.gamma, foresight=config.foresight_critic)

    def learning_rate(progress_remaining: float) -> float:
        return config.final_learning_rate + progress_remaining * (config.learning_rate - config.final_learning_rate)

    return PPO(
        ForesightPolicy,
        fleets,
        learning_rate=learning_rate,
        n_steps=config.rollout_steps,
        batch_size=min(config.minibatch_size, config.rollout_steps * fleets.num_envs),
        n_epochs=config.num_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        ent_coef=config.entropy_coefficient,
        vf_coef=config.value_coefficient,
        max_grad_norm=config.max_gradient_norm,
        target_kl=config.target_kl,
        policy_kwargs={
            "net_arch": {"pi": list(config.hidden_sizes), "vf": list(config.hidden_sizes)},
            "log_std_init": config.initial_log_std,
            "num_observed": fleets.num_observed,
        },
        seed=config.seed,
        device="cpu",
        verbose=0,
    )


class _Reporter(BaseCallback):  # type: ignore[misc,unused-ignore]
    """Reports after each rollout, checkpoints on the way."""

    def __init__(
        self,
        config: PpoConfig,
        report: Callable[[TrainingProgress], None] | None,
        checkpoint_folder: Path | None,
        critic_only_steps: int,
    ) -> None:
        super().__init__()
        self._critic_only_steps = critic_only_steps
        self._config = config
        self._report = report
        self._folder = checkpoint_folder
        self._next_checkpoint = 0

    def _on_training_start(self) -> None:
        self._next_checkpoint = self.num_timesteps + self._config.checkpoint_every

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        _let_actor_learn(self.model.policy, self.num_timesteps >= self._critic_only_steps)
        if self._folder is not None and self.num_timesteps >= self._next_checkpoint:
            assert isinstance(self.model, PPO)
            save_checkpoint(self.model, self._folder)
            self._next_checkpoint += self._config.checkpoint_every
        if self._report is None:
            return
        fleets, model = self.training_env, self.model
        assert isinstance(fleets, SB3Fleets)
        assert isinstance(model, PPO)
        recent = fleets.finished_books[-2 * fleets.num_envs :]
        elapsed_s = max((time.time_ns() - model.start_time) / 1e9, 1e-9)
        done = self.num_timesteps - model._num_timesteps_at_start
        logged = {name: float(value) for name, value in self.logger.name_to_value.items()}
        self._report(
            TrainingProgress(
                timesteps=self.num_timesteps,
                total_timesteps=self._config.total_timesteps,
                steps_per_s=done / elapsed_s,
                mean_reward=_mean([book_reward(b) for b in recent]),
                cost_over_ideal=_mean([b["cost_over_ideal"] for b in recent]),
                slo_attainment=_mean([b["slo_attainment"] for b in recent]),
                metrics=logged,
            )
        )


def book_reward(book: dict[str, float]) -> float:
    """Reward per control step of a finished episode, from its books; not a number without arrivals."""
    price = book["miss_price"]
    cost = book["cost_over_ideal"] + book["put_off_over_ideal"]
    return -(cost + price * book["weighted_misses"]) / (1.0 + price / PRICE_SCALE)


def _mean(values: list[float]) -> float:
    return float(np.nanmean(values)) if values else float("nan")


def train_ppo(
    mdps: Sequence[FleetMdp],
    config: PpoConfig,
    *,
    report: Callable[[TrainingProgress], None] | None = None,
    checkpoint_folder: Path | None = None,
    resume: bool = False,
    actor: list[Layer] | None = None,
) -> PPO:
    """Train from scratch or from an actor, or go on from the folder's checkpoint.

    Args:
        mdps: of one schema; ``config.num_fleets`` fleets together.
        config: hyper-parameters.
        report: called after each rollout.
        checkpoint_folder: where checkpoints go; None for none.
        resume: continue from the checkpoint there, if any.
        actor: layers to begin with; they stand still until the critic has had `CRITIC_FIRST` of the steps.

    Returns:
        The trained SB3 model.
    """
    model = build_ppo(mdps, config)
    if actor is not None:
        _set_actor(model.policy, actor)
    done = load_checkpoint(model, checkpoint_folder) if resume and checkpoint_folder is not None else 0
    left = config.total_timesteps - done
    if left > 0:
        critic_only_steps = 0 if actor is None else int(CRITIC_FIRST * config.total_timesteps)
        callback = _Reporter(config, report, checkpoint_folder, critic_only_steps)
        model.learn(left, callback=callback, reset_num_timesteps=done == 0)
        if checkpoint_folder is not None:
            save_checkpoint(model, checkpoint_folder)
    return model


def save_checkpoint(model: PPO, folder: Path) -> None:
    """Write weights, optimiser state, scale of rewards and progress; each file replaces the old one whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"policy": model.policy.state_dict(), "optimizer": model.policy.optimizer.state_dict()}
    torch.save(tensors, folder / "checkpoint.pt.tmp")
    (folder / "checkpoint.pt.tmp").replace(folder / "checkpoint.pt")
    progress = {"timesteps": model.num_timesteps, "return_spread": _fleets_of(model).spread_to_json()}
    (folder / "checkpoint.json.tmp").write_text(json.dumps(progress))
    (folder / "checkpoint.json.tmp").replace(folder / "checkpoint.json")


def _fleets_of(model: PPO) -> SB3Fleets:
    fleets = model.get_env()
    assert isinstance(fleets, SB3Fleets)
    return fleets


def load_checkpoint(model: PPO, folder: Path) -> int:
    """Restore a checkpoint into a model of the same shape.

    Returns:
        Timesteps it had been trained for; 0 when the folder has no checkpoint.

    Raises:
        PolicyFileError: the checkpoint is damaged or of another network.
    """
    if not (folder / "checkpoint.pt").exists() or not (folder / "checkpoint.json").exists():
        return 0
    try:
        tensors = torch.load(folder / "checkpoint.pt", weights_only=True)
        progress = json.loads((folder / "checkpoint.json").read_text())
        timesteps = int(progress["timesteps"])
        _fleets_of(model).restore_spread(progress["return_spread"])
        model.policy.load_state_dict(tensors["policy"])
        model.policy.optimizer.load_state_dict(tensors["optimizer"])
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise PolicyFileError(
            f"{folder}: this checkpoint is damaged or of another network or version ({why}); "
            "delete the folder to train anew"
        ) from error
    model.num_timesteps = timesteps
    return timesteps


def _linear(policy: Any) -> list[Any]:
    """The linear layers of the actor of an SB3 ``MlpPolicy``, first layer first."""
    hidden = [module for module in policy.mlp_extractor.policy_net if isinstance(module, torch.nn.Linear)]
    return [*hidden, policy.action_net]


def _set_actor(policy: Any, layers: list[Layer]) -> None:
    for linear, (weight, bias) in zip(_linear(policy), layers, strict=True):
        linear.weight.data.copy_(torch.tensor(weight))
        linear.bias.data.copy_(torch.tensor(bias))


def _let_actor_learn(policy: Any, learns: bool) -> None:
    for parameter in (policy.log_std, *(item for linear in _linear(policy) for item in linear.parameters())):
        parameter.requires_grad_(learns)


def policy_layers(policy: Any) -> list[Layer]:
    """Weights (out, in) and biases of the actor of an SB3 ``MlpPolicy`` with tanh activations, first layer first."""
    return [
        (layer.weight.detach().numpy().astype(np.float32), layer.bias.detach().numpy().astype(np.float32))
        for layer in _linear(policy)
    ]
