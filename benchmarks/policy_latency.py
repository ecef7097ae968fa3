"""How long an exported policy takes to decide, and how exactly it repeats the trained network.

    python benchmarks/policy_latency.py [--decisions 5000]

Trains for one rollout (weights do not matter for either figure), exports to ONNX, and compares with Stable-Baselines3
on 1,000 random observations.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from rl_autoscale.agents.export import export_policy
from rl_autoscale.agents.learned import LearnedPolicy
from rl_autoscale.agents.ppo import PpoConfig, policy_layers, train_ppo
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.envs.sampler import ScenarioSampler
from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.workload.store import TraceStore


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=5000)
    parser.add_argument("--scenario", default="bursty")
    arguments = parser.parse_args()
    scenario = load_scenario(arguments.scenario)
    config = PpoConfig(total_timesteps=512, num_fleets=4, rollout_steps=128, num_threads=1, foresight_critic=False)
    sampler = ScenarioSampler(scenario, TraceStore([]), num_workloads=4)
    mdp = FleetMdp(scenario.fleet, scenario.shield, sampler, num_fleets=4)
    model = train_ppo([mdp], config)
    with tempfile.TemporaryDirectory() as folder:
        export_policy(policy_layers(model.policy), Schema.of(scenario.fleet), Path(folder), refuse=True, training={})
        policy = LearnedPolicy(folder)
        observations = np.random.default_rng(0).uniform(-5, 5, (1000, len(mdp.encoder.schema.features)))
        observations = observations.astype(np.float32)
        expected, _ = model.predict(observations, deterministic=True)
        difference = np.abs(policy.run_network(observations) - expected).max()
        policy.reset(scenario.fleet)
        assert mdp.state is not None
        state = mdp.state[0]
        taken = []
        for _ in range(arguments.decisions):
            wall_s, cpu_s = time.perf_counter(), time.thread_time()
            policy.decide(state)
            taken.append((time.perf_counter() - wall_s, time.thread_time() - cpu_s))
    (wall_p50, cpu_p50), (wall_p99, cpu_p99) = np.quantile(taken[100:], [0.5, 0.99], axis=0) * 1e3
    print(f"ONNX against SB3 on 1,000 random observations: max difference {difference:.2e}")
    print(f"one decision (encode, network, decode), {arguments.decisions} of them:")
    print(f"  wall time p50 {wall_p50:.3f} ms, p99 {wall_p99:.3f} ms (other processes' turns included)")
    print(f"  CPU time  p50 {cpu_p50:.3f} ms, p99 {cpu_p99:.3f} ms")


if __name__ == "__main__":
    main()
