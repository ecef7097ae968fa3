"""Gymnasium's view of the decision process.

`FleetEnv` (one fleet) and `FleetVectorEnv` (many, in one compiled call).
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from rl_autoscale.envs.mdp import EpisodeSampler, FleetMdp, MdpStep
from rl_autoscale.envs.observation import LIMIT
from rl_autoscale.envs.render import ansi_frame, rgb_frame
from rl_autoscale.fleet.spec import FleetSpec, ShieldSpec

Observation = npt.NDArray[np.float32]


def make_spaces(mdp: FleetMdp) -> tuple[Any, Any]:
    """Observation and action space of one fleet of an MDP."""
    num_features = len(mdp.encoder.schema.features)
    observation = gym.spaces.Box(-LIMIT, LIMIT, (num_features,), np.float32)
    return observation, gym.spaces.Box(-1.0, 1.0, (mdp.decoder.num_actions,), np.float32)


def step_info(mdp: FleetMdp, step: MdpStep, e: int) -> dict[str, Any]:
    """What ``info`` carries for one fleet: reward terms, books so far, queues, the decision that was applied."""
    return {
        "reward_terms": {"cost": float(step.reward.cost[e]), "misses": float(step.reward.misses[e])},
        **mdp.books(e),
        "time_s": float(step.state.time_s[e]),
        "queue_length": step.state.classes.queue_length[e].copy(),
        "ready": step.state.pools.ready[e].copy(),
        "target_replicas": step.decision.target_replicas[e].copy(),
        "max_batch_size": step.decision.max_batch_size[e].copy(),
        "admission": step.decision.admission[e].copy(),
    }


class FleetEnv(gym.Env[Observation, npt.NDArray[np.float32]]):
    """One simulated LLM fleet as a Gymnasium environment, ``rl_autoscale/Fleet-v0``.

    Action (Box, each in [-1, 1]): see envs/action.py: per pool a headroom over measured demand and a batch cap, per
    class the strictness of early refusal. Observation (Box): see envs/observation.py. Reward: see envs/reward.py; its
    terms are in ``info["reward_terms"]``. An episode starts with the pools' initial replicas ready and a new draw of
    traffic, and is truncated at the end of its traffic; it never terminates.

    Version history: v0, first.

    Args:
        spec: the fleet.
        shield: limits in force.
        sampler: makes episodes from seeds.
        render_mode: None, "ansi" (a text panel) or "rgb_array" (charts of the episode so far).
        options: further arguments of `FleetMdp` (``refuse``, ``faults``, ``constants``).
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]  # Gymnasium declares it without ClassVar
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 10,
    }

    def __init__(
        self,
        spec: FleetSpec,
        shield: ShieldSpec,
        sampler: EpisodeSampler,
        *,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode={render_mode!r} is not one of {self.metadata['render_modes']}")
        self.render_mode = render_mode
        self.mdp = FleetMdp(spec, shield, sampler, **options)
        self.observation_space, self.action_space = make_spaces(self.mdp)
        self._started = False
        self._history: list[MdpStep] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode; a seed fixes this and all following episodes until the next seed."""
        super().reset(seed=seed)
        self._history = []
        if seed is not None or not self._started:
            run_seed = int(self.np_random.integers(2**31)) if seed is None else seed
            observation = self.mdp.reset(run_seed)
            self._started = True
        else:
            observation = self.mdp.reset_fleets(np.array([True]))
        return observation[0], self.mdp.books(0)

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One control step."""
        step = self.mdp.step(np.asarray(action)[None])
        if self.render_mode == "rgb_array":
            self._history.append(step)
        elif self.render_mode == "ansi":
            self._history = [step]
        return (
            step.observation[0],
            float(step.reward.total[0]),
            False,
            bool(step.truncated[0]),
            step_info(self.mdp, step, 0),
        )

    def render(self) -> Any:
        """The text panel, or the charts as an (height, width, 3) uint8 array."""
        if self.render_mode == "ansi":
            return ansi_frame(self.mdp.spec, self._history[-1] if self._history else None, self.mdp.books(0))
        if self.render_mode == "rgb_array":
            return rgb_frame(self.mdp.spec, self._history)
        return None


class FleetVectorEnv(gym.vector.VectorEnv[Any, Any, Any]):
    """Many fleets advanced by one compiled call per step; Gymnasium's vector API with next-step autoreset.

    The k-th episode of fleet e is the same as in `FleetEnv` runs of one fleet only if e is 0, or if each fleet is given
    a seed of its own; it depends on (seed, e, k) and never on the number of fleets or threads.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # type: ignore[misc]

    def __init__(
        self,
        spec: FleetSpec,
        shield: ShieldSpec,
        sampler: EpisodeSampler,
        *,
        num_envs: int,
        num_threads: int = 1,
        **options: Any,
    ) -> None:
        self.num_envs = num_envs
        self.mdp = FleetMdp(spec, shield, sampler, num_fleets=num_envs, num_threads=num_threads, **options)
        self.single_observation_space, self.single_action_space = make_spaces(self.mdp)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self._finished = np.zeros(num_envs, dtype=bool)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a run in all fleets, from one seed or from one for each of them (None: a random one)."""
        super().reset(seed=None if isinstance(seed, list) else seed)
        self._finished[:] = False
        if isinstance(seed, list):
            if len(seed) != self.num_envs:
                raise ValueError(f"got {len(seed)} seeds for {self.num_envs} fleets; give one each, or one number")
            return self.mdp.reset([self._draw_seed() if item is None else int(item) for item in seed]), {}
        return self.mdp.reset(self._draw_seed() if seed is None else int(seed)), {}

    def _draw_seed(self) -> int:
        return int(self.np_random.integers(2**31))

    def step(
        self, actions: npt.NDArray[np.float32]
    ) -> tuple[Observation, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        """One control step in every fleet.

        A fleet that was truncated in the last step begins its next episode instead.
        """
        finished = self._finished
        if finished.all():
            observation = self.mdp.reset_fleets(finished)
            self._finished = np.zeros(self.num_envs, dtype=bool)
            nothing = np.zeros(self.num_envs)
            info: dict[str, Any] = {"cost": nothing.copy(), "misses": nothing.copy()}
            return observation, nothing, self._finished.copy(), self._finished.copy(), info
        step = self.mdp.step(np.asarray(actions))
        observation, reward, truncated = step.observation, step.reward.total.copy(), step.truncated.copy()
        if finished.any():
            observation[finished] = self.mdp.reset_fleets(finished)
            reward[finished] = 0.0
            truncated[finished] = False
        self._finished = truncated
        info = {name: np.where(finished, 0.0, getattr(step.reward, name)) for name in ("cost", "misses")}
        return observation, reward, np.zeros(self.num_envs, dtype=bool), truncated.copy(), info
