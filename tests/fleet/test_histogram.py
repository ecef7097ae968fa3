"""The quantile that simulator, live fleet and dashboards share."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.fleet.histogram import compiled_histogram_quantile, histogram_quantile
from rl_autoscale.sim.reference.telemetry import histogram_quantile as from_values

EDGES_S = np.array([0.1, 0.5, 1.0])


def test_linear_inside_its_bucket_as_prometheus_does():
    assert histogram_quantile(np.array([0, 4, 0, 0]), EDGES_S, 0.5) == 0.1 + 0.4 * 0.5
    assert histogram_quantile(np.array([4, 0, 0, 0]), EDGES_S, 0.25) == 0.025


def test_beyond_the_last_edge_is_the_last_edge_and_empty_is_nan():
    assert histogram_quantile(np.array([1, 0, 0, 99]), EDGES_S, 0.95) == 1.0
    assert math.isnan(histogram_quantile(np.zeros(4), EDGES_S, 0.95))


@given(st.lists(st.floats(0.001, 3.0), max_size=30), st.floats(0.01, 0.99))
def test_plain_compiled_and_reference_agree(values, share):
    counts = np.bincount(np.searchsorted(EDGES_S, values, side="left"), minlength=4).astype(np.int64)
    plain = histogram_quantile(counts, EDGES_S, share)
    np.testing.assert_equal(compiled_histogram_quantile(counts, EDGES_S, share), plain)
    np.testing.assert_allclose(plain, from_values(values, EDGES_S, share), rtol=1e-12)
