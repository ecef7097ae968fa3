"""The same requests through this engine, its SimPy reference, Vidur and NVIDIA DynoSim: requests per CPU second.

    python benchmarks/peers.py [--replicas 1,4,64] [--repeats 3] [--json]
        [--vidur-python VENV/bin/python --vidur CHECKOUT] [--dynamo-python VENV/bin/python]

Peers live in environments of their own; one that is not named is reported as not run. Workload: Poisson, 4 requests per
second and replica, lognormal lengths (means 900 and 200, at most 3,000 and 1,000), at least 2,000 requests and 100 per
replica. Engine settings: 128 sequences, 512 tokens per iteration, 30,208 KV blocks, round robin, no prefix cache.

CPU seconds, so that a shared machine tells the truth; rounds interleave the simulators and the median is reported.
Counted is the simulation alone: our engine and the reference from the first event to the last, Vidur's event loop with
its metrics off, and of DynoSim the CPU time that ten times as many requests take more, which includes reading them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rl_autoscale.fleet.rng import stream
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.workload.trace import Workload

Peers = dict[str, Callable[[Workload, int], float] | None]

RATE_PER_REPLICA_PER_S, SIGMA = 4.0, 0.8
DYNAMO_BLOCK_TOKENS = 512
DYNAMO_ENGINE = {
    "num_gpu_blocks": 30_208, "block_size": 16, "max_num_seqs": 128, "max_num_batched_tokens": 512,
    "enable_prefix_caching": False,
}  # fmt: skip
MIN_OWN_CPU_S = 0.3
"""The compiled engine repeats a workload until so much CPU time has gone."""


def make_workload(num_requests: int, replicas: int) -> Workload:
    rng = stream(0, "peers")

    def lengths(mean: float, most: int) -> np.ndarray:
        drawn = rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, num_requests)
        return np.clip(drawn, 1, most).astype(np.int32)

    arrival_s = np.cumsum(rng.exponential(1 / (RATE_PER_REPLICA_PER_S * replicas), num_requests))
    classes = np.zeros(num_requests, dtype=np.int16)
    return Workload(arrival_s, lengths(900, 3000), lengths(200, 1000), classes, ("chat",), float(arrival_s[-1]) + 1)


def fleet_spec(replicas: int) -> FleetSpec:
    pool = {
        "name": "gpu", "profile": "llama-3.1-8b_a100_tp1", "min_replicas": replicas, "max_replicas": replicas,
        "max_num_seqs": 128, "max_num_batched_tokens": 512, "kv_blocks": 30_208,
    }  # fmt: skip
    promise = {"name": "chat", "ttft_slo_s": 1, "tpot_slo_s": 0.1, "queue_limit": 10**9}
    return FleetSpec.from_dict({"pools": [pool], "classes": [promise], "router": "round_robin"})


def own_engine(batch: FleetBatch, workload: Workload) -> float:
    """Requests per CPU second of the compiled engine."""
    cpu_s, runs = 0.0, 0
    while cpu_s < MIN_OWN_CPU_S:
        batch.load(0, workload, seed=0)
        started = time.process_time()
        batch.run(0)
        cpu_s += time.process_time() - started
        runs += 1
    assert (batch.requests()["outcome"] == 1).all()
    return runs * workload.num_requests / cpu_s


def reference(spec: FleetSpec, workload: Workload) -> float:
    fleet = ReferenceFleet(spec, workload)
    started = time.process_time()
    while fleet.advance():
        pass
    return workload.num_requests / (time.process_time() - started)


def vidur(python: Path, checkout: Path, workload: Workload, replicas: int) -> float:
    rows = zip(
        workload.arrival_s.tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "workload.json"
        path.write_text(json.dumps(list(rows)))
        driver = Path(__file__).with_name("vidur_driver.py")
        output = _run([str(python), str(driver), str(checkout), str(path), str(replicas)])
    found = json.loads(output.strip().splitlines()[-1])
    return float(found["requests"] / found["cpu_s"])


def dynamo(python: Path, workload: Workload, replicas: int) -> float:
    """From two runs, ten times as many requests and as many: what a start costs is the same in both."""
    few, many = workload.num_requests, 10 * workload.num_requests
    longer = make_workload(many, replicas)
    return (many - few) / (_dynamo_cpu_s(python, longer, replicas, many) - _dynamo_cpu_s(python, longer, replicas, few))


def _dynamo_cpu_s(python: Path, workload: Workload, replicas: int, num_requests: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        path.write_text("\n".join(_mooncake_lines(workload, num_requests)))
        report = Path(folder) / "report.json"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _run(
            [
                str(python), "-m", "dynamo.replay", str(path), "--trace-format", "mooncake",
                "--trace-block-size", str(DYNAMO_BLOCK_TOKENS), "--num-workers", str(replicas),
                "--replay-mode", "offline", "--router-mode", "round_robin",
                "--extra-engine-args", json.dumps(DYNAMO_ENGINE), "--report-json", str(report),
            ]
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert json.loads(report.read_text())["completed_requests"] == num_requests
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _mooncake_lines(workload: Workload, num_requests: int) -> list[str]:
    """Mooncake's trace format; every block has an id of its own, so that nothing is shared."""
    lines, block = [], 0
    for q in range(num_requests):
        prompt = int(workload.prompt_tokens[q])
        blocks = -(-prompt // DYNAMO_BLOCK_TOKENS)
        row = {
            "timestamp": float(workload.arrival_s[q]) * 1e3, "input_length": prompt,
            "output_length": int(workload.output_tokens[q]), "hash_ids": list(range(block, block + blocks)),
        }  # fmt: skip
        lines.append(json.dumps(row))
        block += blocks
    return lines


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(command[:3])} ... ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def measure(
    replicas: int, repeats: int, peers: dict[str, Callable[[Workload, int], float] | None]
) -> dict[str, object]:
    """Median requests per CPU second of every simulator; None for one that was not run."""
    workload = make_workload(max(2000, 100 * replicas), replicas)
    spec = fleet_spec(replicas)
    batch = FleetBatch(spec)
    own_engine(batch, workload)  # compiles, or loads what was compiled
    rounds: dict[str, list[float]] = {"engine": [], "reference": []} | {name: [] for name in peers}
    for _ in range(repeats):
        rounds["engine"].append(own_engine(batch, workload))
        rounds["reference"].append(reference(spec, workload))
        for name, peer in peers.items():
            if peer is not None:
                rounds[name].append(peer(workload, replicas))
    speeds = {name: statistics.median(found) if found else None for name, found in rounds.items()}
    return {"replicas": replicas, "requests": workload.num_requests, "requests_per_cpu_s": speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", default="1,4,64")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vidur", type=Path, help="folder that holds Vidur's package")
    parser.add_argument("--vidur-python", type=Path, help="interpreter with Vidur's requirements")
    parser.add_argument("--dynamo-python", type=Path, help="interpreter with ai-dynamo")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if (options.vidur is None) != (options.vidur_python is None):
        parser.error("--vidur and --vidur-python go together")
    peers: Peers = {
        "vidur": options.vidur and (lambda work, n: vidur(options.vidur_python, options.vidur, work, n)),
        "dynosim": options.dynamo_python and (lambda work, n: dynamo(options.dynamo_python, work, n)),
    }
    rows = [measure(int(count), options.repeats, peers) for count in options.replicas.split(",")]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        speeds = row["requests_per_cpu_s"]
        assert isinstance(speeds, dict)
        print(f"{row['replicas']} replicas, {row['requests']} requests; per CPU second, and the engine over it:")
        for name, speed in speeds.items():
            told = "not run" if speed is None else f"{speed:>12,.0f}  {speeds['engine'] / speed:>10,.1f} x"
            print(f"  {name:<10} {told}")


if __name__ == "__main__":
    main()
