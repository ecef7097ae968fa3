"""Replicas that sleep, spot replicas, and pools of different hardware side by side; by hand, in both simulators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import ScalingDecision
from rl_autoscale.sim import episode, fleet
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.layout import LIFE, SPOT, Outcome
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.sim.reference import fleet as reference_fleet
from rl_autoscale.sim.result import EpisodeResult
from rl_autoscale.workload.trace import Workload

Run = Callable[..., tuple[EpisodeResult, Any]]
SLEEP = {"max_sleeping": 1, "wake": [{"mean_s": 3, "cv": 0}], "price_fraction": 0.25}


@pytest.fixture(params=[SimFleet, ReferenceFleet], ids=["engine", "reference"])
def run(request: pytest.FixtureRequest, metronome_profile: Path) -> Run:
    """Runs one pool whose iterations last 1 s for 60 s; ``targets`` are in force for 10 s each.

    Requests are (arrival, output tokens) of 10 prompt tokens. Returns the result and the requests' records.
    """

    def run(targets: list[int], requests: Sequence[tuple[float, int]] = ((0.0, 1),), **pool: Any) -> tuple[Any, Any]:
        pool = {
            "name": "p",
            "profile": str(metronome_profile),
            "startup": [{"mean_s": 15, "cv": 0}],
            "max_replicas": 4,
        } | pool
        pool["initial_replicas"] = targets[0]
        chat = {"name": "chat", "ttft_slo_s": 100, "tpot_slo_s": 100}
        spec = FleetSpec.from_dict({"pools": [{"min_replicas": 0} | pool], "classes": [chat]})
        arrival_s, output = (np.array(column) for column in zip(*requests, strict=True))
        ones = np.ones(len(requests), dtype=np.int64)
        workload = Workload(arrival_s, 10 * ones, output, 0 * ones, ("chat",), 60.0)
        simulator = request.param(spec, workload, drain_limit_s=0.0)
        going_on, step = True, 0
        while going_on:
            target = np.array([targets[min(step, len(targets) - 1)]])
            simulator.apply(ScalingDecision(target, spec.batch_limits, np.array([np.inf])))
            going_on = simulator.advance()
            step += 1
        result = simulator.result()
        is_engine = isinstance(simulator, SimFleet)
        return result, simulator.batch.requests().copy() if is_engine else simulator.request_records()

    return run


def test_a_surplus_replica_sleeps_and_wakes_in_seconds(run: Run) -> None:
    result, _ = run([2, 1, 1, 2, 2, 2], sleep=SLEEP)
    assert result.timeline["ready"][:, 0].tolist() == [2, 2, 1, 1, 2, 2]
    assert (result.pools[0].num_wakes, result.num_starts) == (1, 3)
    assert result.gpu_hours * 3600 == pytest.approx(10 * 2 + 20 * 1 + 30 * 2 + 20 * 0.25)
    awake, _ = run([2, 1, 1, 2, 2, 2])
    assert awake.timeline["ready"][:, 0].tolist() == [2, 2, 1, 1, 1, 2]  # started from scratch: 15 s
    assert awake.gpu_hours * 3600 == pytest.approx(10 * 2 + 20 * 1 + 30 * 2)


def test_no_more_sleep_than_may(run: Run) -> None:
    result, _ = run([4, 1], sleep=SLEEP)
    assert result.gpu_hours * 3600 == pytest.approx(10 * 4 + 50 * 1 + 50 * 0.25)
    result, _ = run([4, 1], sleep=SLEEP | {"max_sleeping": 9})
    assert result.gpu_hours * 3600 == pytest.approx(10 * 4 + 50 * 1 + 50 * 3 * 0.25)


def test_a_replica_that_has_work_sleeps_when_it_is_done(run: Run) -> None:
    """Two streams of 25 tokens on one replica each; the one that drains falls asleep at 25 s."""
    result, _ = run([2, 1], [(0.0, 25), (0.0, 25)], sleep=SLEEP)
    assert result.gpu_hours * 3600 == pytest.approx(25 * 2 + 35 * 1 + 35 * 0.25)


def test_a_wake_up_that_is_cancelled_goes_back_to_sleep(run: Run) -> None:
    slow = SLEEP | {"wake": [{"mean_s": 12, "cv": 0}]}
    result, _ = run([2, 1, 2, 1, 2, 2], sleep=slow)
    assert result.pools[0].num_wakes == 2
    assert result.timeline["starting"][:, 0].tolist() == [0, 0, 0, 1, 0, 1]
    assert result.gpu_hours * 3600 == pytest.approx(60 + 10 + 10 + 20 + 20 * 0.25)


@pytest.fixture
def first_notice_at_12_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first replica gets its notice after 12 s, no other ever does."""

    def draw(*arguments: Any) -> Any:
        times = episode.draw_replica_times(*arguments)
        times[SPOT], times[SPOT, 0], times[LIFE] = np.inf, 12.0, np.inf
        return times

    for module in (fleet, reference_fleet):
        monkeypatch.setattr(module, "draw_replica_times", draw)


@pytest.mark.usefixtures("first_notice_at_12_s")
def test_a_spot_replica_is_taken_away_when_its_notice_ends(run: Run) -> None:
    """The stream that runs to 40 s fails at 16 s; what comes at 13 s waits for the replacement of 12 s + 15 s."""
    result, requests = run([1], [(0.0, 40), (5.0, 9), (13.0, 2)], spot={"mean_life_s": 1, "notice_s": 4})
    assert requests["outcome"].tolist() == [Outcome.FAILED, Outcome.FINISHED, Outcome.FINISHED]
    assert requests["end_s"].tolist() == [16.0, 15.0, 29.0]
    pool = result.pools[0]
    assert (pool.num_notices, pool.num_taken_away, pool.num_crashes, pool.num_starts) == (1, 1, 0, 2)
    assert result.gpu_hours * 3600 == pytest.approx(16 + 48)


@pytest.mark.usefixtures("first_notice_at_12_s")
def test_a_spot_replica_that_drains_in_time_loses_nothing(run: Run) -> None:
    """It leaves at 20 s, and may not be reclaimed although a replica is missing all the while."""
    result, requests = run([1], [(0.0, 20)], spot={"mean_life_s": 1, "notice_s": 30})
    assert requests["outcome"].tolist() == [Outcome.FINISHED]
    assert (result.pools[0].num_notices, result.pools[0].num_taken_away) == (1, 0)
    assert result.timeline["ready"][:, 0].tolist() == [1, 1, 0, 1, 1, 1]
    assert result.gpu_hours * 3600 == pytest.approx(20 + 48)


@pytest.mark.usefixtures("first_notice_at_12_s")
def test_an_idle_spot_replica_leaves_at_once(run: Run) -> None:
    result, _ = run([1], spot={"mean_life_s": 1, "notice_s": 30})
    assert result.gpu_hours * 3600 == pytest.approx(60)
    assert result.pools[0].num_taken_away == 0


def test_sleep_and_spot_exclude_each_other(run: Run) -> None:
    with pytest.raises(SpecError, match="sleep and spot exclude each other"):
        run([1], sleep=SLEEP, spot={"mean_life_s": 1})


GPUS = {"a100": 2.0, "h100": 4.0, "l40s": 1.0}


def mixed_fleet(router: str) -> tuple[FleetSpec, EpisodeResult, Any, Any]:
    """One replica each of three GPUs, five minutes of 12 requests/s."""
    rng = np.random.default_rng(0)
    number = 3600
    zeros = np.zeros(number, dtype=np.int64)
    prompt, output = rng.integers(100, 1500, number), rng.integers(50, 300, number)
    workload = Workload(np.sort(rng.uniform(0, 300, number)), prompt, output, zeros, ("chat",), 300.0)
    pools = [
        {"name": gpu, "profile": f"llama-3.1-8b_{gpu}_tp1", "max_replicas": 1, "price_usd_per_gpu_hour": price}
        for gpu, price in GPUS.items()
    ]
    spec = FleetSpec.from_dict(
        {"pools": pools, "classes": [{"name": "chat", "ttft_slo_s": 1, "tpot_slo_s": 0.06}], "router": router}
    )
    simulator = SimFleet(spec, workload)
    while simulator.advance():
        pass
    return spec, simulator.result(), simulator.batch.requests(), simulator.batch.pools()


def test_least_loaded_shares_the_work_of_mixed_hardware_by_speed() -> None:
    spec, result, requests, pools = mixed_fleet("least_loaded")
    which = np.searchsorted(pools["base"], requests["replica"], side="right") - 1
    sent = np.bincount(which, minlength=3)
    speed = 1 / np.array([pool.typical_request_s for pool in spec.pools])
    assert speed[1] > speed[0] > speed[2]
    assert sent[1] > sent[0] > sent[2] > 0
    tpot_s = (requests["end_s"] - requests["first_token_s"]) / (requests["output_tokens"] - 1)
    by_gpu_s = [tpot_s[which == p].mean() for p in range(3)]
    assert by_gpu_s[1] < by_gpu_s[0] < by_gpu_s[2]
    assert result.slo_attainment > mixed_fleet("packing")[1].slo_attainment  # fills the A100 first


def test_cost_is_each_pools_gpu_hours_at_its_price() -> None:
    spec, result, _, pools = mixed_fleet("least_loaded")
    hours = pools["replica_s"] / 3600
    assert hours.tolist() == pytest.approx([result.duration_s / 3600] * 3)
    assert [item.cost_usd for item in result.pools] == pytest.approx((hours * list(GPUS.values())).tolist())
    assert result.cost_usd == pytest.approx(float(hours @ list(GPUS.values())))
    assert result.summary()["cost_usd/h100"] == pytest.approx(4.0 * float(hours[1]))
    assert [pool.price_usd_per_gpu_hour for pool in spec.pools] == list(GPUS.values())
