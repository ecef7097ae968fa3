"""One option of a fleet at several values, everything else the same: what eviction, drain or shared GPUs are worth.

    python benchmarks/fleet_options.py --scenario chiron --policies chiron-robust --vary eviction=recompute,host
    python benchmarks/fleet_options.py --scenario bursty --policies llumnix:low=180 --vary drain=wait,migrate
    python benchmarks/fleet_options.py --scenario model-swapping --policies static:replicas=1,qlm

Test traffic, no refusal at the gateway; means over seeds. Requests, start-ups and routing are the same in every row.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from rl_autoscale.agents.registry import make_policy
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.layout import Outcome
from rl_autoscale.workload.store import TraceStore
from rl_autoscale.workload.trace import Workload


def main() -> None:
    """Run every row and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", required=True)
    parser.add_argument(
        "--policies", required=True, help="with knobs: qlm,llumnix:low=180,static:replicas=9+batch_cap=1"
    )
    parser.add_argument("--vary", help="option=value,value of the scenario's fleet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--span-s", type=float, help="cut the traffic")
    arguments = parser.parse_args()
    scenario, store = load_scenario(arguments.scenario), TraceStore()
    seeds = range(arguments.seeds)
    traffic = [scenario.build_test(seed, store, span_s=arguments.span_s).workload for seed in seeds]
    for name in arguments.policies.split(","):
        for label, variant in variants(scenario, arguments.vary):
            started_s = time.process_time()
            rows = [measure(variant, workload, name, seed) for seed, workload in enumerate(traffic)]
            means = {key: np.mean([row[key] for row in rows]) for key in rows[0]}
            figures = "  ".join(f"{key} {value:.4g}" for key, value in means.items())
            print(f"{name} {label}: {figures}  ({time.process_time() - started_s:.0f} s of CPU)", flush=True)


def variants(scenario: Scenario, vary: str | None) -> list[tuple[str, Scenario]]:
    """The scenario under each value of the option that varies."""
    if vary is None:
        return [("", scenario)]
    option, values = vary.split("=")
    fleet = scenario.fleet.model_dump()
    return [
        (f"{option}={value}", scenario.model_copy(update={"fleet": type(scenario.fleet)(**{**fleet, option: value})}))
        for value in values.split(",")
    ]


def measure(scenario: Scenario, workload: Workload, policy: str, seed: int) -> dict[str, float]:
    """One episode: cost, attainment in all and by class, completion of each class, and what was moved."""
    name, _, knobs = policy.partition(":")
    given = dict(item.split("=") for item in knobs.split("+") if item)
    typed = {key: int(value) if value.isdigit() else float(value) for key, value in given.items()}
    fleet = SimFleet(scenario.fleet, workload, seed=seed)
    run_control_loop(fleet, make_policy(name, **typed), scenario.shield)
    result, requests, pools = fleet.result(), fleet.batch.requests(), fleet.batch.pools()
    figures = {"GPU-hours": result.gpu_hours, "usd": result.cost_usd, "attainment": result.slo_attainment}
    for c, item in enumerate(result.classes):
        ended = (requests["class_index"] == c) & (requests["outcome"] == Outcome.FINISHED)
        took_s = (requests["end_s"] - requests["arrival_s"])[ended]
        figures[item.name] = item.slo_attainment
        figures[f"{item.name} mean s"] = float(took_s.mean())
    figures["last end s"] = float(np.nanmax(requests["end_s"]))
    for count in ("evictions", "preemptions", "migrations", "moved_blocks", "num_starts", "reclaimed"):
        figures[count] = float(pools[count].sum())
    return figures


if __name__ == "__main__":
    main()
