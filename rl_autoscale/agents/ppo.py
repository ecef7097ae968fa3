"""PPO on the fleet environment, with Stable-Baselines3 (extra ``train``).

One policy is trained for a whole scenario: the price of a miss, the capacity error, the start-up time and the traffic
are drawn anew for each episode, and the price is part of the observation, so that the trained policy covers the
cost/attainment front and is turned by one dial. The reward is the reported metric (envs/reward.py).

A checkpoint is tensors (read back with ``weights_only=True``) and JSON: nothing in it is ever unpickled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rl_autoscale.agents.export import Layer
from rl_autoscale.envs.fleet_env import make_spaces
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.observation import LIMIT
from rl_autoscale.envs.reward import PRICE_SCALE
from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import MissingExtraError, PolicyFileError, SpecError

try:
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.running_mean_std import RunningMeanStd
    from stable_baselines3.common.torch_layers import MlpExtractor
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:  # pragma: no cover - depends on the installation
    raise MissingExtraError("training", "train") from error


class PpoConfig(Config):
    """Hyper-parameters; the defaults are the ones the demo trains with."""

    total_timesteps: PositiveInt = 400_000
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
    seed: NonNegativeInt = 0


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


TYPICAL_COST = 1.6
"""Cost over ideal that the learner's rewards are centred on: returns near zero are what a fresh critic predicts."""


class SB3Fleets(VecEnv):  # type: ignore[misc,unused-ignore]
    """Stable-Baselines3's view of one or several `FleetMdp`: same-step autoreset, truncation flagged for bootstrapping.

    Several MDPs of one schema (other hardware, SLOs, traffic) train one policy: its features and actions are relative
    to the fleet, so that it carries over.

    The learner's reward is the MDP's, centred by a constant and, for each MDP apart, divided by the running deviation
    of its discounted returns: no MDP drowns the gradients of the others because its traffic is rougher. With a fixed
    horizon this changes no preference between policies.

    Args:
        mdps: of one schema.
        seed: of the run.
        gamma: of the discounted returns.
        foresight: append what hindsight knows (envs/foresight.py) and which MDP it is to the observation, for a critic.
    """

    def __init__(self, mdps: Sequence[FleetMdp], seed: int, gamma: float, *, foresight: bool = False) -> None:
        digests = {mdp.encoder.schema.digest for mdp in mdps}
        if len(digests) != 1:
            raise SpecError(f"one policy needs fleets of one schema, got {len(digests)}; train them apart")
        observation_space, action_space = make_spaces(mdps[0])
        self.num_observed = int(observation_space.shape[0])
        if foresight:
            num_features = self.num_observed + mdps[0].num_foresight_features + len(mdps)
            observation_space = gym.spaces.Box(-LIMIT, LIMIT, (num_features,), np.float32)
        num_fleets = [mdp.num_fleets for mdp in mdps]
        super().__init__(sum(num_fleets), observation_space, action_space)
        self.finished_books: list[dict[str, float]] = []
        ends = np.cumsum(num_fleets)
        self._parts = [(mdp, slice(end - mdp.num_fleets, end)) for mdp, end in zip(mdps, ends, strict=True)]
        self._run_seed = seed
        self._gamma = gamma
        self._foresight = foresight
        self.return_spread = [RunningMeanStd(shape=()) for _ in mdps]
        self._discounted = np.zeros(self.num_envs)
        self._actions: npt.NDArray[np.float32] = np.zeros((self.num_envs, *action_space.shape), np.float32)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, dtype=np.int64)

    def reset(self) -> npt.NDArray[np.float32]:
        """Begin a run in all fleets."""
        self._discounted[:] = 0.0
        return np.concatenate([self._seen(k, mdp.reset(self._run_seed)) for k, (mdp, _) in enumerate(self._parts)])

    def _seen(self, k: int, observation: npt.NDArray[np.float32], which: Any = slice(None)) -> npt.NDArray[np.float32]:
        """Observations of an MDP's fleets, with what the critic sees beside them."""
        if not self._foresight:
            return observation
        one_hot = np.zeros((len(observation), len(self._parts)), np.float32)
        one_hot[:, k] = 1.0
        return np.concatenate([observation, self._parts[k][0].foresight()[which], one_hot], axis=-1)

    def step_async(self, actions: npt.NDArray[np.float32]) -> None:
        """Remember the actions."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Advance all fleets, those of an MDP in one compiled call."""
        results = [self._step_part(k) for k in range(len(self._parts))]
        observation, reward, done = (np.concatenate(items) for items in zip(*(r[:3] for r in results), strict=True))
        return observation, reward, done, [info for result in results for info in result[3]]

    def _step_part(
        self, k: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        mdp, rows = self._parts[k]
        typical = TYPICAL_COST / (1.0 + mdp.miss_price / PRICE_SCALE)
        step = mdp.step(self._actions[rows])
        observation = self._seen(k, step.observation)
        reward = self._scaled(k, step.reward.total + typical)
        done = step.truncated.copy()
        returns, lengths = self._returns[rows], self._lengths[rows]  # views
        returns += reward
        lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(mdp.num_fleets)]
        if done.any():
            for e in np.flatnonzero(done):
                self.finished_books.append(mdp.books(int(e)))
                infos[e] = {
                    "terminal_observation": observation[e].copy(),
                    "TimeLimit.truncated": True,
                    "episode": {"r": float(returns[e]), "l": int(lengths[e]), "t": 0.0},
                }
            observation[done] = self._seen(k, mdp.reset_fleets(done), done)
            self._discounted[rows][done] = 0.0
            returns[done] = 0.0
            lengths[done] = 0
        return observation, reward, done, infos

    def _scaled(self, k: int, reward: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """An MDP's rewards over the deviation of its discounted returns."""
        discounted = self._discounted[self._parts[k][1]]  # a view
        discounted *= self._gamma
        discounted += reward
        self.return_spread[k].update(discounted)
        return (reward / np.sqrt(self.return_spread[k].var + 1e-8)).astype(np.float32)

    def spread_to_json(self) -> list[dict[str, float]]:
        """The running deviations of returns, per MDP: a run that goes on must scale rewards as it did before."""
        return [
            {"mean": float(item.mean), "variance": float(item.var), "count": float(item.count)}
            for item in self.return_spread
        ]

    def restore_spread(self, spreads: Sequence[Mapping[str, float]]) -> None:
        """Inverse of `spread_to_json`."""
        for spread, saved in zip(self.return_spread, spreads, strict=True):
            spread.mean, spread.var = np.asarray(saved["mean"]), np.asarray(saved["variance"])
            spread.count = saved["count"]

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The same attribute for every fleet."""
        return [getattr(self, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not supported: fleets share their MDPs."""
        raise NotImplementedError("fleets have no attributes of their own")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Not supported: fleets share their MDPs."""
        raise NotImplementedError("fleets have no methods of their own")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """No fleet is wrapped."""
        return [False] * self.num_envs


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
        self, config: PpoConfig, report: Callable[[TrainingProgress], None] | None, checkpoint_folder: Path | None
    ) -> None:
        super().__init__()
        self._config = config
        self._report = report
        self._folder = checkpoint_folder
        self._next_checkpoint = 0

    def _on_training_start(self) -> None:
        self._next_checkpoint = self.num_timesteps + self._config.checkpoint_every

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
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
    return -(book["cost_over_ideal"] + price * (1.0 - book["slo_attainment"])) / (1.0 + price / PRICE_SCALE)


def _mean(values: list[float]) -> float:
    return float(np.nanmean(values)) if values else float("nan")


def train_ppo(
    mdps: Sequence[FleetMdp],
    config: PpoConfig,
    *,
    report: Callable[[TrainingProgress], None] | None = None,
    checkpoint_folder: Path | None = None,
    resume: bool = False,
) -> PPO:
    """Train from scratch, or go on from the folder's checkpoint.

    Args:
        mdps: of one schema; ``config.num_fleets`` fleets together.
        config: hyper-parameters.
        report: called after each rollout.
        checkpoint_folder: where checkpoints go; None for none.
        resume: continue from the checkpoint there, if any.

    Returns:
        The trained SB3 model.
    """
    model = build_ppo(mdps, config)
    done = load_checkpoint(model, checkpoint_folder) if resume and checkpoint_folder is not None else 0
    left = config.total_timesteps - done
    if left > 0:
        callback = _Reporter(config, report, checkpoint_folder)
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
        raise PolicyFileError(
            f"{folder}/checkpoint.pt cannot be resumed ({type(error).__name__}); delete the folder to train anew"
        ) from error
    model.num_timesteps = timesteps
    return timesteps


def policy_layers(policy: Any) -> list[Layer]:
    """Weights (out, in) and biases of the actor of an SB3 ``MlpPolicy`` with tanh activations, first layer first."""
    actor = [module for module in policy.mlp_extractor.policy_net if isinstance(module, torch.nn.Linear)]
    return [
        (layer.weight.detach().numpy().astype(np.float32), layer.bias.detach().numpy().astype(np.float32))
        for layer in (*actor, policy.action_net)
    ]
