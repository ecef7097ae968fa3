"""Rate curves, gap laws and generators: what they promise, within stated confidence."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload import curves
from rl_autoscale.workload.arrivals import GapLaw, RateCurve, renewal_times, sample_arrivals, weibull_shape
from rl_autoscale.workload.clients import Client, Population, sample_clients, sum_of_clients
from rl_autoscale.workload.stats import gap_cv

SPREAD = 4.5
"""Standard errors allowed: one false alarm in about 150,000 seeded checks."""


@pytest.mark.parametrize("kind", ["gamma", "weibull"])
@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_asked_mean_and_cv(kind: Literal["gamma", "weibull"], cv: float) -> None:
    arrival_s = sample_arrivals(np.random.default_rng(1), curves.constant(100.0, 3000.0), GapLaw(cv, kind))
    measured = gap_cv(arrival_s)
    assert measured is not None
    assert measured == pytest.approx(cv, abs=0.02 + 0.02 * cv)
    assert arrival_s.size == pytest.approx(300_000, abs=1 + SPREAD * cv * math.sqrt(300_000))


@pytest.mark.parametrize(("kind", "cv"), [("gamma", 4.0), ("weibull", 3.0), ("gamma", 0.3)])
def test_a_short_window_is_not_biased_by_the_start(kind: Literal["gamma", "weibull"], cv: float) -> None:
    # started at an arrival, a renewal process of cv 4 would have 1.0 + (16 - 1) / 2 = 8.5 arrivals too many
    rng = np.random.default_rng(2)
    counts = np.array([renewal_times(rng, 20.0, GapLaw(cv, kind)).size for _ in range(4000)])
    assert counts.mean() == pytest.approx(20.0, abs=SPREAD * counts.std() / math.sqrt(counts.size))


@pytest.mark.parametrize(
    ("start_s", "edges_s", "rates"),
    [
        (0.0, [0, 10, 30, 60], [1, 2, 3]),
        (10.0, [0, 20, 50, 60], [2, 3, 1]),
        (15.0, [0, 15, 45, 55, 60], [2, 3, 1, 2]),
        (60.0, [0, 10, 30, 60], [1, 2, 3]),
        (119.0, [0, 1, 11, 31, 60], [3, 1, 2, 3]),
    ],
)
def test_a_curve_goes_round(start_s: float, edges_s: list[float], rates: list[float]) -> None:
    curve = RateCurve(np.array([0.0, 10.0, 30.0, 60.0]), np.array([1.0, 2.0, 3.0])).turned(start_s)
    assert curve.edges_s.tolist() == edges_s
    assert curve.rate_per_s.tolist() == rates


def test_poisson_counts_are_poisson() -> None:
    rng = np.random.default_rng(3)
    counts = np.array([sample_arrivals(rng, curves.constant(2.0, 10.0)).size for _ in range(4000)])
    assert counts.mean() == pytest.approx(20.0, abs=SPREAD * math.sqrt(20 / 4000))
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=SPREAD * math.sqrt(2 / 4000))


def test_arrivals_follow_the_rate_curve_and_keep_out_of_silence() -> None:
    curve = RateCurve(np.array([0.0, 100.0, 200.0, 400.0]), np.array([10.0, 0.0, 40.0]))
    arrival_s = sample_arrivals(np.random.default_rng(4), curve, GapLaw(1.5))
    counts, _ = np.histogram(arrival_s, curve.edges_s)
    assert counts[1] == 0
    assert counts[0] == pytest.approx(1000, abs=SPREAD * 1.5 * math.sqrt(1000))
    assert counts[2] == pytest.approx(8000, abs=SPREAD * 1.5 * math.sqrt(8000))


@given(
    rates=st.lists(st.floats(0, 30), min_size=1, max_size=6),
    widths=st.lists(st.floats(0.1, 20), min_size=6, max_size=6),
    cv=st.floats(0, 20),
    kind=st.sampled_from(["gamma", "weibull"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_curve_gives_sorted_arrivals_inside_it_and_the_same_for_the_same_seed(
    rates: list[float], widths: list[float], cv: float, kind: Literal["gamma", "weibull"], seed: int
) -> None:
    curve = RateCurve(np.concatenate(([0.0], np.cumsum(widths[: len(rates)]))), np.array(rates))
    first, second = (sample_arrivals(np.random.default_rng(seed), curve, GapLaw(cv, kind)) for _ in range(2))
    assert (np.diff(first) >= 0).all()
    assert ((first >= 0) & (first <= curve.span_s)).all()
    assert first.tobytes() == second.tobytes()


def test_weibull_shape_one_is_exponential() -> None:
    assert weibull_shape(1.0) == pytest.approx(1.0)
    assert weibull_shape(math.sqrt(5.0)) == pytest.approx(0.5)  # Gamma(5) / Gamma(3)^2 - 1 = 5


@pytest.mark.parametrize(
    ("edges", "rates", "message"),
    [
        ([0.0, 1.0], [-1.0], r"rate_per_s\[0\]=-1.0"),
        ([0.0, 1.0], [float("nan")], "finite"),
        ([0.0, 1.0, 1.0], [1.0, 1.0], "strictly increasing"),
        ([1.0, 2.0], [1.0], "from 0"),
        ([0.0, 1.0], [1.0, 2.0], "one edge more"),
    ],
)
def test_bad_curves_are_refused(edges: list[float], rates: list[float], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        RateCurve(np.array(edges), np.array(rates))


def test_an_absurd_number_of_arrivals_is_refused_before_memory_is() -> None:
    with pytest.raises(SpecError, match="lower the rate or the span"):
        sample_arrivals(np.random.default_rng(0), curves.constant(1e9, 1e6))


@pytest.mark.parametrize("cv", [-0.1, float("nan"), 1e6])
def test_bad_gap_laws_are_refused(cv: float) -> None:
    with pytest.raises(SpecError, match="cv="):
        GapLaw(cv)


def test_markov_modulation_spends_its_time_as_the_sojourns_say() -> None:
    curve = curves.markov_modulated(np.random.default_rng(5), [1.0, 10.0, 100.0], [60.0, 30.0, 10.0], 400_000.0)
    time_s = np.diff(curve.edges_s)
    shares = [time_s[curve.rate_per_s == rate].sum() / curve.span_s for rate in (1.0, 10.0, 100.0)]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_markov_modulation_starts_stationary() -> None:
    # a state drawn evenly would start in the slow one every second time, not nine times in ten
    starts = [
        curves.markov_modulated(np.random.default_rng(seed), [1.0, 5.0], [90.0, 10.0], 10.0).rate_per_s[0]
        for seed in range(400)
    ]
    assert np.mean(np.equal(starts, 1.0)) == pytest.approx(0.9, abs=4.5 * math.sqrt(0.09 / 400))


def test_flash_crowd_has_its_base_peak_and_decay() -> None:
    curve = curves.flash_crowd(2.0, 5.0, start_s=100.0, ramp_s=20.0, hold_s=60.0, decay_s=50.0, span_s=1000.0)
    at = curves.rate_at(curve, np.array([50.0, 110.0, 150.0, 180.0 + 50.0, 999.0]))
    assert at[0] == pytest.approx(2.0)
    assert at[1] == pytest.approx(6.0, rel=0.06)
    assert at[2] == pytest.approx(10.0)
    assert at[3] == pytest.approx(2.0 + 8.0 / math.e, rel=0.03)
    assert at[4] == pytest.approx(2.0, abs=0.01)


def test_flash_crowd_may_jump_and_start_at_zero() -> None:
    curve = curves.flash_crowd(1.0, 3.0, start_s=0.0, ramp_s=0.0, hold_s=10.0, decay_s=0.0, span_s=20.0)
    assert curves.rate_at(curve, np.array([0.5, 9.5, 10.5])).tolist() == [3.0, 3.0, 1.0]


def test_hourly_shape_has_its_mean_and_its_hours() -> None:
    shape = [1.0] * 12 + [3.0] * 12
    curve = curves.hourly(shape, 10.0, curves.DAY_S)
    assert curve.mean_rate_per_s == pytest.approx(10.0, rel=1e-3)
    assert curves.rate_at(curve, np.array([6.0, 18.0]) * 3600.0) == pytest.approx([5.0, 15.0])
    spike = curves.hourly([0.0] * 10 + [24.0] + [0.0] * 13, 1.0, curves.DAY_S)
    middle_s = (spike.edges_s[:-1] + spike.edges_s[1:]) / 2
    assert middle_s[np.argmax(spike.rate_per_s)] / 3600.0 == pytest.approx(10.5, abs=0.1)  # hour 10 is 10:00 to 11:00
    shifted = curves.hourly(shape, 10.0, 3600.0, start_hour=18.0)
    assert shifted.mean_rate_per_s == pytest.approx(15.0)


def test_sinusoid_keeps_its_mean_over_a_period() -> None:
    curve = curves.sinusoid(10.0, 0.8, 3600.0, 7200.0)
    assert curve.mean_rate_per_s == pytest.approx(10.0)
    assert curve.rate_per_s.max() == pytest.approx(18.0, rel=0.01)


def test_log_ar1_has_its_mean_spread_and_memory() -> None:
    curve = curves.log_ar1(np.random.default_rng(6), 5.0, 0.4, 100.0, 400_000.0, step_s=10.0)
    log_rate = np.log(curve.rate_per_s)
    assert curve.mean_rate_per_s == pytest.approx(5.0, rel=0.05)
    assert log_rate.std() == pytest.approx(0.4, rel=0.05)
    lagged = np.corrcoef(log_rate[:-10], log_rate[10:])[0, 1]
    assert lagged == pytest.approx(math.exp(-1.0), abs=0.06)


def test_sum_of_clients_adds_up_and_names_its_clients() -> None:
    clients = [Client(curves.constant(rate, 2000.0)) for rate in (1.0, 4.0)]
    arrival_s, index = sum_of_clients(np.random.default_rng(7), clients)
    assert (np.diff(arrival_s) >= 0).all()
    counts = np.bincount(index)
    assert counts[0] == pytest.approx(2000, abs=SPREAD * math.sqrt(2000))
    assert counts[1] == pytest.approx(8000, abs=SPREAD * math.sqrt(8000))


def test_client_population_has_the_asked_rate_and_very_unequal_clients() -> None:
    rng = np.random.default_rng(8)
    clients = sample_clients(rng, Population(rate_sigma=0.0), 50.0, 600.0)
    rates = np.sort([client.curve.mean_rate_per_s for client in clients])[::-1]
    assert rates.sum() == pytest.approx(50.0)
    assert 0.5 < rates[:10].sum() / 50.0 < 0.9  # ServeGen m-large: 0.69
    with pytest.raises(SpecError, match="num_clients=0"):
        Population(num_clients=0)
