"""Asked for an attainment: what is delivered, and at what cost, by policies that can be asked.

    python benchmarks/asked.py --traces FOLDER                                   # 40 minutes of one core
    python benchmarks/asked.py --asked 0.98 --seeds 1 --scenarios chatbot bursty # a look
    python benchmarks/asked.py --without-forecast --traces FOLDER                # and without the miss forecast
    python benchmarks/asked.py --asked 0.98 --hysteresis 0.1 0.2 --traces FOLDER # and with fewer scaling actions

Test traffic (or, to choose constants by, validation traffic), early refusal on, nothing chosen on it. A trained policy
runs on the scenarios of its schema.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from rl_autoscale.agents.policy_file import read_card
from rl_autoscale.envs.scenario import Scenario, load_scenario, shipped_scenario_names
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.episodes import policy_for, run_episode
from rl_autoscale.experiments.suites import shipped_policies_for
from rl_autoscale.workload.store import TraceStore

RULE, NETWORK, ALONE = "headroom-budget", "network", "network without its forecast"
HELD = "network, hysteresis"


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=shipped_scenario_names())
    parser.add_argument("--learned", nargs="+", default=[], help="trained policies; default those that ship")
    parser.add_argument("--asked", nargs="+", type=float, default=[0.95, 0.98, 0.99])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--span-s", type=float, default=1800.0)
    parser.add_argument("--validation", action="store_true", help="validation traffic instead of the test's")
    parser.add_argument("--without-forecast", action="store_true", help="also with the error budget alone")
    parser.add_argument("--hysteresis", nargs="+", type=float, default=[], help="also with each of these")
    parser.add_argument("--rule", action="store_true", help=f"also {RULE}, as it comes")
    parser.add_argument("--traces", type=Path, nargs="*", default=[])
    asked = parser.parse_args()
    store = TraceStore(asked.traces)
    held = [f"{HELD} {share:g}" for share in asked.hysteresis]
    whom = [NETWORK, *([ALONE] if asked.without_forecast else []), *held, *([RULE] if asked.rule else [])]
    print("| scenario | " + " | ".join(f"{who}, {share:.0%}" for share in asked.asked for who in whom) + " |")
    print("|---|" + "---:|" * len(whom) * len(asked.asked))
    figures = []
    for name in asked.scenarios:
        scenario = load_scenario(name)
        path = fitting(scenario, asked.learned or shipped_policies_for([name]))
        if path is None:
            continue
        build = scenario.build_validation if asked.validation else scenario.build_test
        traffic = [build(seed, store, span_s=asked.span_s).workload for seed in range(asked.seeds)]
        row = []
        for share in asked.asked:
            for who in whom:
                ends = [run_episode(scenario, w, chosen(who, path, share, w), seed=s) for s, w in enumerate(traffic)]
                figures_of = [
                    (end.slo_attainment, end.gpu_hours, end.scale_ups + end.scale_downs, end.reversals) for end in ends
                ]
                row.append(np.mean(figures_of, axis=0))
        figures.append(row)
        print(f"| {name} | " + " | ".join(f"{share:.1%} at {hours:.2f}" for share, hours, *_ in row) + " |", flush=True)
    if not figures:
        parser.error("no policy fits any of these scenarios; name one with --learned")
    summarise(np.array(figures), asked.asked, whom)


def fitting(scenario: Scenario, paths: list[str]) -> str | None:
    """The first policy of the scenario's schema."""
    schema = Schema.of(scenario.fleet).digest
    return next((path for path in paths if read_card(Path(path))["schema"] == schema), None)


def chosen(who: str, path: str, attainment: float, workload: Any) -> Any:
    """A policy asked for an attainment."""
    if who == RULE:
        return policy_for(RULE, {"attainment": attainment, "admission": 1.0}, workload)
    knobs: dict[str, Any] = {"path": path, "attainment": attainment, "forecast": who != ALONE}
    if who.startswith(HELD):
        knobs["hysteresis"] = float(who.removeprefix(HELD))
    return policy_for("learned", knobs, workload)


def summarise(figures: Any, asked: list[float], whom: list[str]) -> None:
    """Over scenarios: how many end near what was asked, and what it took over the first one's; (scenarios, k, 4)."""
    over = "GPU-hours | scaling actions | reversals |"
    print(f"\n| asked | | within a point | short by more | delivered, median | over the first: {over}")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for k, share in enumerate(asked):
        for j, who in enumerate(whom):
            delivered = figures[:, k * len(whom) + j, 0]
            first, this = figures[:, k * len(whom), 1:], figures[:, k * len(whom) + j, 1:]
            hours = np.exp(np.log(this[:, 0] / first[:, 0]).mean())
            actions, reversals = this[:, 1:].sum(axis=0) / np.maximum(first[:, 1:].sum(axis=0), 1.0)
            near, short = (np.abs(delivered - share) <= 0.01).sum(), (delivered < share - 0.01).sum()
            counts = f"{near} of {len(delivered)} | {short} | {np.median(delivered):.1%}"
            print(f"| {share:.0%} | {who} | {counts} | {hours:.3f} | {actions:.2f} | {reversals:.2f} |")


if __name__ == "__main__":
    main()
