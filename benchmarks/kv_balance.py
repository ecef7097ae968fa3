"""Dispatch by freeness, and running sequences that move to freer replicas, where KV cache is short (Llumnix).

    python benchmarks/kv_balance.py [--lengths M-M] [--replicas 16] [--rates 16,18,20] [--seeds 3]
    python benchmarks/kv_balance.py --urgent 0.1      # instead: what a tenth of the requests gains that are urgent

Replicas are timed as L40S with Llama-3.1-8B and have the KV cache that LLaMA-7B leaves of an A10: 851 blocks. Prompt
and output lengths follow power laws of a given mean, up to 6,000 tokens, as in Llumnix's experiments (from memory);
arrivals are Poisson. First every rate on so many replicas, then the fewest replicas that keep the 99th percentile of
the time to first token within 5 s, which is about where the paper compares costs, and those that keep an attainment.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rl_autoscale.experiments.capacity import at_rate
from rl_autoscale.fleet.pool import RebalanceSpec
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.workload.trace import Workload

LONGEST_TOKENS = 6000
MEAN_TOKENS = {"S": 128, "M": 256, "L": 512}
KV_BLOCKS = 851
REBALANCE: dict[str, float] = {}
BALANCED: dict[str, Any] = {"rebalance": REBALANCE}
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {  # router, options of the pool
    "`round_robin`": ("round_robin", {}),
    "`least_loaded`": ("least_loaded", {}),
    "`least_loaded`, `rebalance`": ("least_loaded", BALANCED),
    "`freeness`": ("freeness", {}),
    "`freeness`, `rebalance`": ("freeness", BALANCED),
}
ALIKE = "everybody alike"
PREFERRING: dict[str, Any] = BALANCED | {"scheduler": "vllm-priority"}
# A replica with an urgent request is loaded up to 1,600 tokens, as in Llumnix's artifact.
KEEPING_FREE: dict[str, Any] = PREFERRING | {"urgent_headroom_blocks": KV_BLOCKS - 1600 // 16}
SYSTEMS_FOR_URGENT: dict[str, tuple[str, dict[str, Any]]] = {
    ALIKE: ("freeness", BALANCED),
    "urgent first": ("freeness", PREFERRING),
    "and with memory kept free": ("freeness", KEEPING_FREE),
}
TTFT_S, TPOT_S = 5.0, 0.1
ATTAINMENT = 0.99


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="M-M", help="means of prompt and output: S 128, M 256, L 512")
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--rates", default="16,18,20", help="requests per second, of all replicas together")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=10, help="the bounds of rebalance were chosen on 0 to 2")
    parser.add_argument("--cv", type=float, default=1.0, help="coefficient of variation of gaps; 1: Poisson")
    parser.add_argument("--urgent", type=float, default=0.0, help="share of requests that are; its own table")
    for field in RebalanceSpec.model_fields:
        parser.add_argument(f"--{field.replace('_', '-')}", type=float, default=getattr(RebalanceSpec(), field))
    arguments = parser.parse_args()
    REBALANCE.update({field: getattr(arguments, field) for field in RebalanceSpec.model_fields})
    if not 0 <= arguments.urgent < 1:
        parser.error(f"--urgent {arguments.urgent} must be at least 0 and below 1")
    rates = [float(rate) for rate in arguments.rates.split(",")]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    samples = [sample(arguments.lengths, arguments.requests, seed, arguments.urgent, arguments.cv) for seed in seeds]
    began_s = time.process_time()
    if arguments.urgent:
        print_urgent(samples, rates, arguments.replicas)
    else:
        print_figures(samples, rates, arguments.replicas)
        print_replicas(samples, rates, arguments.replicas)
    print(f"({time.process_time() - began_s:.0f} s of CPU, compilation included)")


def power_law(mean_tokens: float) -> Callable[[Any], Any]:
    """Quantile function of a density x^-a on [1, LONGEST_TOKENS] with this mean."""
    probability = (np.arange(20_000) + 0.5) / 20_000

    def quantile(u: Any, exponent: float) -> Any:
        return (1 + u * (LONGEST_TOKENS ** (1 - exponent) - 1)) ** (1 / (1 - exponent))

    low, high = 1.000001, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if quantile(probability, middle).mean() > mean_tokens else (low, middle)
    return lambda u: quantile(u, low)


def sample(lengths: str, number: int, seed: int, urgent: float, cv: float) -> Workload:
    """Requests at a rate of one per second, gaps of this coefficient of variation, of which a share is urgent."""
    rng = np.random.default_rng(seed)
    prompt, output = (
        power_law(MEAN_TOKENS[side])(rng.random(number)).round().astype(int) for side in lengths.split("-")
    )
    gaps_s = rng.exponential(1.0, number) if cv == 1.0 else rng.gamma(cv**-2, cv**2, number)
    arrival_s = np.cumsum(gaps_s)
    class_index = (rng.random(number) >= urgent).astype(int) if urgent else np.zeros(number, dtype=int)
    class_names = ("urgent", "others") if urgent else ("chat",)
    return Workload(arrival_s, prompt, output, class_index, class_names, float(arrival_s[-1]))


def serve(
    system: tuple[str, dict[str, Any]],
    workload: Workload,
    rate_per_s: float,
    replicas: int,
    seed: int,
    *,
    alike: bool = True,
) -> FleetBatch:
    """One fixed fleet at one rate, played to its end; the first class is the more urgent unless all are alike."""
    router, options = system
    pool = {"name": "p", "profile": "llama-3.1-8b_l40s_tp1", "kv_blocks": KV_BLOCKS, **options}
    pool |= {"min_replicas": replicas, "max_replicas": replicas}
    promise = {"ttft_slo_s": TTFT_S, "tpot_slo_s": TPOT_S, "queue_limit": 10**6}
    classes = [
        {"name": name, "priority": 0 if alike else priority, **promise}
        for priority, name in enumerate(workload.class_names)
    ]
    batch = FleetBatch(FleetSpec.from_dict({"pools": [pool], "classes": classes, "router": router}))
    batch.load(0, at_rate(workload, rate_per_s), seed=seed)
    batch.run(0)
    return batch


def latencies(requests: Any) -> dict[str, float]:
    """What users saw."""
    ttft_s = requests["first_token_s"] - requests["arrival_s"]
    several = requests["output_tokens"] > 1
    decode_s = (requests["last_token_s"] - requests["first_token_s"])[several]
    tpot_s = decode_s / (requests["output_tokens"][several] - 1.0)
    return {
        "TTFT mean, s": float(ttft_s.mean()),
        "p99, s": float(np.quantile(ttft_s, 0.99)),
        "TPOT mean, ms": 1e3 * float(tpot_s.mean()),
        "TPOT p99, ms": 1e3 * float(np.quantile(tpot_s, 0.99)),
        "completion mean, s": float((requests["end_s"] - requests["arrival_s"]).mean()),
    }


def figures(batch: FleetBatch) -> dict[str, float]:
    """What users and the KV caches saw."""
    requests, books = batch.requests(), batch.pools()[0]
    return latencies(requests) | {
        "attainment, %": 100 * float(requests["slo_met"].mean()),
        "preemptions per 1,000": 1e3 * float(books["preemptions"]) / len(requests),
        "moved per 1,000": 1e3 * float(books["migrations"]) / len(requests),
    }


def print_means(key: dict[str, str], rows: list[dict[str, float]], *, begins: bool) -> None:
    """One line of a table, means over the rows; with its head where it begins."""
    if begins:
        print(f"| {' | '.join([*key, *rows[0]])} |", "|" + " --- |" * len(key) + " ---: |" * len(rows[0]), sep="\n")
    means = [f"{np.mean([row[figure] for row in rows]):.3g}" for figure in rows[0]]
    print(f"| {' | '.join([*key.values(), *means])} |", flush=True)


def print_figures(samples: list[Workload], rates: list[float], replicas: int) -> None:
    """Every system at every rate; means over seeds."""
    for rate_per_s in rates:
        for number, (system, options) in enumerate(SYSTEMS.items()):
            rows = [figures(serve(options, w, rate_per_s, replicas, seed)) for seed, w in enumerate(samples)]
            key = {"requests/s": f"{rate_per_s:g}", "system": system}
            print_means(key, rows, begins=rate_per_s == rates[0] and number == 0)


def print_urgent(samples: list[Workload], rates: list[float], replicas: int) -> None:
    """What the urgent requests and the others saw; means over seeds."""
    for rate_per_s in rates:
        for system, options in SYSTEMS_FOR_URGENT.items():
            played = [
                serve(options, w, rate_per_s, replicas, seed, alike=system == ALIKE).requests()
                for seed, w in enumerate(samples)
            ]
            for c, name in enumerate(samples[0].class_names):
                rows = [latencies(requests[requests["class_index"] == c]) for requests in played]
                key = {"requests/s": f"{rate_per_s:g}", "system": system, "whose": name}
                print_means(key, rows, begins=rate_per_s == rates[0] and system == ALIKE and c == 0)


def print_replicas(samples: list[Workload], rates: list[float], most: int) -> None:
    """Fewest replicas that keep a promise to the 99th percentile, and to a share of the requests."""
    print(f"\n| requests/s | system | replicas for p99 TTFT of {TTFT_S:g} s | for attainment of {ATTAINMENT:.0%} |")
    print("| ---: | --- | ---: | ---: |")
    for rate_per_s in rates:
        for system in SYSTEMS:
            in_time = [fewest(system, w, rate_per_s, s, most, "p99, s", -TTFT_S) for s, w in enumerate(samples)]
            met = [
                fewest(system, w, rate_per_s, s, most, "attainment, %", 100 * ATTAINMENT) for s, w in enumerate(samples)
            ]
            print(f"| {rate_per_s:g} | {system} | {np.mean(in_time):.1f} | {np.mean(met):.1f} |", flush=True)


def fewest(system: str, workload: Workload, rate_per_s: float, seed: int, guess: int, figure: str, least: float) -> int:
    """Fewest replicas with a figure of at least so much (a negative bound: at most its amount)."""
    sign = -1.0 if least < 0 else 1.0
    low, high = 0, guess
    while sign * figures(serve(SYSTEMS[system], workload, rate_per_s, high, seed))[figure] < least:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = sign * figures(serve(SYSTEMS[system], workload, rate_per_s, middle, seed))[figure] >= least
        low, high = (low, middle) if enough else (middle, high)
    return high


if __name__ == "__main__":
    main()
