"""The fitted stand-ins against the traces they stand in for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl_autoscale.fleet.errors import UnknownNameError
from rl_autoscale.workload import Workload, read_trace
from rl_autoscale.workload.fitted import FITTED_NAMES, fitted_arrivals, fitted_workload, stand_in
from rl_autoscale.workload.stats import autocorrelation, fano_factor, gap_cv, window_counts

NUM_DRAWS = 80

STATISTICS = ("rate", "gap_cv", "fano_1s", "fano_10s", "fano_60s", "autocorrelation_1min", "peak_to_mean", "silent_10s")


def statistics(workload: Workload) -> np.ndarray:
    counts, counts_10s = window_counts(workload, 60.0), window_counts(workload, 10.0)
    fano = [fano_factor(workload, window_s) for window_s in (1.0, 10.0, 60.0)]
    values = [workload.mean_rate_per_s, gap_cv(workload.arrival_s), *fano, autocorrelation(counts)]
    return np.array([*values, counts.max() / counts.mean(), (counts_10s == 0).mean()], dtype=np.float64)


@pytest.mark.parametrize("name", FITTED_NAMES)
def test_the_trace_looks_like_one_of_its_generators_draws(name: str, real_traces: Path) -> None:
    real = statistics(read_trace(real_traces / f"{name}.parquet").workload)
    draws = np.array([statistics(fitted_workload(np.random.default_rng(seed), name)) for seed in range(NUM_DRAWS)])
    rank = (draws < real).mean(axis=0) + (draws == real).mean(axis=0) / 2
    for statistic, place in zip(STATISTICS, rank, strict=True):
        assert 0.05 < place < 0.95, f"{name}: the trace's {statistic} is at the {place:.0%} quantile of the draws"


@pytest.mark.parametrize("name", FITTED_NAMES)
def test_length_quantiles_are_the_traces(name: str, real_traces: Path) -> None:
    real = read_trace(real_traces / f"{name}.parquet").workload
    drawn = stand_in(name)
    for side in ("prompt_tokens", "output_tokens"):
        ours, theirs = (getattr(workload, side) for workload in (drawn, real))
        assert np.quantile(ours, [0.25, 0.5, 0.75, 0.9]) == pytest.approx(
            np.quantile(theirs, [0.25, 0.5, 0.75, 0.9]), rel=0.2, abs=2
        )
        assert ours.mean() == pytest.approx(theirs.mean(), rel=0.05)


@pytest.mark.parametrize("name", FITTED_NAMES)
def test_the_mean_rate_is_unbiased_and_can_be_chosen(name: str) -> None:
    rates = [fitted_arrivals(np.random.default_rng(seed), name, 2000.0, 8.0).size / 2000.0 for seed in range(150)]
    assert np.mean(rates) == pytest.approx(8.0, abs=4.5 * np.std(rates) / np.sqrt(150))


def test_the_stand_in_is_always_the_same_and_draws_differ() -> None:
    assert stand_in("azure2023_conv").arrival_s.tobytes() == stand_in("azure2023_conv").arrival_s.tobytes()
    draws = [fitted_arrivals(np.random.default_rng(seed), "azure2023_code") for seed in (0, 1)]
    assert draws[0].size != draws[1].size or (draws[0] != draws[1]).any()


@pytest.mark.parametrize(("name", "rate_per_s"), [("azure2023_conv", 5.53), ("azure2023_code", 2.57)])
def test_the_stand_in_is_a_typical_draw(name: str, rate_per_s: float) -> None:
    assert stand_in(name).mean_rate_per_s == pytest.approx(rate_per_s, rel=0.05)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'azure2023_conv'"):
        stand_in("azure2023_con")
