"""The error of QLM's waiting-time estimator, by queue length: predicted from telemetry, true in the simulation.

    python benchmarks/waiting_time.py [--seeds 10] [--lengths azure_conv]

A burst of 3,000 requests on two replicas of Llama-3.1-8B on A100, 64 in flight each; at every step the wait of the last
queued request is predicted (`rl_autoscale.experiments.validation.waiting_time`).
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np

from rl_autoscale.experiments.validation.waiting_time import WaitingTimes, measure_waiting_times

EDGES = (1, 10, 30, 100, 300, 1000, 3000)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--lengths", default="azure_conv")
    arguments = parser.parse_args()
    runs = [measure_waiting_times(seed, lengths=arguments.lengths) for seed in range(arguments.seeds)]
    every = WaitingTimes(*(np.concatenate([getattr(run, name) for run in runs]) for name in WaitingTimes.__slots__))
    print(f"{'queued':>13}{'predictions':>13}{'bias':>9}{'mean |error|':>14}{'within bound (z 1.645)':>24}")
    for low, high in itertools.pairwise(EDGES):
        part = every.between(low, high)
        if len(part.true_s):
            error = part.relative_error
            print(
                f"{f'{low} to {high - 1}':>13}{len(error):>13}{error.mean():>+9.1%}{np.abs(error).mean():>14.1%}"
                f"{part.coverage(1.645):>24.1%}"
            )
    print(f"R^2 over all: {every.r_squared:.4f}; at 30 to 1000 queued: {every.between(30, 1000).r_squared:.4f}")


if __name__ == "__main__":
    main()
