"""Stochastic models fitted to two public traces: for where a trace cannot be had, and for training on more of its like.

They are models, not copies: no minute of a trace is stored, only the parameters below, so every draw is another hour
of the same kind. docs/workloads.md compares draws with the traces statistic by statistic, and a test repeats the
comparison.

`azure2023_conv`: a log-AR(1) rate with nearly Poisson gaps. Its parameters were chosen so that the *median over draws
of the sample statistics of 3,502 s* meets the trace's Fano factors and the lag-1 autocorrelation of its 1-minute
counts; an hour is short against the correlation time, so equating population values instead would bias both.

`azure2023_code`: silence and bursts. Bursts are stretches without a gap above 3 s: 72 of them, Gamma durations,
lognormal rates, gaps of cv 1.9 inside, and lognormal silences between. The spread of the rates was raised from 0.47
to meet the Fano factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rl_autoscale.fleet.errors import UnknownNameError
from rl_autoscale.workload.arrivals import GapLaw, RateCurve, sample_arrivals
from rl_autoscale.workload.curves import log_ar1
from rl_autoscale.workload.length_table import length_model
from rl_autoscale.workload.lengths import sample_lengths
from rl_autoscale.workload.trace import FloatArray, Workload

# azure2023_conv
_CONV_SIGMA = 0.29
_CONV_CORRELATION_S = 650.0
_CONV_CV = 1.04

# azure2023_code
_CODE_ON_MEAN_S = 12.8
_CODE_ON_SHAPE = 1.3
_CODE_OFF_MU = 2.88
_CODE_OFF_SIGMA = 1.19
_CODE_RATE_SIGMA = 0.5
_CODE_CV = 1.9


@dataclass(frozen=True, slots=True)
class _Fitted:
    curve: Callable[[np.random.Generator, float, float], RateCurve]
    cv: float
    rate_per_s: float
    span_s: float
    lengths: str
    stand_in_seed: int


def _conv_curve(rng: np.random.Generator, rate_per_s: float, span_s: float) -> RateCurve:
    return log_ar1(rng, rate_per_s, _CONV_SIGMA, _CONV_CORRELATION_S, span_s)


def _code_curve(rng: np.random.Generator, rate_per_s: float, span_s: float) -> RateCurve:
    """Alternate silences and bursts, starting well before time 0 so that the window begins at an arbitrary moment."""
    off_mean_s = float(np.exp(_CODE_OFF_MU + _CODE_OFF_SIGMA**2 / 2))
    cycle_s = _CODE_ON_MEAN_S + off_mean_s
    lead_s = 20 * cycle_s
    num_cycles = int((span_s + lead_s) / cycle_s * 1.5) + 50
    off_s = rng.lognormal(_CODE_OFF_MU, _CODE_OFF_SIGMA, num_cycles)
    on_s = rng.gamma(_CODE_ON_SHAPE, _CODE_ON_MEAN_S / _CODE_ON_SHAPE, num_cycles)
    burst_rate = rate_per_s * cycle_s / _CODE_ON_MEAN_S
    on_rate = burst_rate * np.exp(_CODE_RATE_SIGMA * rng.standard_normal(num_cycles) - _CODE_RATE_SIGMA**2 / 2)
    ends = np.cumsum(np.column_stack((off_s, on_s)).ravel()) - lead_s
    rates = np.column_stack((np.zeros(num_cycles), on_rate)).ravel()
    inside = (ends > 0) & (ends < span_s)
    first = int(np.searchsorted(ends, 0.0, side="right"))
    edges = np.concatenate(([0.0], ends[inside], [span_s]))
    return RateCurve(edges, rates[first : first + edges.size - 1])


_FITTED: dict[str, _Fitted] = {
    "azure2023_conv": _Fitted(_conv_curve, _CONV_CV, 19366 / 3501.721937, 3501.721937, "azure_conv", stand_in_seed=52),
    "azure2023_code": _Fitted(_code_curve, _CODE_CV, 8819 / 3435.948056, 3435.948056, "azure_code", stand_in_seed=72),
}

FITTED_NAMES: tuple[str, ...] = tuple(_FITTED)
"""Traces with a fitted generator."""


def fitted_arrivals(
    rng: np.random.Generator, name: str, span_s: float | None = None, rate_per_s: float | None = None
) -> FloatArray:
    """Draw arrival times like those of a trace.

    Args:
        rng: source of randomness.
        name: one of `FITTED_NAMES`.
        span_s: length; the trace's own by default.
        rate_per_s: mean over draws; the trace's own by default. Its relative movement stays the same.
    """
    model = _model(name)
    span_s = model.span_s if span_s is None else span_s
    curve = model.curve(rng, model.rate_per_s if rate_per_s is None else rate_per_s, span_s)
    return sample_arrivals(rng, curve, GapLaw(model.cv))


def fitted_workload(rng: np.random.Generator, name: str, span_s: float | None = None) -> Workload:
    """Draw a whole workload like a trace: arrivals, prompt and output lengths, one class `default`."""
    model = _model(name)
    arrival_s = fitted_arrivals(rng, name, span_s)
    prompt, output = sample_lengths(rng, length_model(model.lengths), arrival_s.size)
    return Workload(
        arrival_s=arrival_s,
        prompt_tokens=prompt,
        output_tokens=output,
        class_index=np.zeros(arrival_s.size, dtype=np.int16),
        class_names=("default",),
        span_s=model.span_s if span_s is None else span_s,
    )


def stand_in(name: str) -> Workload:
    """The one fixed draw that stands in for a trace that cannot be had, the same everywhere, as a file would be.

    Of the seeds 0..199 it is the one whose statistics (rate, gap CV, Fano factors, autocorrelation, peak) lie nearest
    to the trace's, each in units of its spread over the draws.
    """
    return fitted_workload(np.random.default_rng(_model(name).stand_in_seed), name)


def fitted_lengths(name: str) -> str:
    """Name of the length model that belongs to a fitted trace."""
    return _model(name).lengths


def _model(name: str) -> _Fitted:
    if name not in _FITTED:
        raise UnknownNameError("fitted generator", name, _FITTED)
    return _FITTED[name]
