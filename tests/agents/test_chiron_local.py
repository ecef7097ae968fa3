from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.agents.chiron_local import (
    LITERAL_FORM,
    ROBUST_FORM,
    LocalLoop,
    binding_pools,
    next_batch_cap,
    pool_itl_slo_s,
)

CHAT = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
JOBS = {"name": "jobs", "kind": "batch", "ttft_slo_s": 3600.0, "tpot_slo_s": 1.0}
nan = math.nan


class TestAlgorithm1:
    def test_grows_by_the_smoothed_inverse_of_backpressure(self):
        assert next_batch_cap(64, lbp=0.5, tbp=0.25) == 0.5 * 128 + 0.5 * 64
        assert next_batch_cap(64, lbp=0.8, tbp=nan) == pytest.approx(0.5 * 80 + 0.5 * 64)

    @pytest.mark.parametrize(("lbp", "tbp"), [(1.0, 0.5), (0.5, 1.0), (3.0, nan), (nan, 1.2)])
    def test_halves_at_backpressure_of_one(self, lbp, tbp):
        assert next_batch_cap(64, lbp=lbp, tbp=tbp) == 32

    def test_nothing_known_keeps_the_cap(self):
        assert next_batch_cap(64, lbp=nan, tbp=nan) == 64

    def test_growth_is_bounded_near_zero_backpressure(self):
        assert next_batch_cap(64, lbp=0.0, tbp=nan) == pytest.approx(10.5 * 64)

    def test_band_holds_on_noise_but_not_on_latency(self):
        assert next_batch_cap(64, lbp=0.5, tbp=1.04, tbp_band=0.05) == 64
        assert next_batch_cap(64, lbp=0.5, tbp=1.05, tbp_band=0.05) == 32
        assert next_batch_cap(64, lbp=1.0, tbp=0.9, tbp_band=0.05) == 32

    @given(batch=st.floats(1, 4096), lbp=st.floats(0.01, 10), tbp=st.floats(0.01, 10))
    def test_direction_follows_the_larger_backpressure(self, batch, lbp, tbp):
        grown = next_batch_cap(batch, lbp, tbp)
        assert (grown > batch) == (max(lbp, tbp) < 1.0)


class TestItlSlo:
    def test_a_pool_that_runs_both_kinds_keeps_the_smaller(self, make_spec, make_state):
        spec = make_spec("interactive", "mixed", "batch", classes=(CHAT, JOBS))
        state = make_state(spec, in_flight=10, in_flight_interactive=[10, 5, 0], class_in_flight=10)
        assert pool_itl_slo_s(spec, state).tolist() == [0.1, 0.1, 1.0]

    def test_a_mixed_pool_with_batch_work_only_relaxes(self, make_spec, make_state):
        spec = make_spec("mixed", classes=(CHAT, JOBS))
        state = make_state(spec, in_flight=10, in_flight_interactive=0, class_in_flight=10)
        assert pool_itl_slo_s(spec, state).tolist() == [1.0]

    def test_unknown_is_not_absent(self, make_spec, make_state):
        spec = make_spec("mixed", classes=(CHAT, JOBS))
        state = make_state(spec, in_flight=10, in_flight_interactive=np.nan, class_in_flight=np.nan)
        assert pool_itl_slo_s(spec, state).tolist() == [0.1]

    def test_empty_pool_takes_the_tightest_and_a_useless_one_has_none(self, make_spec, make_state):
        spec = make_spec("mixed", "batch", classes=(CHAT,))
        assert pool_itl_slo_s(spec, make_state(spec)).tolist() == [0.1, math.inf]


def test_binding_is_a_full_pool_or_a_queue_it_could_serve(make_spec, make_state):
    spec = make_spec("interactive", "batch", classes=(CHAT, JOBS))
    cap = np.array([10.0, 10.0])
    full = make_state(spec, ready=2, in_flight=[18, 17])
    assert binding_pools(spec, full, cap).tolist() == [True, False]
    queued = make_state(spec, ready=2, queue_length=[0, 1])
    assert binding_pools(spec, queued, cap).tolist() == [False, True]
    assert binding_pools(spec, make_state(spec, ready=0), cap).tolist() == [False, False]


class TestLoop:
    def ticks(self, make_spec, make_state, form, throughputs, *, queue=0.0, itl_s=0.02, readable=True):
        spec = make_spec()
        loop = LocalLoop(form, np.array([256.0]), 64.0)
        caps = []
        for throughput in throughputs:
            state = make_state(spec, generation_tokens_per_s=throughput, itl_s=itl_s, queue_length=queue, in_flight=1)
            caps.append(float(loop.step(spec, state, np.array([readable]))[0]))
        return caps

    def test_first_tick_has_no_throughput_backpressure(self, make_spec, make_state):
        assert self.ticks(make_spec, make_state, LITERAL_FORM, [500.0], itl_s=0.08) == [
            pytest.approx(0.5 * 80 + 0.5 * 64)
        ]

    def test_a_drop_in_arrivals_halves_only_the_literal_form(self, make_spec, make_state):
        falling = [800.0, 400.0, 200.0, 100.0]
        literal = self.ticks(make_spec, make_state, LITERAL_FORM, falling, itl_s=0.08)
        assert literal[1:] == [literal[0] / 2, literal[0] / 4, literal[0] / 8]
        robust = self.ticks(make_spec, make_state, ROBUST_FORM, falling, itl_s=0.08)
        assert robust == sorted(robust)
        assert robust[-1] > robust[0]

    def test_a_cut_is_not_followed_by_a_cut_in_the_robust_form(self, make_spec, make_state):
        # throughput falls with the batch: the literal form reads its own cut as backpressure
        falling = [800.0, 800.0, 500.0, 400.0, 300.0]
        literal = self.ticks(make_spec, make_state, LITERAL_FORM, falling, queue=10.0, itl_s=0.08)
        assert literal[4] == literal[1] / 8
        robust = self.ticks(make_spec, make_state, ROBUST_FORM, falling, queue=10.0, itl_s=0.08)
        assert robust[2] == robust[1] / 2
        assert robust[3] > robust[2]

    def test_a_change_of_replicas_is_no_backpressure(self, make_spec, make_state):
        spec = make_spec()
        for form in (LITERAL_FORM, ROBUST_FORM):
            loop = LocalLoop(form, np.array([256.0]), 64.0)
            given = {"generation_tokens_per_s": 1000.0, "itl_s": 0.08, "queue_length": 10, "in_flight": 99}
            before = loop.step(spec, make_state(spec, ready=1, **given), np.array([True]))
            after = loop.step(spec, make_state(spec, ready=2, **given), np.array([True]))
            assert after[0] > before[0]

    def test_lost_throughput_under_a_queue_halves_both(self, make_spec, make_state):
        for form in (LITERAL_FORM, ROBUST_FORM):
            caps = self.ticks(make_spec, make_state, form, [800.0, 800.0, 500.0], queue=10.0, itl_s=0.08)
            assert caps[2] == caps[1] / 2

    def test_noise_at_saturation_saws_the_literal_form_only(self, make_spec, make_state):
        noise = [1000.0 + 20.0 * (-1) ** k for k in range(12)]
        literal = np.diff(self.ticks(make_spec, make_state, LITERAL_FORM, noise, queue=10.0))
        assert (literal < 0).sum() >= 5
        robust = np.diff(self.ticks(make_spec, make_state, ROBUST_FORM, noise, queue=10.0))
        assert (robust < 0).sum() == 0

    def test_idle_or_unreadable_ticks_keep_the_cap(self, make_spec, make_state):
        assert self.ticks(make_spec, make_state, LITERAL_FORM, [0.0, 0.0], itl_s=nan) == [64.0, 64.0]
        assert self.ticks(make_spec, make_state, ROBUST_FORM, [9.0, 1.0], itl_s=9.0, readable=False) == [64.0, 64.0]

    def test_cap_stays_between_one_and_the_limit(self, make_spec, make_state):
        assert self.ticks(make_spec, make_state, ROBUST_FORM, [100.0] * 9, itl_s=0.5)[-1] == 1.0
        assert self.ticks(make_spec, make_state, ROBUST_FORM, [100.0] * 9, itl_s=0.001)[-1] == 256.0

    def test_robust_form_smooths_latency(self, make_spec, make_state):
        spec = make_spec()
        loop = LocalLoop(ROBUST_FORM, np.array([256.0]), 64.0)
        for itl_s in (0.02, 0.12):  # average 0.07: below the SLO of 0.1 although the newest is above
            cap = loop.step(spec, make_state(spec, itl_s=itl_s, in_flight=1), np.array([True]))
        assert cap[0] > 64.0
