"""How long the controller takes to decide at 100 replicas, and what a look at them costs.

    python benchmarks/controller_latency.py [--replicas 100] [--steps 500] [--policy FOLDER]

Replicas are make-believe: every one answers with a full vLLM-shaped metrics page (DP rank and model labels, 22 TTFT
buckets and so on), parsed and windowed as in production; no network. *Decision*: telemetry in hand to targets handed
over: judge, policy with its time budget and thread hand-over, rule, shield, restraint, metrics. *Look*: write, read and
parse all pages, difference all counters, build the observation. On a shared machine only the CPU time means anything.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from live_world import Engine, FakeClock, World, world_spec

from rl_autoscale.agents.envelope import Envelope
from rl_autoscale.agents.learned import LearnedPolicy
from rl_autoscale.agents.registry import make_policy
from rl_autoscale.fleet.spec import ShieldSpec
from rl_autoscale.serving.controller import Controller
from rl_autoscale.serving.controller_metrics import ControllerMetrics
from rl_autoscale.serving.http_client import HttpAnswer
from rl_autoscale.serving.modes import ModeSwitch
from rl_autoscale.serving.safety import SafetyConfig
from rl_autoscale.serving.telemetry import Limits

LABELS = 'engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"'
TTFT_EDGES = (
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0"
)
OTHER_HISTOGRAMS = (
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
)  # fmt: skip


def full_page(engine: Engine, now_s: float) -> str:
    """A page of the length vLLM 0.33 serves (about 300 lines), with the engine's real counters."""
    lines = []
    for line in engine.text(now_s).splitlines():
        name, _, value = line.rpartition(" ")
        if "_bucket{" in name:
            lines.append(f"{name[:-1]},{LABELS}}} {value}")
        elif "{" not in name and not name.startswith("#"):
            lines.append(f"{name}{{{LABELS}}} {value}")
        else:
            lines.append(line)
    for name in OTHER_HISTOGRAMS:
        lines += [f'vllm:{name}_bucket{{{LABELS},le="{edge}"}} {engine.finished}.0' for edge in TTFT_EDGES.split()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--policy", help="folder of an exported policy for one pool and one class; default headroom")
    arguments = parser.parse_args()
    num = arguments.replicas
    world = World(world_spec(pool={"initial_replicas": num, "max_replicas": 2 * num}), rate_per_s=2.0 * num)
    world.http = lambda method, url, **_: HttpAnswer(  # type: ignore[method-assign]
        200, full_page(world.engine(url.split("/")[2].split(":")[0]), world.clock.now_s).encode()
    )
    fleet = world.fleet(gateway=True)
    policy = LearnedPolicy(arguments.policy) if arguments.policy else make_policy("headroom")
    envelope = Envelope.from_card(policy.card) if isinstance(policy, LearnedPolicy) else None
    limits = Limits(30.0, 0.5)
    controller = Controller(
        fleet, policy, make_policy("headroom"), ShieldSpec(), limits, SafetyConfig(), ModeSwitch("shadow"), FakeClock(),
        envelope=envelope, listeners=[ControllerMetrics()],
    )  # fmt: skip
    taken_s: dict[str, list[float]] = {}
    for _ in range(arguments.steps):
        measure("decision", taken_s, controller.step)
        world.clock.advance(9.0)
        measure("look", taken_s, lambda: fleet._look(10.0))
        world.clock.advance(1.0)
        fleet._look_s = world.clock.now_s
    skip = min(20, arguments.steps // 10)
    print(f"{num} replicas, policy {policy.name}, {arguments.steps - skip} steps")
    for name, taken in taken_s.items():
        p50, p99 = np.quantile(taken[skip:], [0.5, 0.99]) * 1e3
        print(f"{name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms")


def measure(name: str, taken_s: dict[str, list[float]], function: Callable[[], object]) -> None:
    """Book wall time and CPU time (all threads of this process) of one call."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    function()
    taken_s.setdefault(f"{name}, CPU", []).append(time.process_time() - cpu_s)
    taken_s.setdefault(f"{name}, wall", []).append(time.perf_counter() - wall_s)


if __name__ == "__main__":
    main()
