"""INFaaS among variants of one model: kinds of GPU, and weights of 16 or 4 bits, against growing one variant.

    python benchmarks/variants.py

Profiles are rooflines of Llama-3.1-8B; everything else is the scenario `heterogeneous`: prices, start-ups, traffic of
the test; no refusal. A variant is a pool; `infaas` chooses among those it is given.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.experiments.episodes import policy_for, run_episode
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.profile_file import write_profile
from rl_autoscale.sim.roofline import GPUS, MODELS, Roofline
from rl_autoscale.workload.store import TraceStore

VARIANTS = {
    "a100": ("A100", 16),
    "a100-4bit": ("A100", 4),
    "l40s": ("L40S", 16),
    "l40s-4bit": ("L40S", 4),
}
FLEETS = (("a100",), ("l40s",), ("a100-4bit",), ("l40s-4bit",), ("a100", "l40s"), tuple(VARIANTS))


def main() -> None:
    """One row per fleet and slack; means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slack", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--span-s", type=float, default=1800.0)
    asked = parser.parse_args()
    print("| variants | slack | attainment | dollars | GPU-hours of each |")
    print("|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (gpu, bits) in VARIANTS.items():
            profile = Roofline(MODELS["llama-3.1-8b"], GPUS[gpu], weight_bits=bits).profile(name=name)  # type: ignore[arg-type]
            write_profile(profile, Path(folder) / f"{name}.yaml")
        for names in FLEETS:
            scenario = with_variants(names, Path(folder))
            traffic = [scenario.build_test(s, TraceStore(()), span_s=asked.span_s).workload for s in range(asked.seeds)]
            for slack in asked.slack:
                knobs = {"slack": slack, "admission": float("inf")}
                ends = [
                    run_episode(scenario, w, policy_for("infaas", knobs, w), seed=seed)
                    for seed, w in enumerate(traffic)
                ]
                attainment, dollars = np.mean([(end.slo_attainment, end.cost_usd) for end in ends], axis=0)
                hours = np.mean([[pool.gpu_hours for pool in end.pools] for end in ends], axis=0)
                shown = ", ".join(f"{name} {used:.1f}" for name, used in zip(names, hours, strict=True))
                print(f"| {len(names)} | {slack:g} | {attainment:.1%} | {dollars:.1f} | {shown} |", flush=True)


def with_variants(names: tuple[str, ...], folder: Path) -> Scenario:
    """The scenario with a pool per variant, each with the price and start-up of its kind of GPU."""
    scenario = load_scenario("heterogeneous")
    fleet = scenario.fleet.model_dump()
    by_gpu = {pool["name"]: pool for pool in fleet["pools"]}
    fleet["pools"] = [
        by_gpu[name.split("-")[0]] | {"name": name, "profile": str(folder / f"{name}.yaml")} for name in names
    ]
    return scenario.model_copy(update={"fleet": FleetSpec.from_dict(fleet)})


if __name__ == "__main__":
    main()
