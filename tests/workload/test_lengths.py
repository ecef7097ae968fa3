"""Length laws and the named models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.workload import lengths, read_trace
from rl_autoscale.workload.length_table import LENGTH_MODEL_NAMES, fit_distances, length_model

REAL_FILES = {
    "azure_conv": "azure2023_conv",
    "azure_code": "azure2023_code",
    "sharegpt": "lengths_sharegpt_8k",
    "arxiv_summarization": "lengths_arxiv_summarization",
    "bwb": "lengths_bwb",
    "mooncake_conversation": "mooncake_conversation",
}


def test_constant_and_uniform() -> None:
    rng = np.random.default_rng(0)
    assert (lengths.constant(7).at(rng.random(100)) == 7).all()
    drawn = lengths.uniform(3, 6).at(rng.random(40_000))
    counts = np.bincount(drawn, minlength=8)
    assert counts[[3, 4, 5, 6]] == pytest.approx(10_000, abs=450)
    assert counts.sum() == counts[3:7].sum()


def test_lognormal_has_its_median_spread_and_limit() -> None:
    drawn = lengths.lognormal(500.0, 0.8, max_tokens=4000).at(np.random.default_rng(1).random(100_000))
    assert np.median(drawn) == pytest.approx(500, rel=0.02)
    assert np.quantile(drawn, 0.8413) == pytest.approx(500 * np.exp(0.8), rel=0.02)
    assert drawn.max() == 4000


def test_mixture_table_is_the_mixture() -> None:
    # against drawing the component first, the textbook way; two-sample Kolmogorov-Smirnov, p about 0.001
    weights, mus, sigmas = (0.3, 0.7), (3.0, 6.0), (0.05, 1.2)
    rng, size = np.random.default_rng(2), 50_000
    tabulated = lengths.lognormal_mixture(weights, mus, sigmas).at(rng.random(size))
    component = rng.choice(2, size, p=weights)
    direct = np.exp(np.array(mus)[component] + np.array(sigmas)[component] * rng.standard_normal(size))
    direct = np.maximum(np.rint(direct), 1)
    grid = np.unique(np.concatenate((tabulated, direct)))
    gap = np.searchsorted(np.sort(tabulated), grid, "right") - np.searchsorted(np.sort(direct), grid, "right")
    assert np.abs(gap).max() / size < 1.95 * np.sqrt(2 / size)


@given(
    probability=st.lists(st.floats(0.01, 0.99), max_size=5, unique=True),
    tokens=st.lists(st.integers(0, 100_000), min_size=7, max_size=7),
    seed=st.integers(0, 1000),
)
def test_quantile_laws_stay_within_their_ends(probability: list[float], tokens: list[int], seed: int) -> None:
    steps = [0.0, *sorted(probability), 1.0]
    law = lengths.quantiles(steps, sorted(tokens)[: len(steps)])
    drawn = law.at(np.random.default_rng(seed).random(200))
    assert drawn.dtype == np.int32
    assert drawn.min() >= max(1, int(law.tokens[0]))
    assert drawn.max() <= max(1, int(law.tokens[-1]))


def test_empirical_law_gives_the_sample_back() -> None:
    sample = np.random.default_rng(3).integers(1, 5000, 20_000).astype(np.int32)
    drawn = lengths.empirical(sample).at(np.random.default_rng(4).random(20_000))
    assert np.quantile(drawn, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(sample, [0.1, 0.5, 0.9]), rel=0.05)


def test_copula_correlates_without_changing_the_marginals() -> None:
    law = lengths.lognormal(300.0, 0.7)
    prompt, output = lengths.sample_lengths(np.random.default_rng(5), lengths.LengthModel(law, law, 0.6), 50_000)
    assert np.corrcoef(np.log(prompt), np.log(output))[0, 1] == pytest.approx(0.6, abs=0.02)
    assert np.median(output) == pytest.approx(300, rel=0.03)


@pytest.mark.parametrize("name", LENGTH_MODEL_NAMES)
def test_named_models_draw_positive_lengths(name: str) -> None:
    model = length_model(name)
    prompt, output = lengths.sample_lengths(np.random.default_rng(6), model, 2000)
    assert prompt.min() >= 1
    assert output.min() >= 1
    assert prompt.mean() == pytest.approx(model.prompt.mean_tokens, rel=0.25)


@pytest.mark.parametrize("name", REAL_FILES)
def test_named_models_are_as_far_from_their_data_as_the_table_says(name: str, real_traces: Path) -> None:
    path = real_traces / f"{REAL_FILES[name]}.parquet"
    if name in ("sharegpt", "arxiv_summarization", "bwb"):  # lengths only: no arrivals to make a workload of
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        sides = [table[f"{side}_tokens"].to_numpy() for side in ("prompt", "output")]
    else:
        workload = read_trace(path).workload
        sides = [workload.prompt_tokens, workload.output_tokens]
    drawn = lengths.sample_lengths(np.random.default_rng(7), length_model(name), 100_000)
    for real, model, stated in zip(sides, drawn, fit_distances(name), strict=True):
        grid = np.unique(real)
        real_share = np.searchsorted(np.sort(real), grid, "right") / real.size
        model_share = np.searchsorted(np.sort(model), grid, "right") / model.size
        # rounding to whole tokens moves mass at short lengths; 0.02 covers that and the sampling error
        assert np.abs(real_share - model_share).max() < stated + 0.02


def test_bad_laws_are_refused() -> None:
    with pytest.raises(SpecError, match="low=5 exceeds high=4"):
        lengths.uniform(5, 4)
    with pytest.raises(SpecError, match="tokens=0"):
        lengths.constant(0)
    with pytest.raises(SpecError, match="rise strictly from 0 to 1"):
        lengths.quantiles([0.0, 0.5], [1.0, 2.0])
    with pytest.raises(SpecError, match="must not decrease"):
        lengths.quantiles([0.0, 1.0], [5.0, 2.0])
    with pytest.raises(SpecError, match="weights must be > 0"):
        lengths.lognormal_mixture([1.0, 0.0], [1.0, 2.0], [0.1, 0.1])
    with pytest.raises(SpecError, match="correlation=1"):
        lengths.LengthModel(lengths.constant(1), lengths.constant(1), 1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'azure_conv'"):
        length_model("azure_cnv")
