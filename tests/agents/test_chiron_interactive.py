from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.agents.chiron_interactive import (
    THETA,
    busy_instances,
    spike_theta,
    split_total,
    target_step,
    unit_step,
)


class TestSteps:
    def test_the_papers_example_keeps_two_spare_for_each_busy(self):
        assert target_step(busy=4, total=4, theta=THETA, dead_band=0.25) == 12
        assert [unit_step(4, total, THETA, 0.0) for total in (11, 12, 13)] == [12, 12, 12]

    def test_unit_step_flips_for_ever_off_the_reciprocals(self):
        total, seen = 2, []
        for _ in range(6):
            total = unit_step(1, total, 0.37, 0.0)
            seen.append(total)
        assert seen == [3, 2, 3, 2, 3, 2]

    def test_target_step_rests_at_its_fixed_point(self):
        total, seen = 2, []
        for _ in range(6):
            total = target_step(1, total, 0.37, 0.25)
            seen.append(total)
        assert seen == [3] * 6

    def test_dead_band_edges(self):
        # busy 3: N* = 9; the band reaches ceil(3 / 0.25) = 12
        assert target_step(3, 12, THETA, 0.25) == 12
        assert target_step(3, 13, THETA, 0.25) == 9
        assert target_step(3, 8, THETA, 0.25) == 9

    def test_never_below_one(self):
        assert target_step(0, 5, THETA, 0.25) == 1
        assert unit_step(0, 1, THETA, 0.0) == 1
        assert unit_step(0, 0, THETA, 0.0) == 1

    @given(busy=st.integers(0, 50), total=st.integers(1, 200), theta=st.floats(0.1, 1.0), dead_band=st.floats(0.0, 0.9))
    def test_target_step_is_idempotent_and_holds_theta(self, busy, total, theta, dead_band):
        once = target_step(busy, total, theta, dead_band)
        assert target_step(busy, once, theta, dead_band) == once
        assert busy <= theta * once + 1e-6 or once == 1


class TestBusy:
    def test_packing_counts_instances(self, make_spec, make_state):
        spec = make_spec("interactive", "mixed", "batch", router="packing")
        state = make_state(spec, busy_interactive=[3, 2, 9], in_flight_interactive=500, queue_length=500)
        assert busy_instances(spec, state, [0, 1], np.full(3, 10.0)) == 5

    def test_spreading_counts_work_and_queue(self, make_spec, make_state):
        spec = make_spec("interactive", "mixed", router="least_loaded")
        state = make_state(spec, busy_interactive=9, in_flight_interactive=[25, 10], queue_length=6)
        assert busy_instances(spec, state, [0, 1], np.full(2, 10.0)) == 5  # ceil(2.5 + 1 + 0.6)


class TestThetaFromATrace:
    def test_one_over_the_spike_factor(self):
        counts = [10, 10, 30, 30, 10] * 40
        arrivals = np.concatenate([60.0 * k + np.linspace(0, 59, n) for k, n in enumerate(counts)])
        assert spike_theta(arrivals, 60.0) == pytest.approx(1 / 3)

    def test_clamped_and_defaulted(self):
        steady = np.arange(0.0, 6000.0, 1.0)
        assert spike_theta(steady, 60.0) == 0.9
        burst = np.sort(np.concatenate([np.arange(0, 3000, 60.0), np.full(1000, 3000.0)]))
        assert spike_theta(burst, 60.0) >= 0.1
        assert spike_theta(np.array([]), 60.0) == THETA
        assert spike_theta(np.array([1.0]), 60.0) == THETA


class TestSplit:
    @pytest.fixture
    def spec(self, make_spec):
        return make_spec("interactive", "mixed", "batch", pool={"max_replicas": 10})

    @pytest.mark.parametrize(
        ("total", "busy", "asked_for", "expected"),
        [
            (9, 3, [1, 2], [3, 6]),  # grow the interactive pool to what is busy, the rest is slack
            (6, 2, [3, 6], [2, 4]),  # shrink towards the same split
            (4, 3, [1, 2], [2, 2]),  # growth alone does not suffice: no mixed instance is moved
            (15, 1, [1, 9], [5, 10]),  # the mixed pool is full
            (2, 2, [2, 3], [2, 0]),
            (1, 0, [1, 0], [1, 0]),
        ],
    )
    def test_moves(self, spec, total, busy, asked_for, expected):
        target = split_total(total, busy, np.array([*asked_for, 7]), spec, [0, 1])
        assert target.tolist() == [*expected, 7]

    @given(total=st.integers(0, 30), busy=st.integers(0, 12), first=st.integers(0, 10), second=st.integers(0, 10))
    def test_laws(self, total, busy, first, second):
        spec = _spec()
        asked_for = np.array([first, second, 3])
        target = split_total(total, busy, asked_for, spec, [0, 1])
        change = target - asked_for
        assert change.min() * change.max() >= 0  # no two pools move in opposite directions
        assert target[:2].sum() == min(total, 20)
        assert (target >= 0).all()
        assert (target <= 10).all()
        assert target[2] == 3


def _spec():
    from rl_autoscale.fleet.spec import FleetSpec

    pool = {"profile": "llama-3.1-8b_a100_tp1", "min_replicas": 0, "max_replicas": 10}
    roles = ("interactive", "mixed", "batch")
    return FleetSpec.from_dict(
        {
            "pools": [{"name": role, "role": role, **pool} for role in roles],
            "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}],
        }
    )


def test_theta_default_is_a_third():
    assert math.isclose(THETA, 1 / 3)
