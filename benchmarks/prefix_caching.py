"""Prefix hit rates on a public trace beside the best that any cache could reach.

    python benchmarks/prefix_caching.py [--traces FOLDER] [--trace mooncake_conversation] [--span 3600]

Llama-3.1-8B on H100 with automatic prefix caching, every router, fleets of several sizes. The ideal is one infinite
cache that knows a prompt the moment it arrives (`ideal_prefix_hit_rate`); a fleet has one finite cache per replica and
a router that does not look into them.
"""

from __future__ import annotations

import argparse
import time

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.layout import ROUTER_CODES
from rl_autoscale.sim.prefix import ideal_prefix_hit_rate
from rl_autoscale.sim.result import EpisodeResult
from rl_autoscale.workload.store import TraceStore
from rl_autoscale.workload.trace import Workload
from rl_autoscale.workload.transform import assign_class, slice_time


def serve(workload: Workload, num_replicas: int, router: str, prefix_caching: bool) -> tuple[EpisodeResult, float]:
    """The episode of a fixed fleet, and the CPU seconds it took."""
    pool = {"name": "h100", "profile": "llama-3.1-8b_h100_tp1", "prefix_caching": prefix_caching}
    pool |= {"min_replicas": num_replicas, "max_replicas": num_replicas}
    classes = [{"name": "chat", "ttft_slo_s": 2, "tpot_slo_s": 0.1, "queue_limit": 1_000_000}]
    fleet = SimFleet(FleetSpec.from_dict({"pools": [pool], "classes": classes, "router": router}), workload)
    started_s = time.process_time()
    while fleet.advance():
        pass
    return fleet.result(), time.process_time() - started_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", action="append", default=[], help="folder of traces")
    parser.add_argument("--trace", default="mooncake_conversation")
    parser.add_argument("--span", type=float, default=3600.0, help="seconds of the trace")
    parser.add_argument("--replicas", type=int, nargs="+", default=[16, 24, 48])
    arguments = parser.parse_args()
    trace = TraceStore(arguments.traces).load(arguments.trace).workload
    workload = assign_class(slice_time(trace, 0.0, min(arguments.span, trace.span_s)), "chat")
    print(f"{workload.num_requests:,} requests, ideal hit rate {ideal_prefix_hit_rate(workload):.3f}")
    print(f"{'replicas':>8}  {'router':<16}{'hit rate':>9}{'TTFT p50 s':>12}{'without':>9}{'CPU s':>8}{'without':>9}")
    for num_replicas in arguments.replicas:
        for router in ROUTER_CODES:
            (result, cpu_s), (plain, plain_cpu_s) = (
                serve(workload, num_replicas, router, caching) for caching in (True, False)
            )
            print(
                f"{num_replicas:>8}  {router:<16}{result.pools[0].prefix_hit_rate:>9.3f}"
                f"{result.classes[0].ttft_p50_s:>12.2f}{plain.classes[0].ttft_p50_s:>9.2f}{cpu_s:>8.2f}{plain_cpu_s:>9.2f}"
            )


if __name__ == "__main__":
    main()
