"""Pools that share GPUs: whatever a policy asks for, no GPU has two models at a time, in either simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import ScalingDecision
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.workload.trace import Workload

NUM_GPUS = 4


class Whims:
    """Asks for anything, and writes down how many GPUs are taken when it is asked."""

    def __init__(self, spec: FleetSpec) -> None:
        self.spec, self.rng, self.taken = spec, np.random.default_rng(7), []

    def reset(self, spec: FleetSpec) -> None: ...

    def decide(self, state: Any) -> ScalingDecision:
        pools = state.pools
        self.taken.append(int(((pools.ready + pools.starting + pools.draining) * self.spec.gpus_per_replica).sum()))
        return ScalingDecision(self.rng.integers(0, 4, 3), self.spec.batch_limits, np.full(3, np.inf))


@pytest.mark.parametrize("simulator", [SimFleet, ReferenceFleet])
def test_no_gpu_has_two_models_at_a_time(simulator: Any, exact_profile: Any) -> None:
    pool = {"profile": str(exact_profile), "min_replicas": 0, "max_replicas": 3, "startup": [{"mean_s": 1.5}]}
    promise = {"ttft_slo_s": 5.0, "tpot_slo_s": 0.5}
    spec = FleetSpec.from_dict(
        {
            "pools": [{"name": name, "model": name, "initial_replicas": int(name != "c"), **pool} for name in "abc"],
            "classes": [{"name": name, "model": name, **promise} for name in "abc"],
            "shared_gpus": [{"pools": ["a", "b", "c"], "gpus": NUM_GPUS}],
            "control_interval_s": 0.5,
            "telemetry_age_s": 0.125,
        }
    )
    rng = np.random.default_rng(3)
    arrival_s = np.sort(rng.uniform(0.0, 60.0, 120))
    workload = Workload(arrival_s, rng.integers(1, 60, 120), rng.integers(1, 60, 120), rng.integers(0, 3, 120),
                        spec.class_names, 60.0)  # fmt: skip
    fleet, policy = simulator(spec, workload), Whims(spec)
    run_control_loop(fleet, policy)
    assert max(policy.taken) == NUM_GPUS
    requests = fleet.batch.requests() if isinstance(fleet, SimFleet) else fleet.request_records()
    ended = requests[requests["replica"] >= 0]
    assert (ended["replica"] // 6 == ended["class_index"]).all()  # six slots per pool: each class to its model's
