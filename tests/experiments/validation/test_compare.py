from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.experiments.validation.compare import compare, metric_error, request_times


def test_times_follow_from_stamps() -> None:
    times = request_times(np.array([1.0, 2.0]), np.array([1.5, 3.0]), np.array([3.5, 3.0]), np.array([5.0, 1.0]))
    assert times.ttft_s.tolist() == [0.5, 1.0]
    assert times.e2e_s.tolist() == [2.5, 1.0]
    assert times.tpot_s[0] == pytest.approx(0.5)
    assert np.isnan(times.tpot_s[1])  # a single token has no gap


def test_errors_are_signed_in_quantiles_and_absolute_per_request() -> None:
    measured = np.linspace(1.0, 2.0, 101)
    error = metric_error("e2e_s", 1.1 * measured, measured)
    assert error.mean == pytest.approx(0.1)
    assert list(error.quantiles) == ["p50", "p90", "p99"]
    assert error.quantiles["p99"] == pytest.approx(0.1)
    late_and_early = measured * np.where(np.arange(101) % 2, 1.2, 0.8)
    error = metric_error("e2e_s", late_and_early, measured)
    assert abs(error.mean) < 0.01
    assert error.request_mean == pytest.approx(0.2)
    assert error.request_median == pytest.approx(0.2)


def test_what_is_undefined_on_either_side_is_left_out() -> None:
    times = request_times(np.zeros(3), np.ones(3), np.full(3, 3.0), np.array([1.0, 3.0, 3.0]))
    errors = {error.metric: error.num_requests for error in compare(times, times)}
    assert errors == {"ttft_s": 3, "tpot_s": 2, "e2e_s": 3}
