"""CPU time of one call of SLOs-Serve's dynamic programme, by the number of requests that it chooses from.

    python benchmarks/planning_time.py [--rounds 200]

Queues are drawn: prompts of 100 to 4,000 tokens due within 0.2 to 2 s, beside 64 streams, on Llama-3.1-8B and A100.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np

from rl_autoscale.fleet.profile import load_profile
from rl_autoscale.sim.schedulers.slos_plan import PLAN_PROMPT, Costs, choose_prompts, plan_labels

LENGTHS = (1, 2, 4, 8, 16, 32, 48)
PERIODS_S = {1: (0.05,), 3: (0.05, 0.1, 0.2)}
BUDGET = 8192


def drawn_queue(rng: np.random.Generator, length: int, num_tpots: int) -> np.ndarray:
    """Prompts by deadline, all of them candidates."""
    prompts = np.zeros(length, dtype=PLAN_PROMPT)
    prompts["left_tokens"] = rng.integers(100, 4000, length)
    prompts["tier"] = rng.integers(0, num_tpots, length)
    prompts["deadline_s"] = np.sort(rng.uniform(0.2, 2.0, length))
    return prompts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    profile = load_profile("llama-3.1-8b_a100_tp1")
    table_s, slopes = profile.token_time_table_s(BUDGET), profile.attention_coefficients_s
    costs = Costs(BUDGET, table_s, slopes, np.ones(1), 0, 0.0)
    print("| candidates | " + " | ".join(f"{n} TPOT{'s' * (n > 1)}: mean, p99 (us)" for n in PERIODS_S) + " |")
    print("| ---: |" + " ---: |" * len(PERIODS_S))
    for length in LENGTHS:
        cells = []
        for num_tpots, tpots_s in PERIODS_S.items():
            rng = np.random.default_rng(length)
            periods_s = np.array([*tpots_s, math.inf])
            labels = plan_labels(len(periods_s))
            taken_us = []
            for _ in range(rounds + 1):
                prompts = drawn_queue(rng, length, num_tpots)
                began_s = time.thread_time()
                choose_prompts(prompts, length, 0.0, 64, 64_000, num_tpots, 400_000, periods_s, costs, labels)
                taken_us.append(1e6 * (time.thread_time() - began_s))
            taken_us = taken_us[1:]  # the first call compiles
            cells.append(f"{np.mean(taken_us):,.0f}, {np.quantile(taken_us, 0.99):,.0f}")
        print(f"| {length} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
