"""What the critic is told about the future is the true future."""

from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.envs.foresight import HORIZONS_S, Foresight
from rl_autoscale.envs.mdp import FleetMdp
from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.workload.trace import Workload
from tests.envs.toy import SHIELD, sampler, toy_spec

NUM_STEPS = 20


def load_of(requests_per_step: list[int]) -> Workload:
    """So many requests of one size at the middle of each control step of 5 s."""
    arrival_s = np.repeat(5.0 * np.arange(len(requests_per_step)) + 2.5, requests_per_step)
    ones = np.ones(len(arrival_s), dtype=np.int32)
    span_s = 5.0 * len(requests_per_step)
    return Workload(arrival_s, 500 * ones, 200 * ones, np.zeros(len(ones), dtype=np.int16), ("chat",), span_s)


def seen(requests_per_step: list[int], now_s: float, speed: float = 1.0) -> np.ndarray:
    """True demand over what is measured now, by horizon."""
    foresight = Foresight(toy_spec(), 1)
    foresight.load(0, load_of(requests_per_step), speed, 1.0)
    return 2.0 ** foresight.features(np.array([now_s]), np.array([[0.8]]))[0, : len(HORIZONS_S)] * (0.8 + 0.2) - 0.2


def replicas(requests: float) -> float:
    work_s = DemandEstimator(toy_spec()).request_work_s(np.array([500.0]), np.array([200.0]), np.array([0]))
    return float(requests * work_s[0] / 5.0)


def test_each_horizon_shows_the_demand_up_to_it():
    steps = [30] * 6 + [60] * 6 + [15] * 12 + [90] * 8
    ahead = seen(steps, now_s=0.0)
    expected = [replicas(n) for n in (30, 60, 15, 90, 90, 90)]  # the last two lie beyond the end: as before it
    assert ahead == pytest.approx(expected, rel=1e-4)


def test_at_the_horizon_traffic_goes_on_as_before():
    steps = [30] * 6 + [60] * 14
    assert seen(steps, now_s=100.0) == pytest.approx([replicas(60)] * len(HORIZONS_S), rel=1e-4)


def test_time_moves_and_a_slow_fleet_needs_more():
    steps = [30] * 6 + [60] * 14
    assert seen(steps, now_s=30.0)[0] == pytest.approx(replicas(60), rel=1e-4)
    assert seen(steps, now_s=30.0, speed=1.25)[0] == pytest.approx(1.25 * replicas(60), rel=1e-4)


def test_every_fleet_has_its_own_and_a_longer_episode_fits():
    foresight = Foresight(toy_spec(), 2)
    for e, steps in enumerate(([30] * 4, [60] * NUM_STEPS)):
        foresight.load(e, load_of(steps), 1.0, 2.0)
    features = foresight.features(np.array([0.0, 100.0]), np.full((2, 1), 0.8))
    assert features.shape == (2, foresight.num_features)
    assert 2.0 ** features[:, 0] - 0.2 == pytest.approx([replicas(30), replicas(60)], rel=1e-4)
    assert features[:, -1] == pytest.approx(1.0)  # log2 of the start-up scale


def test_the_mdp_keeps_it_in_step():
    mdp = FleetMdp(toy_spec(), SHIELD, sampler(), num_fleets=2)
    mdp.reset(0)
    first = mdp.foresight()
    for _ in range(3):
        mdp.step(np.zeros((2, mdp.decoder.num_actions)))
    assert first.shape == (2, mdp.num_foresight_features)
    assert not np.allclose(first, mdp.foresight())
