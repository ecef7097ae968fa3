"""How far a trained policy, the rules and a clairvoyant are from the best that needs no foresight.

    python benchmarks/causal_optimum.py                              # half an hour of one core
    python benchmarks/causal_optimum.py --startup-s 60 --seeds 2     # a look
    python benchmarks/causal_optimum.py --startup-s 60 --scenario-to rates.yaml
    rl-autoscale train --scenario rates.yaml --start-from pretrained/single-pool --out runs/rates
    python benchmarks/causal_optimum.py --startup-s 60 --learned pretrained/single-pool runs/rates/policy

The fleet of `bursty` under its three Markov-modulated rates alone (no crowd), with starts of several lengths. The
planner knows the generator and which rate is in force, but no jump to come
(rl_autoscale/experiments/causal_optimum.py); the clairvoyant knows every arrival; the rules and the policy see
telemetry. All refuse early, all knobs are in hindsight. A policy adapted to this load (the lines above) has seen other
draws of it: as much as an owner's record tells, and less than the planner knows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.progress import Progress

from rl_autoscale.agents.registry import policy_class
from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.experiments.causal_optimum import Capacity, CausalPlanner, MarkovLoad, measure_capacity, plan_fleet
from rl_autoscale.experiments.episodes import policy_for, run_episode
from rl_autoscale.experiments.statistics import Estimate, Sweep, hours_at_attainment
from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.protocols import Policy
from rl_autoscale.workload.arrivals import RateCurve
from rl_autoscale.workload.length_spec import resolve_lengths
from rl_autoscale.workload.lengths import sample_lengths
from rl_autoscale.workload.trace import Workload

SCENARIO, LENGTHS = "bursty", "azure_conv"
RATES_PER_S, MEAN_SOJOURNS_S, CV = (60.0, 150.0, 280.0), (360.0, 180.0, 90.0), 1.5
RULES = ("headroom", "headroom-budget", "hpa", "llm-d", "infaas", "qlm", "llumnix", "chiron-tuned", "static")
PRICES = tuple(np.geomspace(2.0, 600.0, 10).tolist())
TARGETS = (0.90, 0.95, 0.98, 0.99)
PLANNER, CLAIRVOYANT = "causal planner", "clairvoyant plan"

MakePolicy = Callable[[Workload, RateCurve], Policy]


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--startup-s", nargs="+", type=float, default=[15.0, 60.0, 300.0])
    parser.add_argument("--learned", nargs="+", default=["pretrained/single-pool"], help="exported policies")
    parser.add_argument("--rules", nargs="*", choices=RULES, default=RULES, help="default all of these; may be none")
    parser.add_argument(
        "--selectivity", type=float, default=0.0, help="of the refusal of all but policies; theirs: 0.5"
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--span-s", type=float, default=3600.0)
    parser.add_argument("--scenario-to", type=Path, help="write this load as a scenario to adapt to, and stop")
    asked = parser.parse_args()
    bursty = load_scenario(SCENARIO)
    if asked.scenario_to is not None:
        asked.scenario_to.write_text(as_scenario_file(with_startup(bursty, asked.startup_s[0])))
        return
    load = MarkovLoad(RATES_PER_S, MEAN_SOJOURNS_S, CV, resolve_lengths(LENGTHS))
    with Progress(console=Console(stderr=True)) as progress:
        measuring = progress.add_task("fleets at constant rates", total=len(RATES_PER_S))
        capacity = measure_capacity(
            bursty.fleet,
            load,
            lambda done, _: progress.update(measuring, completed=done),
            selectivity=asked.selectivity,
        )
        refusal = {"admission": 1.0, "selectivity": asked.selectivity}
        traffic = [load.draw(seed, asked.span_s, bursty.fleet.classes[0].name) for seed in range(asked.seeds)]
        for startup_s in asked.startup_s:
            scenario = with_startup(bursty, startup_s)
            contenders: dict[str, list[MakePolicy]] = {
                PLANNER: [planned(scenario, load, capacity, price, asked.span_s) for price in PRICES],
                **{f"PPO, {path}": [by_knobs("learned", path=path, miss_price=price) for price in PRICES]
                   for path in asked.learned},
                **{rule: [by_knobs(rule, **refusal, **{policy_class(rule).KNOB.name: value})  # type: ignore[union-attr]
                          for value in policy_class(rule).KNOB.sweep] for rule in asked.rules},  # type: ignore[union-attr]
                CLAIRVOYANT: [by_knobs("oracle", **refusal, utilisation=value)
                              for value in policy_class("oracle").KNOB.sweep],  # type: ignore[union-attr]
            }  # fmt: skip
            playing = progress.add_task(
                f"starts of {startup_s:g} s", total=sum(map(len, contenders.values())) * len(traffic)
            )
            advance = partial(progress.advance, playing)
            hours = {who: front(scenario, traffic, makers, advance) for who, makers in contenders.items()}
            show(startup_s, hours)


def with_startup(scenario: Scenario, startup_s: float) -> Scenario:
    """The scenario with another mean start-up time."""
    pool = scenario.fleet.pools[0]
    phase = pool.startup[0].model_copy(update={"mean_s": startup_s})
    fleet = scenario.fleet.model_copy(update={"pools": (pool.model_copy(update={"startup": (phase,)}),)})
    return scenario.model_copy(update={"fleet": fleet})


def as_scenario_file(scenario: Scenario) -> str:
    """YAML of it, its test traffic the three rates alone; what it trains on stays as broad as it is."""
    told = json.loads(scenario.model_dump_json(exclude_unset=True))
    rates = {"kind": "mmpp", "rates_per_s": RATES_PER_S, "mean_sojourns_s": MEAN_SOJOURNS_S, "cv": CV}
    told["test"] = {**told["test"], "streams": [{"generator": rates, "lengths": LENGTHS}]}
    told |= {
        "name": "three-rates",
        "description": "The fleet of bursty under the load of benchmarks/causal_optimum.py.",
    }
    return yaml.safe_dump(told, sort_keys=False)


def planned(scenario: Scenario, load: MarkovLoad, capacity: Capacity, price: float, span_s: float) -> MakePolicy:
    """The planner at a ``miss_price`` (envs/reward.py), over the ideal GPU time of a mean request."""
    prompt, output = (tokens.mean() for tokens in sample_lengths(np.random.default_rng(0), load.lengths, 100_000))
    demand = DemandEstimator(scenario.fleet)
    work_s = demand.pool_work_s(np.array([prompt]), np.array([output]), np.array([0]), 0)
    gpu_s = float(scenario.fleet.gpus_per_replica[0] * work_s.sum())
    plan = plan_fleet(scenario.fleet, load, capacity, price * gpu_s, span_s)
    return lambda _, curve: CausalPlanner(load, curve, capacity, plan)


def by_knobs(name: str, **knobs: object) -> MakePolicy:
    """A registered policy."""
    return lambda workload, _: policy_for(name, knobs, workload)


def front(
    scenario: Scenario, traffic: list[tuple[Workload, RateCurve]], makers: list[MakePolicy], advance: Callable[[], None]
) -> list[Estimate]:
    """GPU-hours at each target over a sweep."""
    shape = len(traffic), len(makers)
    attainment, hours = np.zeros(shape), np.zeros(shape)
    for k, make in enumerate(makers):
        for seed, (workload, curve) in enumerate(traffic):
            end = run_episode(scenario, workload, make(workload, curve), seed=seed)
            attainment[seed, k], hours[seed, k] = end.slo_attainment, end.gpu_hours
            advance()
    return hours_at_attainment(Sweep(attainment, hours), TARGETS, rng=np.random.default_rng(0))


def show(startup_s: float, hours: dict[str, list[Estimate]]) -> None:
    """One table: GPU-hours, and over the planner's."""
    print(f"\nstarts of {startup_s:g} s: GPU-hours at equal attainment, and over the planner's\n")
    print("| | " + " | ".join(f"{target:.0%}" for target in TARGETS) + " |")
    print("|---|" + "---:|" * len(TARGETS))
    for who, estimates in hours.items():
        cells = [
            f"{item.value:.2f} ({item.value / best.value:.2f})" if item.reached and best.reached else "-"
            for item, best in zip(estimates, hours[PLANNER], strict=True)
        ]
        print(f"| {who} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
