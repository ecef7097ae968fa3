"""How the compiled engine's CPU time grows with requests and replicas, what events cost, and how long a start takes.

    python benchmarks/growth.py [--repeats 3] [--day TRACE.parquet] [--large] [--json]

``--large``: 512 replicas and one million requests, with the memory that it takes. ``--day``: a whole trace on a fleet
that a rule scales between 1 and 64 replicas of Llama-3.1-8B on L40S, control loop in Python included. CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from engine_speed import RATE_PER_REPLICA_PER_S, fleet_spec, poisson_workload

from rl_autoscale.agents.registry import make_policy
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.sim.fleet import FleetBatch, SimFleet
from rl_autoscale.workload.readers import read_trace
from rl_autoscale.workload.trace import Workload

Row = dict[str, float]

FIRST_REQUEST = """
import time; started = time.perf_counter()
import numpy as np
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.workload.trace import Workload
spec = FleetSpec.from_dict({"pools": [{"name": "p", "profile": "llama-3.1-8b_h100_tp1"}],
                            "classes": [{"name": "c", "ttft_slo_s": 1, "tpot_slo_s": 1}]})
batch = FleetBatch(spec)
one = np.ones(1, dtype=int)
batch.load(0, Workload(np.zeros(1), one, one, 0 * one, ("c",), 1.0), seed=0)
batch.run(0)
assert batch.requests()["outcome"][0] == 1
print(time.perf_counter() - started, time.process_time())
"""


def run_fixed(replicas: int, workload: Workload, repeats: int) -> Row:
    """Median CPU time of a fixed fleet, loading left out."""
    batch = FleetBatch(fleet_spec(replicas, replicas))
    spent = []
    for _ in range(repeats):
        batch.load(0, workload, seed=0)
        started = time.process_time()
        batch.run(0)
        spent.append(time.process_time() - started)
    requests = batch.requests()
    assert (requests["outcome"] == 1).all()
    cpu_s, events = statistics.median(spent), batch.num_events()
    return {
        "replicas": replicas, "requests": workload.num_requests, "cpu_s": cpu_s,
        "us_per_request": 1e6 * cpu_s / workload.num_requests, "events_per_request": events / workload.num_requests,
        "ns_per_event": 1e9 * cpu_s / events,
    }  # fmt: skip


def with_lengths(workload: Workload, prompt: int, output: int) -> Workload:
    """The same arrivals, every request of one size."""
    sizes = np.ones(workload.num_requests, dtype=np.int32)
    return Workload(
        workload.arrival_s, prompt * sizes, output * sizes, workload.class_index, workload.class_names, workload.span_s
    )


def kinds(repeats: int) -> dict[str, Row]:
    """Cost of events by kind: workloads in which one kind after the other is added."""
    light, busy = poisson_workload(200_000, 0.5 * 64), poisson_workload(200_000, 5.0 * 64)
    cases = {
        "alone, one token: arrival, dispatch, one iteration, end": with_lengths(light, 100, 1),
        "alone, 200 tokens: and one leap of decode": with_lengths(light, 100, 200),
        "busy, one token: and waiting for iterations": with_lengths(busy, 900, 1),
        "busy, 200 tokens: and leaps cut by arrivals": with_lengths(busy, 900, 200),
        "busy, 12,000-token prompts: and chunked prefill": with_lengths(poisson_workload(50_000, 64.0), 12_000, 20),
        "busy, mixed lengths: the benchmark's workload": busy,
    }
    return {name: run_fixed(64, workload, repeats) for name, workload in cases.items()}


def run_day(trace: Path) -> Row:
    """A trace on a scaled fleet; times without reading."""
    workload = read_trace(trace).workload
    spec = fleet_spec(1, 64, profile="llama-3.1-8b_l40s_tp1")
    one_class = np.zeros(workload.num_requests, dtype=np.int16)
    limit = spec.pools[0].num_kv_blocks * 16
    prompts = np.minimum(workload.prompt_tokens, limit // 2)
    outputs = np.minimum(workload.output_tokens, limit // 4)
    workload = Workload(workload.arrival_s, prompts, outputs, one_class, ("chat",), workload.span_s)
    spent = []
    for _ in range(3):
        fleet = SimFleet(spec, workload, seed=0)
        started = time.process_time()
        steps = run_control_loop(fleet, make_policy("headroom"))
        spent.append(time.process_time() - started)
    result = fleet.result()
    return {
        "requests": workload.num_requests, "cpu_s": statistics.median(spent), "control_steps": steps,
        "gpu_hours": result.gpu_hours, "slo_attainment": result.slo_attainment,
        "largest_fleet": float(result.timeline["ready"].max()),
    }  # fmt: skip


def start_up() -> Row:
    """Wall and CPU seconds from import to the first simulated request, with nothing compiled and with everything."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        command = [sys.executable, "-c", FIRST_REQUEST]
        found = [
            [float(value) for value in subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            ).stdout.split()]
            for _ in range(4)
        ]  # fmt: skip
    warm = sorted(found[1:])[1]
    return {"cold_wall_s": found[0][0], "cold_cpu_s": found[0][1], "warm_wall_s": warm[0], "warm_cpu_s": warm[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--day", type=Path, help="trace to run on a scaled fleet")
    parser.add_argument("--large", action="store_true", help="512 replicas, one million requests")
    parser.add_argument("--skip-start", action="store_true", help="leave compile time out")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    run_fixed(1, poisson_workload(1000, 1.0), 1)  # compiles, or loads what was compiled
    found: dict[str, object] = {}
    if options.large:  # first: peak memory is that of the whole process
        found["large"] = run_fixed(512, poisson_workload(1_000_000, 512 * RATE_PER_REPLICA_PER_S), options.repeats)
        found["large_peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["requests"] = [
        run_fixed(4, poisson_workload(count, 4 * RATE_PER_REPLICA_PER_S), options.repeats)
        for count in (10_000, 30_000, 100_000, 300_000, 1_000_000)
    ]
    found["replicas"] = [
        run_fixed(count, poisson_workload(200_000, count * RATE_PER_REPLICA_PER_S), options.repeats)
        for count in (1, 4, 16, 64, 256, 512)
    ]
    found["kinds"] = kinds(options.repeats)
    if options.day is not None:
        found["day"] = run_day(options.day)
    if not options.skip_start:
        found["start"] = start_up()
    print(json.dumps(found, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
