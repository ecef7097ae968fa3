"""Queueing theory: where a closed form is known, the compiled engine gives it, within a stated confidence interval.

The queues and their closed forms are those that ``rl-autoscale validate`` reports.
"""

from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.experiments.validation.queues import (
    ITERATION_S,
    NUM_REQUESTS,
    NUM_RUNS,
    QUEUES,
    Queue,
    clerks,
    half_width,
    mean_waits_s,
    poisson,
    pollaczek_khinchine_s,
)
from rl_autoscale.fleet.state import FloatArray
from rl_autoscale.sim.fleet import FleetBatch, SimFleet


def assert_confirms(measured: FloatArray, expected: float, *, within: float) -> None:
    """The confidence interval holds the expectation and is narrower than a share of it."""
    width = half_width(measured)
    assert width < within * expected, f"half width {width / expected:.3f} of the expectation: too wide to tell"
    assert abs(measured.mean() - expected) < width, f"{measured.mean():.5f} +- {width:.5f}, not {expected:.5f}"


@pytest.mark.parametrize("queue", QUEUES, ids=lambda queue: queue.name)
def test_waits_are_what_the_closed_form_says(queue: Queue) -> None:
    assert_confirms(mean_waits_s(queue), queue.wait_s(queue), within=queue.within)


def test_geometric_service_is_nearly_a_markov_queue() -> None:
    """M/G/1 with S = a N, N geometric with mean 200, is M/M/1's rho s / (1 - rho) to 0.25 %."""
    queue = Queue("M/M/1", 1, 0.7, 200, True, pollaczek_khinchine_s, 0.04)
    assert queue.wait_s(queue) == pytest.approx(0.7 * queue.service_s / 0.3, rel=0.0026)


def test_arrivals_see_time_averages() -> None:
    """PASTA: the share of Poisson arrivals that need not wait is the share of time without work, 1 - rho."""
    service_s, utilisation = 10 * ITERATION_S, 0.6
    idle = []
    for run in range(NUM_RUNS):
        batch = FleetBatch(clerks(1))
        workload = poisson(np.random.default_rng(run), utilisation / service_s, np.full(NUM_REQUESTS, 10.0))
        batch.load(0, workload, seed=run)
        batch.run(0)
        requests = batch.requests()
        idle.append(float((requests["scheduled_s"] == requests["arrival_s"]).mean()))
    assert_confirms(np.array(idle), 1 - utilisation, within=0.02)


def test_littles_law() -> None:
    """Requests present, as telemetry sees them every 50 ms, average to arrival rate times mean stay (within 1 %)."""
    rng = np.random.default_rng(1)
    workload = poisson(rng, 7.0, rng.geometric(1 / 40, 4_000).astype(np.float64))
    fleet = SimFleet(clerks(4), workload)
    present = []
    while fleet.advance():
        state = fleet.observe()
        present.append(float(state.classes.queue_length[0] + state.classes.in_flight[0]))
    requests = fleet.batch.requests()
    total_stay_s = float((requests["end_s"] - requests["arrival_s"]).sum())
    assert np.mean(present) > 1.0
    assert sum(present) * 0.05 == pytest.approx(total_stay_s, rel=0.01)
