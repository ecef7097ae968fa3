"""Quantiles of a bucketed histogram, as Prometheus' ``histogram_quantile`` gives them.

One function for the compiled simulator and the live fleet: what training calls ``ttft_p95_s`` is what a dashboard
shows. The simulator compiles it (`compiled_histogram_quantile`); a live controller calls it as it stands, since a
histogram of twenty buckets is no work and compiling would delay its first decision.
"""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import shared_njit
from rl_autoscale.fleet.spec import IntArray
from rl_autoscale.fleet.state import FloatArray


def histogram_quantile(histogram: IntArray | FloatArray, edges: FloatArray, share: float) -> float:
    """Linear inside the bucket, from 0 in the first; the last edge for what lies beyond it.

    Args:
        histogram: shape (len(edges) + 1,): values in each bucket, not cumulative; the last entry is beyond all edges.
        edges: upper bounds of the buckets, increasing, > 0.
        share: of the values at or below the answer, 0 to 1.

    Returns:
        NaN for an empty histogram.
    """
    total = histogram.sum()
    if total == 0:
        return math.nan
    rank = share * total
    below = 0
    for column in range(edges.shape[0]):
        if below + histogram[column] >= rank:
            low = edges[column - 1] if column > 0 else 0.0
            return float(low + (edges[column] - low) * (rank - below) / histogram[column])
        below += histogram[column]
    return float(edges[-1])


compiled_histogram_quantile = shared_njit(histogram_quantile)
