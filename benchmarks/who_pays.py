"""Who pays when refusal weighs requests by their work: attainment by length of prompt, at equal attainment over all.

    python benchmarks/who_pays.py --traces FOLDER [--scenarios mooncake azure-conversation] [--attainment 0.95]

A policy plays the first half hour of a scenario's test traffic at every price of its dial, with each selectivity
(docs/design/early-refusal.md). Between the two prices around the attainment asked for, GPU-hours and the share of each
length are interpolated, so that lines differ in who is served, not in how many.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from rl_autoscale.agents.learned import LearnedPolicy
from rl_autoscale.agents.policy_file import price_sweep
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.state import FloatArray
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.workload.store import TraceStore

SPAN_S = 1800.0
LENGTHS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 0.95), (0.95, 0.99), (0.99, 1.0))
"""Ranges of a prompt's rank by length."""


def played(scenario: Scenario, policy: LearnedPolicy, seed: int, store: TraceStore) -> FloatArray:
    """Attainment, GPU-hours, and the attainment of each range of lengths."""
    fleet = SimFleet(scenario.fleet, scenario.build_test(seed, store, span_s=SPAN_S).workload, seed=seed)
    run_control_loop(fleet, policy, scenario.shield)
    gpu_hours = float(fleet.batch.gpu_s().sum()) / 3600
    fleet.result()
    requests = fleet.batch.requests()
    met = requests["slo_met"].astype(np.float64)
    rank = np.argsort(np.argsort(requests["prompt_tokens"], kind="stable")) / len(met)
    of_lengths = [met[(rank >= low) & (rank < high)].mean() for low, high in LENGTHS]
    return np.array([met.mean(), gpu_hours, *of_lengths])


def at_attainment(points: FloatArray, attainment: float) -> FloatArray | None:
    """Rows of `played`, by attainment, interpolated to one; None where it is not reached, or always exceeded."""
    points = points[np.argsort(points[:, 0])]
    if not points[0, 0] <= attainment <= points[-1, 0]:
        return None
    return np.array([np.interp(attainment, points[:, 0], column) for column in points.T])


def main() -> None:
    """A line per scenario, attainment and selectivity; means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=["mooncake", "azure-code", "azure-conversation"])
    parser.add_argument("--policy", default="pretrained/single-pool")
    parser.add_argument("--selectivity", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    parser.add_argument("--attainment", nargs="+", type=float, default=[0.95, 0.98])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--traces", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    store = TraceStore(options.traces)
    ranges = [f"{low:.0%} to {high:.0%}" for low, high in LENGTHS]
    print(f"| scenario | attainment | selectivity | GPU-hours | {' | '.join(ranges)} |")
    print("|---|---:|---:|---:|" + "---:|" * len(LENGTHS))
    for name in options.scenarios:
        scenario = load_scenario(name)
        for selectivity in options.selectivity:
            points = []
            for price in price_sweep(LearnedPolicy(options.policy).card):
                policy = LearnedPolicy(options.policy, miss_price=price, selectivity=selectivity)
                points.append(np.mean([played(scenario, policy, s, store) for s in range(options.seeds)], axis=0))
            for attainment in options.attainment:
                found = at_attainment(np.array(points), attainment)
                cells = ["not reached"] if found is None else [f"{found[1]:.2f}", *(f"{x:.1%}" for x in found[2:])]
                print(f"| `{name}` | {attainment:.4g} | {selectivity:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
