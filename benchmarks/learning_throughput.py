"""PPO's steps per second, learning included: fleets advanced together in one compiled call, or one by one from Python.

    python benchmarks/learning_throughput.py [--fleets 16] [--rollouts 4] [--repeats 3] [--json]

The same network, settings and number of fleets. ``together``: `SB3Fleets` on ``--threads`` threads. ``one by one``:
Stable-Baselines3's `DummyVecEnv` of as many `FleetEnv`, the way Gymnasium environments are commonly stepped. The two
alternate within one process, and the median of the ratios is reported: a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from stable_baselines3.common.vec_env import DummyVecEnv

from rl_autoscale.agents.ppo import PpoConfig, build_ppo
from rl_autoscale.agents.sb3_fleets import SB3Fleets
from rl_autoscale.envs.fleet_env import FleetEnv
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.sampler import ScenarioSampler
from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.workload.store import TraceStore


def learner(scenario_name: str, config: PpoConfig, *, together: bool) -> Any:
    """An untrained PPO over the chosen kind of environment."""
    scenario, store = load_scenario(scenario_name), TraceStore([])

    def sampler() -> ScenarioSampler:
        return ScenarioSampler(scenario, store)

    mdp = FleetMdp(
        scenario.fleet, scenario.shield, sampler(), num_fleets=config.num_fleets, num_threads=config.num_threads,
        refuse=config.refuse,
    )  # fmt: skip
    model = build_ppo([mdp], config)
    if not together:
        make = [
            lambda: FleetEnv(scenario.fleet, scenario.shield, sampler(), refuse=config.refuse)
            for _ in range(config.num_fleets)
        ]
        model.set_env(DummyVecEnv(make))
    assert isinstance(model.get_env(), SB3Fleets) is together
    return model


def timed(model: Any, timesteps: int) -> dict[str, float]:
    """Seconds of learning for so many more steps, and of them those spent on the network's updates."""
    update_s = 0.0
    update = model.train

    def watched() -> None:
        nonlocal update_s
        started = time.perf_counter()
        update()
        update_s += time.perf_counter() - started

    model.train = watched
    wall, cpu = time.perf_counter(), time.process_time()
    model.learn(timesteps, reset_num_timesteps=False)
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    model.train = update
    return {"steps_per_s": timesteps / wall_s, "steps_per_cpu_s": timesteps / cpu_s, "update_share": update_s / wall_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", default="azure-conversation")
    parser.add_argument("--fleets", type=int, default=16, help="fleets; a rollout stays 2,048 steps")
    parser.add_argument("--rollouts", type=int, default=4, help="rollouts in each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    # One fleet at a time, nothing knows what is to come: both learn without the critic that sees it.
    config = PpoConfig(
        num_fleets=options.fleets,
        rollout_steps=2048 // options.fleets,
        num_threads=options.threads,
        foresight_critic=False,
    )
    timesteps = options.rollouts * config.rollout_steps * config.num_fleets
    names = ("together", "one by one")
    models = {name: learner(options.scenario, config, together=name == "together") for name in names}
    for model in models.values():
        model.learn(config.rollout_steps * config.num_fleets)  # compiles and draws the first episodes
    rounds = [{name: timed(model, timesteps) for name, model in models.items()} for _ in range(options.repeats)]
    medians = {
        name: {key: statistics.median(item[name][key] for item in rounds) for key in rounds[0][name]} for name in models
    }
    keys = ("steps_per_s", "steps_per_cpu_s")
    ratio = {k: statistics.median(item["together"][k] / item["one by one"][k] for item in rounds) for k in keys}
    if options.json:
        print(json.dumps({"timesteps": timesteps, "medians": medians, "ratio": ratio}, indent=2))
        return
    for name, found in medians.items():
        print(
            f"{name:<11} {found['steps_per_s']:>8,.0f} steps/s, {found['steps_per_cpu_s']:,.0f} per CPU second, "
            f"{found['update_share']:.0%} of the time in the network's updates"
        )
    print(f"ratio: {ratio['steps_per_s']:.1f} by wall time, {ratio['steps_per_cpu_s']:.1f} by CPU time")


if __name__ == "__main__":
    main()
