"""What deciding replicas and admission together is worth, and what batch work costs that fills the slack.

    python benchmarks/joint_backpressure.py --traces FOLDER              # half an hour of one core
    python benchmarks/joint_backpressure.py --span-s 600 --seeds 1       # a look

First, on scenarios with bursts or overload, GPU-hours at equal attainment with *admission alone* (a fixed fleet that
refuses early), *replicas alone* (the policy scales, nothing is refused) and *both*; knobs in hindsight on the test
traffic, for a rule and for the shipped policy. Second, on a fleet shared with batch work: the same policy with all of
the traffic, without the batch class, and with the batch class alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.experiments.analysis import analyse
from rl_autoscale.experiments.benchmark import run_benchmark
from rl_autoscale.experiments.episodes import policy_for, run_episode
from rl_autoscale.experiments.grid import BenchmarkConfig, PolicySweep
from rl_autoscale.workload.store import TraceStore

TARGETS = (0.9, 0.95, 0.98)
PPO = PolicySweep(policy="learned", label="PPO", knobs={"path": "pretrained/single-pool"})
RULES = (PolicySweep(policy="static"), PolicySweep(policy="headroom"))
PARTS = (
    ("neither (fixed fleet)", "static", "off"), ("admission alone (fixed fleet)", "static", "on"),
    ("replicas alone, headroom", "headroom", "off"), ("both, headroom", "headroom", "on"),
    ("replicas alone, PPO", "PPO", "off"), ("both, PPO", "PPO", "on"),
)  # fmt: skip


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=["bursty", "sudden-burst", "tool-calls", "real-time"])
    parser.add_argument("--shared", default="multi-tenant", help="scenario with a batch class")
    parser.add_argument("--policy", default="pretrained/multi-tenant", help="for it; asked for 98 %%")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--span-s", type=float, default=1800.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--traces", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/joint-backpressure"))
    asked = parser.parse_args()
    config = BenchmarkConfig(
        scenarios=tuple(asked.scenarios), policies=(*RULES, PPO), num_seeds=asked.seeds, max_knob_values=6,
        refinements=1, targets=TARGETS, span_s=asked.span_s, asked=(0.98,),
    )  # fmt: skip
    rows = run_benchmark(
        config, asked.out, num_processes=asked.processes, trace_folders=asked.traces,
        progress=lambda what, done, total: print(f"{what}: {done}/{total}", end="\r", flush=True),
    )  # fmt: skip
    findings = analyse(rows, targets=TARGETS)
    print("| decided | " + " | ".join(f"{one.scenario}, {t:.0%}" for one in findings for t in TARGETS) + " |")
    print("|---|" + "---:|" * len(findings) * len(TARGETS))
    for label, policy, refusal in PARTS:
        entries = [one.entry(policy, refusal) for one in findings]  # type: ignore[arg-type]
        hours = [estimate for entry in entries if entry is not None for estimate in entry.hours]
        print(f"| {label} | " + " | ".join(f"{item.value:.2f}" if item.reached else "-" for item in hours) + " |")
    print()
    share_a_fleet(load_scenario(asked.shared), asked.policy, TraceStore(asked.traces), asked.seeds, asked.span_s)


def share_a_fleet(scenario: Scenario, policy: str, store: TraceStore, seeds: int, span_s: float) -> None:
    """Cost and attainment by class with all classes, without batch, and with batch alone."""
    names = [item.name for item in scenario.fleet.classes]
    batch = np.array([item.kind == "batch" for item in scenario.fleet.classes])
    print("| traffic | GPU-hours | " + " | ".join(f"{name} in time" for name in names) + " |")
    print("|---|" + "---:|" * (1 + len(names)))
    for label, kept in (("all classes", batch | ~batch), ("without batch", ~batch), ("batch alone", batch)):
        figures = []
        for seed in range(seeds):
            workload = scenario.build_test(seed, store, span_s=span_s).workload
            workload = workload.take(np.flatnonzero(kept[workload.class_index]))
            chosen = policy_for("learned", {"path": policy, "attainment": 0.98}, workload)
            result = run_episode(scenario, workload, chosen, seed=seed)
            figures.append([result.gpu_hours, *(item.slo_attainment for item in result.classes)])
        hours, *attained = np.mean(figures, axis=0)
        shown = [f"{share:.2%}" if keep else "-" for share, keep in zip(attained, kept, strict=True)]
        print(f"| {label} | {hours:.2f} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
