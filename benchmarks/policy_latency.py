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
    config = PpoConfig(total_timesteps=512, num_fleets=4, rollout_steps=128, num_threads=1)
    sampler = ScenarioSampler(scenario, TraceStore([]), num_workloads=4)
    mdp = FleetMdp(scenario.fleet, scenario.shield, sampler, num_fleets=4)
    model = train_ppo(mdp, config)
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
        taken_s = []
        for _ in range(arguments.decisions):
            started = time.perf_counter()
            policy.decide(state)
            taken_s.append(time.perf_counter() - started)
    p50, p99 = np.quantile(taken_s[100:], [0.5, 0.99]) * 1e3
    print(f"ONNX against SB3 on 1,000 random observations: max difference {difference:.2e}")
    print(
        f"decision (encode, network, decode): p50 {p50:.3f} ms, p99 {p99:.3f} ms over {arguments.decisions} decisions"
    )


if __name__ == "__main__":
    main()
