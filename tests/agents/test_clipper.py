from __future__ import annotations

import math

import numpy as np
import pytest

from rl_autoscale.agents.clipper import ClipperPolicy
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.workload.length_spec import resolve_lengths
from rl_autoscale.workload.lengths import sample_lengths
from rl_autoscale.workload.trace import Workload


def caps(policy, spec, make_state, *steps):
    policy.reset(spec)
    found = []
    for k, (itl_s, in_flight) in enumerate(steps):
        state = make_state(spec, time_s=10.0 * k, itl_s=itl_s, in_flight=in_flight, class_in_flight=in_flight)
        found.append(int(policy.decide(state).max_batch_size[0]))
    return found


def test_adds_while_it_binds_and_cuts_a_tenth_of_what_runs(make_spec, make_state):
    policy = ClipperPolicy(increase=4.0, initial_batch=40.0)
    steps = [(0.05, 40), (0.05, 44), (0.05, 5), (math.nan, 48), (0.15, 48), (0.15, 20), (0.05, 18)]
    assert caps(policy, make_spec(), make_state, *steps) == [44, 48, 48, 48, 43, 18, 22]


def test_stays_within_one_and_the_engine(make_spec, make_state):
    spec = make_spec()
    assert caps(ClipperPolicy(increase=500.0), spec, make_state, (0.05, 64), (0.05, 256)) == [256, 256]
    assert caps(ClipperPolicy(backoff=0.1), spec, make_state, *[(0.2, 1)] * 3) == [1, 1, 1]


def saturated(policy, tpot_slo_s: float):
    """One replica with more work than it can do."""
    number = 6000
    prompt, output = sample_lengths(np.random.default_rng(0), resolve_lengths("azure_conv"), number)
    workload = Workload(np.zeros(number), prompt, output, np.zeros(number, dtype=np.int16), ("jobs",), 900.0)
    slo = {"name": "jobs", "ttft_slo_s": 1e5, "tpot_slo_s": tpot_slo_s, "queue_limit": number}
    pool = {"name": "a", "profile": "llama-3.1-8b_a100_tp1", "min_replicas": 1, "max_replicas": 1}
    fleet = SimFleet(FleetSpec.from_dict({"pools": [pool], "classes": [slo]}), workload, drain_limit_s=0.0)
    run_control_loop(fleet, policy)
    return fleet.result()


@pytest.mark.parametrize("start", [1.0, 256.0])
def test_finds_the_largest_batch_within_the_objective(start):
    """Clipper's claim: many times the throughput of no batching, at the latency objective (its figure: up to 26)."""
    result = saturated(ClipperPolicy(increase=2.0, initial_batch=start), tpot_slo_s=0.04)
    alone = saturated(ClipperPolicy(batch_cap=1), tpot_slo_s=0.04)
    settled = result.timeline["batch_cap"][45:, 0]
    assert settled.std() < 0.15 * settled.mean()

    def finished(cap: float) -> tuple[int, float]:
        fixed = saturated(ClipperPolicy(initial_batch=cap, increase=1e-9, backoff=1.0), tpot_slo_s=0.04)
        return fixed.outcomes["finished"], fixed.classes[0].tpot_p50_s

    assert finished(0.7 * settled.mean())[1] < 0.04 < finished(1.4 * settled.mean())[1]
    assert result.outcomes["finished"] > 8 * alone.outcomes["finished"]
