"""Fit a latency profile to a table of iterations: arrays in, ``LatencyProfile`` out.

The model of ``fleet/profile.py`` is linear in its parameters, so the fit is one non-negative least-squares problem on
*relative* errors (each row divided by its time), with the three kinds of iteration weighted alike however many rows
each has. The token curve is made non-decreasing by fitting its increments between knots; the knots themselves are
chosen greedily where the curve bends most. docs/profiles.md holds the error of every shipped profile by kind of
iteration.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import ATTENTION_COEFFICIENTS, LatencyProfile
from rl_autoscale.sim.iteration_table import REGIONS, FloatArray, IterationTable

IntArray = npt.NDArray[np.int64]

MAX_KNOTS = 24
"""Knots of the token curve; more do not lower the error of any shipped profile by 0.1 points."""

KNOT_TOLERANCE = 0.004
"""Stop adding knots when the curve is followed this closely, as a fraction."""

SIGNIFICANT_DIGITS = 6
"""Digits kept in a profile: far below the fit error, and diffs stay readable."""


_NOT_JOINT = np.array([not name.startswith("mixed_") for name in ATTENTION_COEFFICIENTS])


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a profile says besides its times.

    Attributes:
        name: profile name, for example ``llama-3.1-8b_h100_tp1``.
        model: as the model's publisher names it.
        gpu: short GPU name, for example ``H100``.
        gpus_per_replica: tensor-parallel size.
        kv_blocks: KV blocks of 16 tokens in one replica.
        max_num_seqs: vLLM's default for the device.
        max_num_batched_tokens: vLLM's default for the device.
        source: where the times come from: tool, version, licence.
        notes: how the KV blocks were derived and what else a reader must know.
        kv_bytes_per_token: keys and values of one token over all GPUs of a replica, where it is known.
    """

    name: str
    model: str
    gpu: str
    gpus_per_replica: int
    kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    source: str
    notes: str = ""
    kv_bytes_per_token: float | None = None


def fit_profile(
    train: IterationTable, test: IterationTable, hardware: Hardware, *, joint_attention: bool = True
) -> LatencyProfile:
    """Fit a profile to `train` and record its error on `test`.

    Args:
        train: iterations of at least two kinds of `REGIONS`, at least 8 rows, at least two different token counts.
        test: iterations that the fit does not see.
        hardware: the rest of the profile.
        joint_attention: whether decode sequences may cost more beside a prompt chunk. A source that adds up kernels
            measured apart cannot know.

    Raises:
        SpecError: the table cannot determine the parameters.
    """
    _check_trainable(train)
    candidates = measured_knots(candidate_knots(int(train.new_tokens.max())), train.new_tokens)
    knots = choose_knots(candidates, _solve(train, candidates, joint_attention)[0])
    knot_s, attention_s = _solve(train, knots, joint_attention)
    profile = _assemble(hardware, knots, knot_s, attention_s, {})
    return _assemble(hardware, knots, knot_s, attention_s, fit_error(profile, test))


def _assemble(
    hardware: Hardware, knots: IntArray, knot_s: FloatArray, attention_s: FloatArray, error: dict[str, float]
) -> LatencyProfile:
    return LatencyProfile(
        name=hardware.name,
        model=hardware.model,
        gpu=hardware.gpu,
        gpus_per_replica=hardware.gpus_per_replica,
        kv_blocks=hardware.kv_blocks,
        kv_bytes_per_token=hardware.kv_bytes_per_token,
        max_num_seqs=hardware.max_num_seqs,
        max_num_batched_tokens=hardware.max_num_batched_tokens,
        token_knots=tuple(int(knot) for knot in knots),
        token_knot_s=tuple(_round(value) for value in knot_s),
        **dict(zip(ATTENTION_COEFFICIENTS, map(_round, attention_s), strict=True)),
        source=hardware.source,
        fit_error=error,
        notes=hardware.notes,
    )


def _check_trainable(table: IterationTable) -> None:
    kinds = [name for name in REGIONS if table.region(name).any()]
    num_token_counts = len(np.unique(table.new_tokens))
    if len(table) < 8 or num_token_counts < 2:
        raise SpecError(
            f"a fit needs at least 8 rows and 2 different token counts; got {len(table)} rows "
            f"and {num_token_counts} token counts; measure more"
        )
    if "decode" not in kinds or len(kinds) < 2:
        raise SpecError(
            f"a fit needs decode iterations and prefill or mixed ones; got only {', '.join(kinds)}; "
            "measure the missing kind"
        )


def predict_s(profile: LatencyProfile, table: IterationTable) -> FloatArray:
    """Predicted seconds of every row; shape (num_rows,)."""
    return np.asarray(
        profile.token_time_s(table.new_tokens)
        + profile.host_s
        + table.attention_features @ profile.attention_coefficients_s
    )


def fit_error(profile: LatencyProfile, table: IterationTable) -> dict[str, float]:
    """Mean and 99th percentile of the absolute relative error, as fractions, for each kind of iteration that occurs."""
    error = np.abs(predict_s(profile, table) / table.iteration_s - 1.0)
    errors: dict[str, float] = {}
    for name in REGIONS:
        rows = table.region(name)
        if rows.any():
            errors[f"{name}_mean"] = round(float(error[rows].mean()), 4)
            errors[f"{name}_p99"] = round(float(np.quantile(error[rows], 0.99)), 4)
    return errors


def split_rows(
    table: IterationTable, rng: np.random.Generator, *, test_fraction: float = 0.25
) -> tuple[IterationTable, IterationTable]:
    """Split a table into (train, test) at random, each kind of iteration in the same proportion."""
    is_test = np.zeros(len(table), dtype=np.bool_)
    for name in REGIONS:
        rows = rng.permutation(np.flatnonzero(table.region(name)))
        is_test[rows[: int(len(rows) * test_fraction)]] = True
    return table[~is_test], table[is_test]


def candidate_knots(max_tokens: int) -> IntArray:
    """Token counts where a knot may go: four to the octave, and one past powers of two, where GEMM tilings change."""
    octaves = 2.0 ** np.arange(0, np.log2(max_tokens) + 1)
    quarters = (octaves[:, None] * np.array([1.0, 1.25, 1.5, 1.75])).round().astype(np.int64)
    tile_edges = octaves[octaves >= 128].astype(np.int64) + 1
    candidates = np.unique(np.concatenate([quarters.ravel(), tile_edges, [max_tokens]]))
    return candidates[candidates <= max_tokens]


def measured_knots(candidates: IntArray, tokens: FloatArray) -> IntArray:
    """Move every candidate down to the largest measured token count since the one before; drop those without any.

    A knot between measurements would have a value of the solver's choice: where nobody measured, a straight line is
    the honest curve.

    Args:
        candidates: shape (num_candidates,), increasing; the last is the largest of ``tokens``.
        tokens: shape (num_rows,), measured token counts.

    Returns:
        Token counts, increasing, at least two; the first is the first candidate.
    """
    knots = [int(candidates[0])]
    for low, high in itertools.pairwise(candidates):
        inside = tokens[(tokens > low) & (tokens <= high)]
        if len(inside):
            knots.append(int(inside.max()))
    return np.asarray(knots, dtype=np.int64)


def choose_knots(candidates: IntArray, curve_s: FloatArray) -> IntArray:
    """Thin a dense curve: start from its ends and add the point that linear interpolation misses most.

    Args:
        candidates: shape (num_candidates,), token counts, increasing.
        curve_s: shape (num_candidates,), seconds at each, > 0.

    Returns:
        The chosen token counts, increasing, at most `MAX_KNOTS`.
    """
    chosen = [0, len(candidates) - 1]
    while len(chosen) < min(MAX_KNOTS, len(candidates)):
        line = np.interp(candidates, candidates[chosen], curve_s[chosen])
        miss = np.abs(line / curve_s - 1.0)
        worst = int(np.argmax(miss))
        if miss[worst] < KNOT_TOLERANCE:
            break
        chosen = sorted({*chosen, worst})
    return candidates[chosen]


def _solve(table: IterationTable, knots: IntArray, joint_attention: bool) -> tuple[FloatArray, FloatArray]:
    """Non-negative least squares on relative errors; returns (seconds at each knot, attention coefficients)."""
    attention = table.attention_features * (_NOT_JOINT | joint_attention)
    features = np.concatenate([_increment_features(table.new_tokens, knots), attention], axis=1)
    weights = _row_weights(table)
    relative = features / table.iteration_s[:, None] * weights[:, None]
    scale = np.maximum(np.linalg.norm(relative, axis=0), 1e-300)
    solution, _ = nnls(relative / scale, weights, maxiter=100 * features.shape[1])
    parameters = solution / scale
    if parameters[0] <= 0:
        raise SpecError(
            f"the fit gives an iteration of {knots[0]} token(s) no time at all, which no GPU does; "
            "measure iterations of few tokens and little context too"
        )
    return np.cumsum(parameters[: len(knots)]), parameters[len(knots) :]


def _increment_features(tokens: FloatArray, knots: IntArray) -> FloatArray:
    """Shape (num_rows, num_knots): the share of each knot's increment that a token count has collected.

    Column 0 is the constant; column j rises from 0 at knot j - 1 to 1 at knot j. Non-negative weights make the curve
    non-decreasing.
    """
    rise = np.clip((tokens[:, None] - knots[:-1]) / np.diff(knots), 0.0, 1.0)
    return np.concatenate([np.ones((len(tokens), 1)), rise], axis=1)


def _row_weights(table: IterationTable) -> FloatArray:
    """Square-root weights that give each kind of iteration its say, however many rows it has; shape (num_rows,)."""
    weights = np.zeros(len(table))
    for name in REGIONS:
        rows = table.region(name)
        if rows.any():
            weights[rows] = np.sqrt(1.0 / rows.sum())
    return weights


def _round(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
