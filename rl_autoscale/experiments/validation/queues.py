"""Queueing theory: replicas that serve one request at a time behind the gateway's one queue are classical queues."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.profile import LatencyProfile
from rl_autoscale.fleet.spec import FleetSpec, ServiceClass
from rl_autoscale.fleet.state import FloatArray
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.workload.trace import Workload

NUM_RUNS, NUM_REQUESTS, WARM_UP = 40, 80_000, 4_000
CONFIDENCE = 0.99
ITERATION_S = 0.01
"""Service time of one output token, whatever the request."""

_CLERK = LatencyProfile(
    name="clerk", model="toy", gpu="toy", gpus_per_replica=1, kv_blocks=10_000, max_num_seqs=1,
    max_num_batched_tokens=1024, token_knots=(0, 1), token_knot_s=(ITERATION_S, ITERATION_S), decode_context_s=0.0,
    decode_seq_s=0.0, prefill_pair_s=0.0, prefill_context_s=0.0, prefill_seq_s=0.0, source="made up",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue with a known mean wait.

    Attributes:
        name: in Kendall's notation.
        servers: replicas.
        utilisation: offered load per server.
        mean_tokens: output tokens per request, each of `ITERATION_S`.
        geometric: whether output lengths are geometric; constant otherwise.
        wait_s: the closed form.
        within: the half width of the confidence interval that is asked for, as a share of the wait.
    """

    name: str
    servers: int
    utilisation: float
    mean_tokens: int
    geometric: bool
    wait_s: Callable[[Queue], float]
    within: float

    @property
    def service_s(self) -> float:
        """Mean service time."""
        return self.mean_tokens * ITERATION_S

    @property
    def rate_per_s(self) -> float:
        """Arrivals per second."""
        return self.servers * self.utilisation / self.service_s


def pollaczek_khinchine_s(queue: Queue) -> float:
    """M/G/1: rate x E[S^2] / (2 (1 - utilisation))."""
    p = 1.0 / queue.mean_tokens
    second_moment = ITERATION_S**2 * ((2.0 - p) / p**2 if queue.geometric else queue.mean_tokens**2)
    return queue.rate_per_s * second_moment / (2.0 * (1.0 - queue.utilisation))


def erlang_c_s(queue: Queue) -> float:
    """M/M/c: C(c, a) s / (c - a); geometric service differs from it by less than the interval's width."""
    offered, servers = queue.servers * queue.utilisation, queue.servers
    tail = offered**servers / math.factorial(servers) / (1.0 - queue.utilisation)
    waits = tail / (sum(offered**k / math.factorial(k) for k in range(servers)) + tail)
    return waits * queue.service_s / (servers - offered)


QUEUES = (
    Queue("M/D/1", 1, 0.8, 10, False, pollaczek_khinchine_s, 0.03),
    Queue("M/M/1", 1, 0.7, 200, True, pollaczek_khinchine_s, 0.04),
    Queue("M/M/4", 4, 0.8, 200, True, erlang_c_s, 0.05),
)


@dataclass(frozen=True, slots=True)
class QueueResult:
    """Simulated against closed form.

    Attributes:
        queue: its name.
        expected_s: mean wait by the closed form.
        measured_s: mean wait over all runs.
        half_width_s: of the `CONFIDENCE` interval over independent runs.
    """

    queue: str
    expected_s: float
    measured_s: float
    half_width_s: float

    @property
    def confirmed(self) -> bool:
        """Whether the interval holds the closed form."""
        return abs(self.measured_s - self.expected_s) < self.half_width_s


def clerks(servers: int) -> FleetSpec:
    """A fleet of replicas that serve one request at a time."""
    pool = PoolSpec(
        name="p", profile="llama-3.1-8b_a100_tp1", max_num_seqs=1, min_replicas=servers, max_replicas=servers
    )
    pool = pool.model_copy(update={"hardware": _CLERK, "max_num_batched_tokens": _CLERK.max_num_batched_tokens})
    promise = ServiceClass(name="c", ttft_slo_s=1.0, tpot_slo_s=1.0, queue_limit=10**9)
    return FleetSpec(pools=(pool,), classes=(promise,), control_interval_s=0.05, telemetry_age_s=0.0)


def poisson(rng: np.random.Generator, rate_per_s: float, output_tokens: FloatArray) -> Workload:
    """Poisson arrivals of one-token prompts with these output lengths."""
    arrival_s = np.cumsum(rng.exponential(1.0 / rate_per_s, size=len(output_tokens)))
    ones = np.ones(len(output_tokens), dtype=int)
    return Workload(arrival_s, ones, output_tokens.astype(int), 0 * ones, ("c",), float(arrival_s[-1]))


def mean_waits_s(queue: Queue) -> FloatArray:
    """Mean wait from arrival to service, one value per independent run; shape (NUM_RUNS,)."""
    batch = FleetBatch(clerks(queue.servers))
    means = []
    for run in range(NUM_RUNS):
        rng = np.random.default_rng(run)
        lengths = (
            rng.geometric(1.0 / queue.mean_tokens, NUM_REQUESTS)
            if queue.geometric
            else np.full(NUM_REQUESTS, queue.mean_tokens)
        )
        batch.load(0, poisson(rng, queue.rate_per_s, lengths.astype(np.float64)), seed=run)
        batch.run(0)
        requests = batch.requests()[WARM_UP:]
        means.append(float((requests["scheduled_s"] - requests["arrival_s"]).mean()))
    return np.array(means)


def half_width(values: FloatArray) -> float:
    """Half width of the `CONFIDENCE` interval of a mean of independent runs."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * stats.sem(values))


def measure(queue: Queue) -> QueueResult:
    """Simulate a queue and compare it with its closed form."""
    waits_s = mean_waits_s(queue)
    return QueueResult(queue.name, queue.wait_s(queue), float(waits_s.mean()), half_width(waits_s))
