"""Predicted against measured request times: one definition of every error."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rl_autoscale.sim.layout import FloatArray, RecordArray

METRICS = ("ttft_s", "tpot_s", "e2e_s")
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True, eq=False)
class RequestTimes:
    """What each request experienced; arrays of shape (num_requests,).

    Attributes:
        ttft_s: arrival to first token.
        tpot_s: (last token - first token) / (output tokens - 1); NaN for a single token.
        e2e_s: arrival to last token.
    """

    ttft_s: FloatArray
    tpot_s: FloatArray
    e2e_s: FloatArray


def request_times(
    arrival_s: FloatArray, first_token_s: FloatArray, end_s: FloatArray, output_tokens: FloatArray
) -> RequestTimes:
    """Times of requests from their stamps on one clock; shapes (num_requests,)."""
    gaps = np.where(output_tokens > 1, output_tokens - 1.0, np.nan)
    return RequestTimes(first_token_s - arrival_s, (end_s - first_token_s) / gaps, end_s - arrival_s)


def times_of_records(records: RecordArray) -> RequestTimes:
    """Times of simulated requests, from REQUEST records that have finished."""
    return request_times(
        records["arrival_s"], records["first_token_s"], records["end_s"], records["output_tokens"].astype(np.float64)
    )


@dataclass(frozen=True, slots=True)
class MetricError:
    """Errors of one metric, all as fractions; positive means that the prediction is too long.

    Attributes:
        metric: one of `METRICS`.
        num_requests: compared.
        mean: of the mean.
        quantiles: of each of `QUANTILES`, keyed ``p50`` and so on.
        request_mean: mean over requests of the absolute error.
        request_median: its median.
        request_p99: its 99th percentile.
    """

    metric: str
    num_requests: int
    mean: float
    quantiles: dict[str, float]
    request_mean: float
    request_median: float
    request_p99: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def metric_error(metric: str, predicted: FloatArray, measured: FloatArray) -> MetricError:
    """Compare one metric over the requests for which both sides are defined.

    Args:
        metric: its name.
        predicted: shape (num_requests,), seconds.
        measured: the same shape, seconds, > 0 where defined.
    """
    defined = np.isfinite(predicted) & np.isfinite(measured)
    predicted, measured = predicted[defined], measured[defined]
    per_request = np.abs(predicted / measured - 1.0)
    quantiles = {
        f"p{share * 100:.0f}": float(np.quantile(predicted, share) / np.quantile(measured, share) - 1.0)
        for share in QUANTILES
    }
    return MetricError(
        metric=metric,
        num_requests=len(measured),
        mean=float(predicted.mean() / measured.mean() - 1.0),
        quantiles=quantiles,
        request_mean=float(per_request.mean()),
        request_median=float(np.median(per_request)),
        request_p99=float(np.quantile(per_request, 0.99)),
    )


def compare(predicted: RequestTimes, measured: RequestTimes) -> tuple[MetricError, ...]:
    """One `MetricError` per metric, in the order of `METRICS`."""
    return tuple(metric_error(name, getattr(predicted, name), getattr(measured, name)) for name in METRICS)
