"""A toy fleet whose best policy is known: see test_learning."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rl_autoscale.envs.mdp import EpisodeSetup
from rl_autoscale.fleet.rng import stream
from rl_autoscale.fleet.spec import FleetSpec, ShieldSpec
from rl_autoscale.workload.trace import Workload

SHIELD = ShieldSpec()


def toy_spec(**changes: object) -> FleetSpec:
    pool = {
        "name": "gpu",
        "profile": "llama-3.1-8b_a100_tp1",
        "min_replicas": 1,
        "max_replicas": 8,
        "initial_replicas": 2,
        "startup": [{"mean_s": 10, "cv": 0.2}],
        "max_num_seqs": 32,
    }
    pool.update(changes)
    return FleetSpec.from_dict(
        {
            "pools": [pool],
            "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1, "timeout_s": 20}],
            "control_interval_s": 5.0,
        }
    )


def poisson_workload(rate_per_s: float, span_s: float, seed: int) -> Workload:
    rng = stream(seed, "toy")
    number = max(rng.poisson(rate_per_s * span_s), 1)
    return Workload(
        np.sort(rng.uniform(0, span_s, number)),
        rng.integers(200, 1500, number).astype(np.int32),
        rng.integers(20, 200, number).astype(np.int32),
        np.zeros(number, dtype=np.int16),
        ("chat",),
        span_s,
    )


def sampler(rate_per_s: float = 20.0, span_s: float = 100.0, miss_price: float = 20.0) -> Callable[[int], EpisodeSetup]:
    def sample(seed: int) -> EpisodeSetup:
        return EpisodeSetup(poisson_workload(rate_per_s, span_s, seed), miss_price)

    return sample
