"""What deciding replicas and admission together is worth, and what batch work costs that fills the slack.

    python benchmarks/joint_backpressure.py --traces FOLDER              # half an hour of one core
    python benchmarks/joint_backpressure.py --span-s 600 --seeds 1       # a look

First, on scenarios with bursts or overload, GPU-hours at equal attainment with *admission alone* (a fixed fleet that
refuses early), *replicas alone* (the policy scales, nothing is refused) and *both*; knobs in hindsight on the test
traffic, for a rule and for the shipped policy. Second, on a fleet shared with batch work: the same policy asked for one
attainment with all of the traffic, without the batch class, and with the batch class alone; and asked for an attainment
of each class, a lower one of batch work.
"""

from __future__ import annotations

import argparse
import sys
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


ASKED = 0.98
ASKED_OF_BATCH = 0.90


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=["bursty", "sudden-burst", "tool-calls", "real-time"])
    parser.add_argument("--shared", default="multi-tenant", help="scenario with a batch class")
    parser.add_argument("--policy", default="pretrained/multi-tenant", help="for it; asked for 98 %%")
    parser.add_argument("--only-shared", action="store_true", help="the second table alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--span-s", type=float, default=1800.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--traces", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/joint-backpressure"))
    asked = parser.parse_args()
    if not asked.only_shared:
        decide_together(asked)
        print()
    share_a_fleet(load_scenario(asked.shared), asked.policy, TraceStore(asked.traces), asked.seeds, asked.span_s)


def decide_together(asked: argparse.Namespace) -> None:
    """GPU-hours at equal attainment of admission alone, replicas alone, and both."""
    config = BenchmarkConfig(
        scenarios=tuple(asked.scenarios), policies=(*RULES, PPO), num_seeds=asked.seeds, max_knob_values=6,
        refinements=1, targets=TARGETS, span_s=asked.span_s, asked=(0.98,),
    )  # fmt: skip
    rows = run_benchmark(
        config, asked.out, num_processes=asked.processes, trace_folders=asked.traces,
        progress=lambda what, done, total: print(f"{what}: {done}/{total}", end="\r", file=sys.stderr),
    )  # fmt: skip
    findings = analyse(rows, targets=TARGETS)
    print("| decided | " + " | ".join(f"{one.scenario}, {t:.0%}" for one in findings for t in TARGETS) + " |")
    print("|---|" + "---:|" * len(findings) * len(TARGETS))
    for label, policy, refusal in PARTS:
        entries = [one.entry(policy, refusal) for one in findings]  # type: ignore[arg-type]
        hours = [estimate for entry in entries if entry is not None for estimate in entry.hours]
        print(f"| {label} | " + " | ".join(f"{item.value:.2f}" if item.reached else "-" for item in hours) + " |")


def share_a_fleet(scenario: Scenario, policy: str, store: TraceStore, seeds: int, span_s: float) -> None:
    """Cost and attainment by class with all classes, asked together or apart, without batch, and with batch alone."""
    names = [item.name for item in scenario.fleet.classes]
    batch = np.array([item.kind == "batch" for item in scenario.fleet.classes])
    print("| traffic | GPU-hours | " + " | ".join(f"{name} in time" for name in names) + " |")
    print("|---|" + "---:|" * (1 + len(names)))
    apart = {item.name: ASKED_OF_BATCH if item.kind == "batch" else ASKED for item in scenario.fleet.classes}
    for label, kept, asked in (
        (f"all classes, {ASKED:.0%} of all", batch | ~batch, ASKED),
        (f"all classes, {ASKED:.0%} of each, {ASKED_OF_BATCH:.0%} of batch", batch | ~batch, apart),
        (f"without batch, {ASKED:.0%} of all", ~batch, ASKED),
        (f"without batch, {ASKED:.0%} of each", ~batch, apart),
        ("batch alone", batch, ASKED),
    ):
        figures = []
        for seed in range(seeds):
            workload = scenario.build_test(seed, store, span_s=span_s).workload
            workload = workload.take(np.flatnonzero(kept[workload.class_index]))
            chosen = policy_for("learned", {"path": policy, "attainment": asked}, workload)
            result = run_episode(scenario, workload, chosen, seed=seed)
            figures.append([result.gpu_hours, *(item.slo_attainment for item in result.classes)])
        hours, *attained = np.mean(figures, axis=0)
        shown = [f"{share:.2%}" if keep else "-" for share, keep in zip(attained, kept, strict=True)]
        print(f"| {label} | {hours:.2f} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
