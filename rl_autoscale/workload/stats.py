"""What a workload looks like in numbers: the statistics of docs/workloads.md."""

from __future__ import annotations

from typing import Any

import numpy as np

from rl_autoscale.workload.trace import FloatArray, Int32Array, Int64Array, Workload

MINUTE_S = 60.0
FANO_WINDOWS_S = (1.0, 10.0, 60.0)


def describe(workload: Workload) -> dict[str, Any]:
    """Summarise a workload.

    Returns:
        Plain numbers, ready for JSON: ``num_requests``, ``span_s``, ``mean_rate_per_s``, ``peak_to_mean_1min``,
            ``gap_cv``,
        ``fano_1s``, ``fano_10s``, ``fano_60s``, ``autocorrelation_1min``, ``prompt_tokens`` and ``output_tokens`` (each
        with mean, p50, p90, p99, max), ``classes`` (per name: count, share and the same lengths), ``num_sessions``. A
        number that is not defined (too few requests or windows) is None.
    """
    counts_1min = window_counts(workload, MINUTE_S)
    mean_1min = counts_1min.mean() if counts_1min.size else 0.0
    stats: dict[str, Any] = {
        "num_requests": workload.num_requests,
        "span_s": workload.span_s,
        "mean_rate_per_s": workload.mean_rate_per_s,
        "peak_to_mean_1min": float(counts_1min.max() / mean_1min) if mean_1min > 0 else None,
        "gap_cv": gap_cv(workload.arrival_s),
        **{f"fano_{window_s:.0f}s": fano_factor(workload, window_s) for window_s in FANO_WINDOWS_S},
        "autocorrelation_1min": autocorrelation(counts_1min),
        "prompt_tokens": length_stats(workload.prompt_tokens),
        "output_tokens": length_stats(workload.output_tokens),
        "num_sessions": None
        if workload.session is None
        else int(np.unique(workload.session[workload.session >= 0]).size),
        "classes": {},
    }
    for index, name in enumerate(workload.class_names):
        chosen = workload.class_index == index
        stats["classes"][name] = {
            "num_requests": int(chosen.sum()),
            "share": float(chosen.mean()) if chosen.size else None,
            "prompt_tokens": length_stats(workload.prompt_tokens[chosen]),
            "output_tokens": length_stats(workload.output_tokens[chosen]),
        }
    return stats


def window_counts(workload: Workload, window_s: float) -> Int64Array:
    """Arrivals in each whole window; shape (floor(span_s / window_s),), int64. A cut-off last window is left out."""
    num_windows = int(workload.span_s // window_s)
    index = (workload.arrival_s // window_s).astype(np.int64)
    return np.bincount(index[index < num_windows], minlength=num_windows).astype(np.int64)


def fano_factor(workload: Workload, window_s: float) -> float | None:
    """Variance over mean of the counts in windows, 1 for Poisson; None with fewer than two whole windows."""
    counts = window_counts(workload, window_s)
    return float(counts.var() / counts.mean()) if counts.size >= 2 and counts.any() else None


def gap_cv(arrival_s: FloatArray) -> float | None:
    """Coefficient of variation of inter-arrival gaps; None with fewer than two gaps, or when all are zero."""
    gaps = np.diff(arrival_s)
    return float(gaps.std() / gaps.mean()) if gaps.size >= 2 and gaps.any() else None


def autocorrelation(counts: Int64Array, lag: int = 1) -> float | None:
    """Correlation of a series with itself `lag` steps later; None where it is too short or constant."""
    first, second = counts[:-lag], counts[lag:]
    if first.size < 2 or not (np.ptp(first) and np.ptp(second)):
        return None
    return float(np.corrcoef(first, second)[0, 1])


def length_stats(tokens: Int32Array) -> dict[str, float] | None:
    """Mean, p50, p90, p99 and maximum; None without requests."""
    if tokens.size == 0:
        return None
    p50, p90, p99 = np.quantile(tokens, (0.5, 0.9, 0.99))
    return {
        "mean": float(tokens.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": int(tokens.max()),
    }
