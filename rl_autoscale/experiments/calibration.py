"""Measured iterations of a live server made into a profile, and the profile held against load that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rl_autoscale.experiments.validation.compare import MetricError, compare, request_times, times_of_records
from rl_autoscale.experiments.validation.replay import one_replica, recorded_workload, run_compiled
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.pool import StartupPhase
from rl_autoscale.fleet.profile import LatencyProfile
from rl_autoscale.sim.fit import Hardware, candidate_knots, fit_profile, predict_s, split_rows
from rl_autoscale.sim.iteration_table import REGIONS, IterationTable, table_from_columns
from rl_autoscale.workload.trace import FloatArray, Int64Array

REGIMES = {"light": 0.15, "medium": 0.4, "heavy": 0.7}
"""Load of the hold-out: the share of the engine's time that its requests need, by the fitted profile."""

MIN_REQUESTS, MAX_REQUESTS = 12, 60
_OUTLIER_SPREADS = 5.0
"""In medians of the absolute residual: beyond it lie 0.1 % of normal errors."""

_NO_OUTLIER = 0.1
"""A residual that a second prompt in the iteration does not explain, as a fraction."""

PROMPT_TOKENS, OUTPUT_TOKENS = (32, 1024), (16, 96)


def prompts_to_measure(max_tokens: int) -> tuple[int, ...]:
    """Prompt lengths at which the fit may put a knot: between two of them it knows no better than a straight line."""
    return tuple(int(knot) for knot in candidate_knots(max_tokens) if knot >= 1)


def fit_rows(rows: Sequence[Mapping[str, float]], hardware: Hardware) -> LatencyProfile:
    """Fit a profile to measured rows; ``fit_error`` holds the residuals at these rows.

    Args:
        rows: the columns of `sim.iteration_table.REQUIRED_COLUMNS`.
        hardware: the rest of the profile.

    Raises:
        SpecError: too few rows, or rows that determine no profile.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    table = table_from_columns(columns, where="calibration")
    return fit_profile(table, table, hardware)


def fit_watched(
    rows: Sequence[Mapping[str, float]], hardware: Hardware, rng: np.random.Generator
) -> tuple[LatencyProfile, int]:
    """Fit a profile to moments of a server in use.

    Some moments are not what they look like (two prompts shared an iteration), so those far outside the spread of
    their kind are left out of the fit. ``fit_error`` is that of a quarter of all moments, such ones included, under a
    fit of the rest; the profile itself is fitted to all.

    Args:
        rows: as of `fit_rows`.
        hardware: the rest of the profile.
        rng: chooses the quarter.

    Returns:
        The profile, and how many moments were left out.

    Raises:
        SpecError: the traffic showed too little of what a profile needs.
    """
    if not rows:
        raise SpecError("no moment showed a single iteration")
    table = table_from_columns({name: [row[name] for row in rows] for name in rows[0]}, where="watched")
    train, test = split_rows(table, rng)
    errors = fit_profile(_without_outliers(train, hardware), test, hardware).fit_error
    kept = _without_outliers(table, hardware)
    profile = fit_profile(kept, table, hardware).model_copy(update={"fit_error": errors})
    return profile, len(table) - len(kept)


def _without_outliers(table: IterationTable, hardware: Hardware) -> IterationTable:
    residual = np.abs(predict_s(fit_profile(table, table, hardware), table) / table.iteration_s - 1.0)
    kept = np.ones(len(table), dtype=np.bool_)
    for kind in REGIONS:
        of_kind = table.region(kind)
        if of_kind.any():
            limit = max(_OUTLIER_SPREADS * float(np.median(residual[of_kind])), _NO_OUTLIER)
            kept[of_kind] = residual[of_kind] <= limit
    return table[kept]


@dataclass(frozen=True, slots=True, eq=False)
class HoldOutLoad:
    """Poisson arrivals of random lengths; arrays of shape (num_requests,)."""

    arrival_s: FloatArray
    prompt_tokens: Int64Array
    output_tokens: Int64Array


def draw_load(
    profile: LatencyProfile, share: float, max_model_len: int, rng: np.random.Generator, *, span_s: float
) -> HoldOutLoad:
    """A short random load that asks for a share of one replica.

    Args:
        profile: says what the engine can do.
        share: of the engine's time, 0 to 1.
        max_model_len: prompt and output together fit it.
        rng: of arrivals and lengths.
        span_s: how long it should last; the number of requests has bounds of its own.

    Raises:
        SpecError: the context window is too short for any of it.
    """
    longest = min(PROMPT_TOKENS[1], max_model_len - OUTPUT_TOKENS[1], profile.kv_blocks * 16 // 4)
    if longest < PROMPT_TOKENS[0]:
        raise SpecError(f"a context window of {max_model_len} tokens is too short for the hold-out; use --hold-out 0")
    prompt, output = (PROMPT_TOKENS[0] + longest) / 2.0, sum(OUTPUT_TOKENS) / 2.0
    request_s = prompt * profile.prefill_s_per_token() + output * profile.full_batch_decode_s(prompt, output)
    # a batch cannot be decoded faster than its weights are read, however small it is
    slowest_s = output * profile.decode_s_per_token(profile.max_num_seqs, prompt + output / 2.0)
    rate_per_s = share / max(request_s, slowest_s)
    size = int(np.clip(rate_per_s * span_s, MIN_REQUESTS, MAX_REQUESTS))
    return HoldOutLoad(
        np.cumsum(rng.exponential(1.0 / rate_per_s, size)),
        rng.integers(PROMPT_TOKENS[0], longest, size, endpoint=True),
        rng.integers(*OUTPUT_TOKENS, size, endpoint=True),
    )


def hold_out_errors(
    profile: LatencyProfile, load: HoldOutLoad, first_token_s: FloatArray, end_s: FloatArray
) -> tuple[MetricError, ...]:
    """Predicted against measured times of the same requests at the same arrivals.

    Args:
        profile: fitted.
        load: as it was sent, by arrival.
        first_token_s: measured, shape (num_requests,).
        end_s: measured, shape (num_requests,).
    """
    order = np.argsort(load.arrival_s, kind="stable")
    arrival_s, prompts, outputs = load.arrival_s[order], load.prompt_tokens[order], load.output_tokens[order]
    measured = request_times(arrival_s, first_token_s[order], end_s[order], outputs.astype(np.float64))
    spec = one_replica(
        profile,
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=profile.max_num_batched_tokens,
        kv_blocks=profile.kv_blocks,
    )
    records = run_compiled(spec, recorded_workload(arrival_s, prompts, outputs))
    return compare(times_of_records(records), measured)


def startup_phase(times_s: Sequence[float]) -> StartupPhase:
    """A pool's start-up distribution from observed start times.

    Raises:
        SpecError: none, or one that is not positive.
    """
    if not times_s or min(times_s) <= 0:
        raise SpecError(f"start times must be positive seconds; got {', '.join(map(str, times_s)) or 'none'}")
    mean_s = float(np.mean(times_s))
    cv = float(np.std(times_s, ddof=1)) / mean_s if len(times_s) > 1 else StartupPhase(mean_s=mean_s).cv
    return StartupPhase(name="start", mean_s=round(mean_s, 2), cv=round(cv, 3))
