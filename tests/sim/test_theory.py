"""Queueing theory: where a closed form is known, the compiled engine gives it, within a stated confidence interval.

Engines that run one request at a time (``max_num_seqs=1``) behind the gateway's one queue are classical queues.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FloatArray
from rl_autoscale.sim.fleet import FleetBatch, SimFleet
from rl_autoscale.workload.trace import Workload

NUM_RUNS, NUM_REQUESTS, WARM_UP = 40, 80_000, 4_000
CONFIDENCE = 0.99
ITERATION_S = 0.01
PROFILE = f"""
{{name: clerk, model: toy, gpu: toy, gpus_per_replica: 1, kv_blocks: 10000, max_num_seqs: 1,
 max_num_batched_tokens: 1024,
 token_knots: [0, 1], token_knot_s: [{ITERATION_S}, {ITERATION_S}], decode_context_s: 0, decode_seq_s: 0,
 prefill_pair_s: 0, prefill_context_s: 0, prefill_seq_s: 0, source: made up}}
"""


@pytest.fixture
def clerks(tmp_path: Path) -> dict[int, FleetSpec]:
    """Fleets of one and of four replicas that serve one request at a time, 10 ms per output token."""
    path = tmp_path / "clerk.yaml"
    path.write_text(PROFILE)
    return {
        count: FleetSpec.from_dict(
            {
                "pools": [{"name": "p", "profile": str(path), "min_replicas": count, "max_replicas": count}],
                "classes": [{"name": "c", "ttft_slo_s": 1.0, "tpot_slo_s": 1.0, "queue_limit": 10**9}],
                "control_interval_s": 0.05,
                "telemetry_age_s": 0.0,
            }
        )
        for count in (1, 4)
    }


def poisson(rng: np.random.Generator, rate_per_s: float, output_tokens: FloatArray) -> Workload:
    arrival_s = np.cumsum(rng.exponential(1.0 / rate_per_s, size=len(output_tokens)))
    ones = np.ones(len(output_tokens), dtype=int)
    return Workload(arrival_s, ones, output_tokens.astype(int), 0 * ones, ("c",), float(arrival_s[-1]))


def mean_waits_s(spec: FleetSpec, rate_per_s: float, *, mean_tokens: float, geometric: bool) -> FloatArray:
    """Mean wait from arrival to service, one value per independent run."""
    batch = FleetBatch(spec)
    means = []
    for run in range(NUM_RUNS):
        rng = np.random.default_rng(run)
        tokens = rng.geometric(1.0 / mean_tokens, NUM_REQUESTS) if geometric else np.full(NUM_REQUESTS, mean_tokens)
        batch.load(0, poisson(rng, rate_per_s, tokens), seed=run)
        batch.run(0)
        requests = batch.requests()[WARM_UP:]
        means.append(float((requests["scheduled_s"] - requests["arrival_s"]).mean()))
    return np.array(means)


def assert_confirms(measured: FloatArray, expected: float, *, within: float) -> None:
    """The confidence interval holds the expectation and is narrower than a share of it."""
    half_width = stats.t.ppf(0.5 + CONFIDENCE / 2, len(measured) - 1) * stats.sem(measured)
    assert half_width < within * expected, (
        f"half width {half_width / expected:.3f} of the expectation: too wide to tell"
    )
    assert abs(measured.mean() - expected) < half_width, (
        f"{measured.mean():.5f} +- {half_width:.5f}, not {expected:.5f}"
    )


def test_deterministic_service_waits_as_pollaczek_and_khinchine_say(clerks: dict[int, FleetSpec]) -> None:
    """M/D/1: mean wait = rho s / (2 (1 - rho)); 99 % interval of half width < 3 %."""
    service_s, utilisation = 10 * ITERATION_S, 0.8
    waits_s = mean_waits_s(clerks[1], utilisation / service_s, mean_tokens=10, geometric=False)
    assert_confirms(waits_s, utilisation * service_s / (2 * (1 - utilisation)), within=0.03)


def test_geometric_service_waits_as_a_markov_queue(clerks: dict[int, FleetSpec]) -> None:
    """M/G/1 with S = a N, N geometric with mean 1/p: wait = lambda E[S^2] / (2 (1 - rho)), E[S^2] = a^2 (2 - p) / p^2.

    With p = 1/200 this is M/M/1's rho s / (1 - rho) to 0.25 %.
    """
    mean_tokens, utilisation = 200, 0.7
    service_s, p = mean_tokens * ITERATION_S, 1 / mean_tokens
    rate_per_s = utilisation / service_s
    expected_s = rate_per_s * ITERATION_S**2 * (2 - p) / p**2 / (2 * (1 - utilisation))
    assert expected_s == pytest.approx(utilisation * service_s / (1 - utilisation), rel=0.0026)
    waits_s = mean_waits_s(clerks[1], rate_per_s, mean_tokens=mean_tokens, geometric=True)
    assert_confirms(waits_s, expected_s, within=0.04)


def test_four_replicas_share_one_queue_as_erlang_says(clerks: dict[int, FleetSpec]) -> None:
    """M/M/4: mean wait = C(4, a) s / (4 - a), with Erlang's C; geometric service differs from it by less than 0.5 %."""
    mean_tokens, servers, utilisation = 200, 4, 0.8
    service_s, offered = mean_tokens * ITERATION_S, servers * utilisation
    tail = offered**servers / math.factorial(servers) / (1 - utilisation)
    erlang_c = tail / (sum(offered**k / math.factorial(k) for k in range(servers)) + tail)
    waits_s = mean_waits_s(clerks[4], offered / service_s, mean_tokens=mean_tokens, geometric=True)
    assert_confirms(waits_s, erlang_c * service_s / (servers - offered), within=0.05)


def test_arrivals_see_time_averages(clerks: dict[int, FleetSpec]) -> None:
    """PASTA: the share of Poisson arrivals that need not wait is the share of time without work, 1 - rho."""
    service_s, utilisation = 10 * ITERATION_S, 0.6
    idle = []
    for run in range(NUM_RUNS):
        batch = FleetBatch(clerks[1])
        workload = poisson(np.random.default_rng(run), utilisation / service_s, np.full(NUM_REQUESTS, 10.0))
        batch.load(0, workload, seed=run)
        batch.run(0)
        requests = batch.requests()
        idle.append(float((requests["scheduled_s"] == requests["arrival_s"]).mean()))
    assert_confirms(np.array(idle), 1 - utilisation, within=0.02)


def test_littles_law(clerks: dict[int, FleetSpec]) -> None:
    """Requests present, as telemetry sees them every 50 ms, average to arrival rate times mean stay (within 1 %)."""
    rng = np.random.default_rng(1)
    workload = poisson(rng, 7.0, rng.geometric(1 / 40, 4_000))
    fleet = SimFleet(clerks[4], workload)
    present = []
    while fleet.advance():
        state = fleet.observe()
        present.append(float(state.classes.queue_length[0] + state.classes.in_flight[0]))
    requests = fleet.batch.requests()
    total_stay_s = float((requests["end_s"] - requests["arrival_s"]).sum())
    assert np.mean(present) > 1.0
    assert sum(present) * 0.05 == pytest.approx(total_stay_s, rel=0.01)
