"""Cocktail's ensembles of language models: what a majority vote costs beside the largest model alone.

    python benchmarks/ensembles.py
    python benchmarks/ensembles.py --wanted 0.82 --common 0.5 --policy headroom

Questions with one right answer (eight tokens), traffic of the scenario `chatbot`, every model of the ensemble on H100s
of its own, no refusal. An answer is in time when the last vote is: first token within 5 s, half a second per token.
Accuracies are MMLU as the models' makers report it, quoted from memory, to be replaced by one's own task's; how far
votes agree is not known, so independent ones stand beside ones that are partly in common. The policy's knob is the
cheapest of its sweep with which 98 % of the answers are in time.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np

from rl_autoscale.agents.registry import make_policy, policy_class
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.experiments.ensembles import answered_in_time, choose_members, fan_out, vote_accuracy
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.workload.store import TraceStore
from rl_autoscale.workload.trace import Workload

PROFILES = {
    "8b": ("llama-3.1-8b_h100_tp1", 0.694),
    "30b-a3b": ("qwen3-30b-a3b_h100_tp1", 0.814),
    "32b": ("qwen3-32b_h100_tp2", 0.836),
    "70b": ("llama-3.1-70b_h100_tp4", 0.836),
}
ACCURACY = {name: accuracy for name, (_, accuracy) in PROFILES.items()}
SETS = (("8b",), ("30b-a3b",), ("32b",), ("70b",), ("8b", "30b-a3b", "32b"), ("30b-a3b", "32b", "70b"), tuple(PROFILES))
OUTPUT_TOKENS = 8
IN_TIME = 0.98
PROMISE = {"ttft_slo_s": 5.0, "tpot_slo_s": 0.5, "timeout_s": 30}


def main() -> None:
    """One row per set of models, then the set that is chosen for an accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="cocktail")
    parser.add_argument("--wanted", type=float, nargs="+", default=[0.80, 0.82, 0.84, 0.87, 0.90])
    parser.add_argument("--common", type=float, default=0.5, help="share of questions on which all models agree")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--span-s", type=float, default=1800.0)
    asked = parser.parse_args()
    scenario = load_scenario("chatbot")
    built = [scenario.build_test(seed, TraceStore(()), span_s=asked.span_s).workload for seed in range(asked.seeds)]
    questions = [replace(one, output_tokens=np.full(one.num_requests, OUTPUT_TOKENS, np.int32)) for one in built]
    thousands = sum(one.num_requests for one in questions) / 1000.0
    print(f"| models | accuracy, independent | {asked.common:.0%} in common | answered in time | GPU-hours per 1,000 |")
    print("|---|---:|---:|---:|---:|")
    price = {}
    for members in SETS:
        in_time, hours = cheapest(scenario, questions, members, asked.policy)
        if len(members) == 1:
            price[members[0]] = hours
        alone, shared = (vote_accuracy([ACCURACY[name] for name in members], c) for c in (0.0, asked.common))
        per_thousand = f"{hours / thousands:.3f}" if in_time >= IN_TIME else "not reached"
        print(f"| {' + '.join(members)} | {alone:.1%} | {shared:.1%} | {in_time:.1%} | {per_thousand} |", flush=True)
    print("\n| accuracy wanted | members, independent votes | members, votes partly in common |\n|---|---|---|")
    for wanted in asked.wanted:
        print(f"| {wanted:.0%} | {chosen(price, wanted, 0.0)} | {chosen(price, wanted, asked.common)} |")


def chosen(price: dict[str, float], wanted: float, common: float) -> str:
    """The members for an accuracy, in words."""
    try:
        return " + ".join(choose_members(ACCURACY, price, wanted, common))
    except SpecError:
        return "out of reach"


def cheapest(
    scenario: Scenario, questions: list[Workload], members: tuple[str, ...], policy: str
) -> tuple[float, float]:
    """(share answered in time, GPU-hours) at the cheapest knob that reaches IN_TIME, else at the best one."""
    fleet = fleet_of(members)
    knob = policy_class(policy).KNOB
    if knob is None:
        raise SystemExit(f"policy {policy} has no knob to sweep; choose one that has: rl-autoscale policy ls")
    points = []
    for value in knob.sweep:
        found: list[tuple[float, float]] = []
        for seed, workload in enumerate(questions):
            simulator = SimFleet(fleet, fan_out(workload, members), seed=seed)
            knobs: dict[str, Any] = {knob.name: value, "admission": float("inf")}
            run_control_loop(simulator, make_policy(policy, **knobs), scenario.shield)
            hours = simulator.result().gpu_hours
            found.append((float(answered_in_time(simulator.batch.requests(), len(members)).mean()), hours))
        in_time, hours = np.mean([share for share, _ in found]), np.sum([each for _, each in found])
        points.append((float(in_time), float(hours)))
    good = [point for point in points if point[0] >= IN_TIME]
    return min(good, key=lambda point: point[1]) if good else max(points)


def fleet_of(members: tuple[str, ...]) -> FleetSpec:
    """A pool and a class per model."""
    startup = [{"name": "start", "mean_s": 60, "cv": 0.25}]
    return FleetSpec.from_dict(
        {
            "pools": [
                {
                    "name": name, "role": "mixed", "model": name, "profile": PROFILES[name][0], "min_replicas": 1,
                    "max_replicas": 60, "initial_replicas": 16, "startup": startup,
                }
                for name in members
            ],
            "classes": [{"name": name, "model": name, **PROMISE} for name in members],
            "control_interval_s": 10,
        }
    )  # fmt: skip


if __name__ == "__main__":
    main()
