"""How many requests the compiled engine simulates per wall second, on one core.

    python benchmarks/engine_speed.py [--requests 1000000] [--repeats 5] [--json]

Poisson arrivals, lognormal lengths with means of about 900 prompt and 200 output tokens, chunked prefill, exact KV
blocks, per-request TTFT and TPOT recorded; Llama-3.1-8B on H100. Fixed fleets of 1, 4 and 64 replicas at 5 requests/s
each, and an autoscaled one. Compilation and building the workload are not counted; the median of the repeats is
reported.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time

import numpy as np

from rl_autoscale.agents.registry import make_policy
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.rng import stream
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import FleetBatch, SimFleet
from rl_autoscale.sim.layout import REPLICA, REQUEST, TRACE
from rl_autoscale.workload.trace import Workload

RATE_PER_REPLICA_PER_S = 5.0
SIGMA = 0.8
BYTES_PER_TRACE_REQUEST = TRACE.itemsize + REQUEST.itemsize


def poisson_workload(num_requests: int, rate_per_s: float) -> Workload:
    """Poisson arrivals and lognormal lengths (means 900 and 200)."""
    rng = stream(0, "engine-speed")

    def lengths(mean: float, most: int) -> np.ndarray:
        drawn = rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, num_requests)
        return np.clip(drawn, 1, most).astype(np.int32)

    arrival_s = np.cumsum(rng.exponential(1 / rate_per_s, num_requests))
    classes = np.zeros(num_requests, dtype=np.int16)
    return Workload(arrival_s, lengths(900, 8000), lengths(200, 4000), classes, ("chat",), float(arrival_s[-1]) + 1)


def fleet_spec(smallest: int, largest: int, profile: str = "llama-3.1-8b_h100_tp1") -> FleetSpec:
    """One pool of one profile."""
    pool = {"name": "gpu", "profile": profile, "min_replicas": smallest, "max_replicas": largest}
    return FleetSpec.from_dict({"pools": [pool], "classes": [{"name": "chat", "ttft_slo_s": 1, "tpot_slo_s": 0.1}]})


def time_fixed(num_replicas: int, num_requests: int, repeats: int) -> dict[str, float]:
    """Median speed of a fixed fleet without control."""
    workload = poisson_workload(num_requests, RATE_PER_REPLICA_PER_S * num_replicas)
    batch = FleetBatch(fleet_spec(num_replicas, num_replicas))
    walls = []
    for _ in range(repeats):
        batch.load(0, workload, seed=0)
        started = time.perf_counter()
        batch.run(0)
        walls.append(time.perf_counter() - started)
    requests = batch.requests()
    ttft_s = requests["first_token_s"] - requests["arrival_s"]
    wall_s = statistics.median(walls)
    return {
        "replicas": num_replicas,
        "requests": num_requests,
        "wall_s": wall_s,
        "requests_per_s": num_requests / wall_s,
        "slowest_requests_per_s": num_requests / max(walls),
        "events_per_request": batch.num_events() / num_requests,
        "finished": int((requests["outcome"] == 1).sum()),
        "ttft_p50_s": float(np.median(ttft_s)),
    }


def time_autoscaled(num_requests: int, repeats: int) -> dict[str, float]:
    """Median speed of a fleet under the headroom rule, control loop in Python included."""
    workload = poisson_workload(num_requests, 320.0)
    walls = []
    for _ in range(repeats):
        fleet = SimFleet(fleet_spec(1, 128), workload, seed=0)
        started = time.perf_counter()
        steps = run_control_loop(fleet, make_policy("headroom"))
        walls.append(time.perf_counter() - started)
    wall_s = statistics.median(walls)
    return {"requests": num_requests, "wall_s": wall_s, "requests_per_s": num_requests / wall_s, "control_steps": steps}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    started = time.perf_counter()
    time_fixed(1, 1000, 1)
    compile_s = time.perf_counter() - started
    rows = [time_fixed(n, arguments.requests, arguments.repeats) for n in (1, 4, 64)]
    scaled = time_autoscaled(arguments.requests, arguments.repeats)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    memory = {
        "bytes_per_trace_request": BYTES_PER_TRACE_REQUEST,
        "bytes_per_replica": REPLICA.itemsize + 16 * 4 + 1024 * 8,
        "bytes_per_request_in_flight_beyond_trace": 8,
        "peak_rss_mb": peak_mb,
    }
    if arguments.json:
        print(json.dumps({"fixed": rows, "autoscaled": scaled, "first_call_s": compile_s, "memory": memory}, indent=2))
        return
    print(f"first call (compile or cache): {compile_s:.1f} s")
    for row in rows:
        print(
            f"{row['replicas']:>4} replicas  {row['requests_per_s']:>12,.0f} requests/s "
            f"(median of {arguments.repeats}, slowest {row['slowest_requests_per_s']:,.0f})  "
            f"{row['events_per_request']:.2f} events/request"
        )
    print(
        f"autoscaled up to 128: {scaled['requests_per_s']:,.0f} requests/s over {scaled['control_steps']} control steps"
    )
    print(
        f"memory: {memory['bytes_per_trace_request']} B per trace request, "
        f"8 B (heap) per request in flight beyond that, "
        f"{memory['bytes_per_replica']} B per replica slot; peak RSS {peak_mb:.0f} MB"
    )


if __name__ == "__main__":
    main()
