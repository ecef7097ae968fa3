"""The Gymnasium contract, reproducibility, and what info promises."""

from __future__ import annotations

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rl_autoscale.envs import FLEET_ENV_ID, register_envs
from rl_autoscale.envs.fleet_env import FleetEnv, FleetVectorEnv
from rl_autoscale.envs.observation import LIMIT
from tests.envs.toy import SHIELD, sampler, toy_spec


def make_env(**options: object) -> FleetEnv:
    return FleetEnv(toy_spec(), SHIELD, sampler(), **options)  # type: ignore[arg-type]


def rollout(env: gym.Env, seed: int, num_steps: int = 45) -> tuple[list[np.ndarray], list[float]]:
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=seed)
    observations, rewards = [observation], []
    for _ in range(num_steps):
        observation, reward, _, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        rewards.append(float(reward))
        if truncated:
            observation, _ = env.reset()
        observations.append(observation)
    return observations, rewards


def test_passes_gymnasiums_checker():
    check_env(make_env(), skip_render_check=True)


def test_one_import_registers_the_environment():
    script = "import gymnasium as gym, rl_autoscale.envs; print(gym.spec('rl_autoscale/Fleet-v0').id)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "rl_autoscale/Fleet-v0\n"


def test_passes_sb3s_checker():
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(make_env())


def test_is_registered_once_and_made_by_name():
    register_envs()
    assert FLEET_ENV_ID in gym.registry
    env = gym.make(FLEET_ENV_ID, scenario="bursty", miss_price=10.0)
    observation, info = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    assert info["miss_price"] == pytest.approx(10.0)


def test_same_seed_and_actions_give_the_same_trajectory_across_episodes():
    first, second = rollout(make_env(), seed=3), rollout(make_env(), seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert first[1] == second[1]
    assert rollout(make_env(), seed=4)[1] != first[1]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_vector_fleet_zero_is_the_single_fleet(num_threads):
    single = make_env()
    vector = FleetVectorEnv(toy_spec(), SHIELD, sampler(), num_envs=3, num_threads=num_threads)
    alone, _ = single.reset(seed=5)
    together, _ = vector.reset(seed=5)
    assert np.array_equal(alone, together[0])
    rng = np.random.default_rng(1)
    for _ in range(19):
        action = rng.uniform(-1, 1, (3, single.action_space.shape[0])).astype(np.float32)
        alone, reward, _, _, _ = single.step(action[0])
        together, rewards, _, _, _ = vector.step(action)
        assert np.array_equal(alone, together[0])
        assert reward == rewards[0]


def test_vector_env_does_not_depend_on_threads_and_survives_autoreset():
    def run(num_threads: int) -> np.ndarray:
        env = FleetVectorEnv(toy_spec(), SHIELD, sampler(), num_envs=4, num_threads=num_threads)
        observation, _ = env.reset(seed=2)
        rng = np.random.default_rng(2)
        seen = [observation]
        truncations = 0
        for _ in range(50):
            observation, _, _, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
            truncations += int(truncated.sum())
            seen.append(observation)
        assert truncations >= 8  # two ends of episode in every fleet
        return np.stack(seen)

    assert np.array_equal(run(1), run(2))


def test_horizon_is_truncation_never_termination():
    env = make_env()
    env.reset(seed=0)
    flags = [env.step(env.action_space.sample())[2:4] for _ in range(20)]
    assert flags[-1] == (False, True)
    assert all(flag == (False, False) for flag in flags[:-1])


def test_info_carries_terms_that_make_up_the_reward():
    env = make_env()
    env.reset(seed=0)
    for _ in range(10):
        _, reward, _, _, info = env.step(np.full(env.action_space.shape, -1.0, np.float32))
        terms, price = info["reward_terms"], info["miss_price"]
        assert reward == pytest.approx(-(terms["cost"] + price * terms["misses"]) / (1 + price / 20.0))
    assert {"gpu_hours", "slo_attainment", "queue_length", "ready", "target_replicas"} <= info.keys()


def test_summed_reward_is_the_reported_metric():
    env = make_env()
    env.reset(seed=0)
    total, info = 0.0, {}
    for _ in range(20):
        _, reward, _, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
        total += float(reward)
    assert truncated
    price = info["miss_price"]
    result = env.mdp.batch.requests(0)
    arrived, missed = len(result), env.mdp.batch.missed()[0].sum()
    expected = -(info["cost_over_ideal"] + price * missed / arrived) / (1 + price / 20.0)
    assert total / 20 == pytest.approx(expected, rel=1e-6)


def test_observations_stay_in_bounds_under_extreme_actions_and_overload():
    env = FleetEnv(toy_spec(), SHIELD, sampler(rate_per_s=200.0))
    observation, _ = env.reset(seed=0)
    for step in range(19):
        action = np.full(env.action_space.shape, -1.0 if step % 2 else 1.0, np.float32)
        observation, reward, _, _, _ = env.step(action)
        assert np.isfinite(reward)
        assert np.abs(observation).max() <= LIMIT
        assert observation.dtype == np.float32


def test_renders_text_and_pictures():
    env = make_env(render_mode="ansi")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert "GPU-hours" in env.render()
    env = make_env(render_mode="rgb_array")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    picture = env.render()
    assert picture.dtype == np.uint8
    assert picture.shape == (480, 640, 3)
    assert picture.std() > 0


def test_unknown_render_mode_is_refused():
    with pytest.raises(ValueError, match="human"):
        make_env(render_mode="human")
