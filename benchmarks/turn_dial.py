"""The dial turned while a policy is at work: asked for one attainment until half-time, and for another after it.

    python benchmarks/turn_dial.py --traces FOLDER [--scenarios azure-conversation mooncake] [--asked 0.9 0.99]

As an edit of the controller's configuration file does it (docs/live.md): the policy goes on with what it has seen of
the traffic. Test traffic of the scenario, refusal as the policy wants it; requests count for the half in which they
arrive, GPU time for the half in which it is paid. Lines that ask the same of both halves are the yardstick.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from rl_autoscale.agents.registry import make_policy
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.state import FleetState
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.workload.store import TraceStore


def turned(
    scenario: Scenario, policy: str, asked: tuple[float, float], seed: int, store: TraceStore
) -> tuple[float, float, float, float]:
    """Attainment and GPU-hours of the first half, then of the second."""
    workload = scenario.build_test(seed, store).workload
    half_s = workload.span_s / 2
    fleet = SimFleet(scenario.fleet, workload, seed=seed)
    at_work = make_policy(policy, attainment=asked[0])
    paid_gpu_s: list[float] = []

    def on_step(state: FleetState, *_: object) -> None:
        if not paid_gpu_s and float(state.time_s) >= half_s:
            paid_gpu_s.append(float(fleet.batch.gpu_s().sum()))
            if asked[1] != asked[0]:
                at_work.turn({"attainment": asked[1]})

    run_control_loop(fleet, at_work, scenario.shield, on_step=on_step)
    requests, total_gpu_s = fleet.batch.requests(), float(fleet.batch.gpu_s().sum())
    early = requests["arrival_s"] < half_s
    met = requests["slo_met"]
    first_gpu_s = paid_gpu_s[0]
    return met[early].mean(), first_gpu_s / 3600, met[~early].mean(), (total_gpu_s - first_gpu_s) / 3600


def main() -> None:
    """A line per scenario and pair of attainments; means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=["azure-conversation", "mooncake"])
    parser.add_argument("--policy", default="pretrained/single-pool")
    parser.add_argument("--asked", nargs=2, type=float, default=[0.9, 0.99], metavar=("LOW", "HIGH"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--traces", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    store = TraceStore(options.traces)
    low, high = options.asked
    print("| scenario | asked | first half | | then | |\n|---|---|---:|---:|---:|---:|")
    for name in options.scenarios:
        scenario = load_scenario(name)
        for asked in ((low, low), (low, high), (high, low), (high, high)):
            runs = [turned(scenario, options.policy, asked, seed, store) for seed in range(options.seeds)]
            one, one_hours, two, two_hours = np.mean(runs, axis=0)
            words = f"{asked[0]:.4g}, then {asked[1]:.4g}" if asked[0] != asked[1] else f"{asked[0]:.4g} throughout"
            print(f"| `{name}` | {words} | {one:.1%} | {one_hours:.2f} | {two:.1%} | {two_hours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
