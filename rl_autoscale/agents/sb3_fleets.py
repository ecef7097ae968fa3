"""Fleets as Stable-Baselines3 sees them: the vectorised environment that PPO learns in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from rl_autoscale.envs.fleet_env import make_spaces
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.observation import LIMIT
from rl_autoscale.envs.reward import PRICE_SCALE
from rl_autoscale.fleet.errors import MissingExtraError, SpecError

try:
    from stable_baselines3.common.running_mean_std import RunningMeanStd
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:  # pragma: no cover - depends on the installation
    raise MissingExtraError("training", "train") from error

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
        self._returns[:] = 0.0
        self._lengths[:] = 0
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
