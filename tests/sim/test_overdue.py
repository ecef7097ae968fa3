"""Misses are counted in the step in which they become certain, not when the late token comes."""

from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import ScalingDecision
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.workload.trace import Workload


def overloaded(seed: int) -> tuple[FleetSpec, Workload]:
    """Two classes on one small pool, one served first, the other with a deadline; nobody gives up."""
    pool = {
        "name": "gpu",
        "profile": "llama-3.1-8b_a100_tp1",
        "max_num_seqs": 3,
        "max_replicas": 2,
        "initial_replicas": 1,
    }
    classes = [
        {"name": "paid", "ttft_slo_s": 2.0, "tpot_slo_s": 0.1, "priority": 0},
        {"name": "jobs", "ttft_slo_s": 30.0, "tpot_slo_s": 1.0, "deadline_s": 40.0, "priority": 1},
    ]
    spec = FleetSpec.from_dict({"pools": [pool], "classes": classes, "control_interval_s": 5.0})
    rng = np.random.default_rng(seed)
    arrival_s = np.sort(rng.uniform(0.0, 60.0, 200))
    lengths = rng.integers(100, 2000, 200), rng.integers(1, 300, 200)
    return spec, Workload(arrival_s, *lengths, rng.integers(0, 2, 200), spec.class_names, 60.0)


def certain(spec: FleetSpec, batch: FleetBatch) -> np.ndarray:
    """The same, told from every request's record."""
    requests, now_s = batch.requests(0), float(batch.now_s[0])
    found = np.zeros(len(spec.classes), dtype=np.int64)
    for request in requests:
        promise = spec.classes[request["class_index"]]
        first_s, waited_s = request["first_token_s"], now_s - request["arrival_s"]
        late = (now_s if np.isnan(first_s) else first_s) - request["arrival_s"] > promise.ttft_slo_s
        overdue = promise.deadline_s is not None and waited_s > promise.deadline_s
        ended_badly = request["outcome"] != 0 and not request["slo_met"]
        found[request["class_index"]] += ended_badly or (request["outcome"] == 0 and (late or overdue))
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_every_step_has_the_misses_that_are_certain_by_then(seed: int) -> None:
    spec, workload = overloaded(seed)
    batch = FleetBatch(spec, 1)
    batch.load(0, workload, seed=seed)
    decision = ScalingDecision(np.array([[1]]), spec.batch_limits[None], np.full((1, 2), np.inf))
    ahead, seen = 0, []
    while batch.unresolved[0] + batch.arrivals_left[0] > 0:
        batch.step(decision)
        seen.append(batch.missed()[0])
        np.testing.assert_array_equal(seen[-1], certain(spec, batch))
        ahead += int((seen[-1] > batch.ledger("missed")[0]).any())
    assert ahead > 3  # else nothing was ever overdue
    assert (np.diff(seen, axis=0) >= 0).all()
    np.testing.assert_array_equal(seen[-1], batch.ledger("missed")[0])
    batch.load(0, workload, seed=seed)
    assert batch.missed().tolist() == [[0, 0]]
