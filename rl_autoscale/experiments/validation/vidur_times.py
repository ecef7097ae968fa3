"""Vidur's predicted iteration times as a function, rebuilt from a table of its predictions.

The rules are Vidur's (microsoft/vidur 7d47513, vidur/execution_time_predictor/sklearn_execution_time_predictor.py): new
tokens are rounded up to 8 and contexts to 64; several prompt chunks count as one of sqrt(sum of squares) tokens after
the sum of their contexts; with grouped-query attention, more than one chunk costs 10 % on top (so does more than one
decode, which the table already holds). Between the table's sizes attention is linear; the rest follows the shape of
Vidur's own operator profile, which has far more token counts (Vidur's random forests were fitted to it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.sim.iteration_table import read_columns
from rl_autoscale.sim.layout import FloatArray

_TOKEN_STEP, _CONTEXT_STEP = 8, 64
_MANY_CHUNKS = 1.1


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Seconds over two increasing sizes; NaN where nothing was predicted."""

    rows: FloatArray
    columns: FloatArray
    seconds: FloatArray

    def at(self, row: float, column: float) -> float:
        """Bilinear between four known corners, the largest known corner where one is missing."""
        i, a = _cell(self.rows, row)
        j, b = _cell(self.columns, column)
        corners = self.seconds[i : i + 2, j : j + 2]
        if np.isnan(corners).any():
            return float(np.nanmax(corners))
        low = corners[0, 0] * (1 - b) + corners[0, 1] * b
        high = corners[1, 0] * (1 - b) + corners[1, 1] * b
        return float(low * (1 - a) + high * a)


@dataclass(frozen=True, slots=True, eq=False)
class VidurTimes:
    """Vidur's iteration times of one (model, device, tensor parallelism).

    Attributes:
        tokens: shape (num_sizes,), token counts (multiples of 8) of the part that is not attention.
        tokens_s: shape (num_sizes,), its seconds.
        prefill: attention seconds over (chunk tokens, earlier context).
        decode: over (sequences, mean context).
        grouped_query: whether key-value heads are shared by query heads.
    """

    tokens: FloatArray
    tokens_s: FloatArray
    prefill: Grid
    decode: Grid
    grouped_query: bool

    def __call__(self, chunks: Sequence[tuple[int, int]], num_decode: int, decode_context_tokens: float) -> float:
        """Seconds of one iteration; an `IterationTime`."""
        num_tokens = num_decode + sum(new for new, _ in chunks)
        seconds = float(np.interp(_round_up(num_tokens, _TOKEN_STEP), self.tokens, self.tokens_s))
        if num_decode:
            mean_context = _round_up(int(decode_context_tokens // num_decode), _CONTEXT_STEP)
            seconds += self.decode.at(num_decode, mean_context)
        if chunks:
            together = round(math.sqrt(sum(new * new for new, _ in chunks)))
            context = sum(_round_up(done, _CONTEXT_STEP) for _, done in chunks)
            factor = _MANY_CHUNKS if self.grouped_query and len(chunks) > 1 else 1.0
            seconds += factor * self.prefill.at(together, context)
        return seconds


def read_vidur_times(
    path: Path, operators: Path, *, model: str, device: str, tensor_parallel: int, grouped_query: bool = True
) -> VidurTimes:
    """Read the rows of one (model, device, tensor parallelism) from a table of Vidur's predictions.

    Args:
        path: the predictions.
        operators: Vidur's measured operators, one row per token count.
        model: Hugging Face id.
        device: Vidur's name of the GPU.
        tensor_parallel: GPUs per replica.
        grouped_query: whether key-value heads are shared by query heads.

    Raises:
        SpecError: a file is missing or holds no such rows.
    """
    rows = _rows_of(path, model, device, tensor_parallel)
    rest_s = (rows["iter_time_ms"] - rows["attn_prefill_ms"] - rows["attn_decode_ms"]) / 1e3
    rounded = -(-(rows["prefill_chunk_tokens"] + rows["decode_batch_size"]) // _TOKEN_STEP) * _TOKEN_STEP
    known, first = np.unique(rounded, return_index=True)
    tokens = np.arange(known[0], known[-1] + 1, _TOKEN_STEP, dtype=np.float64)
    shape = _operator_shape(_rows_of(operators, model.split("/")[-1], device, tensor_parallel), tokens)
    correction = np.interp(tokens, known, rest_s[first] / np.interp(known, tokens, shape))
    return VidurTimes(
        tokens=tokens,
        tokens_s=shape * correction,
        prefill=_grid(rows["prefill_chunk_tokens"], rows["prefill_kv_context"], rows["attn_prefill_ms"] / 1e3),
        decode=_grid(rows["decode_batch_size"], rows["mean_decode_context"], rows["attn_decode_ms"] / 1e3),
        grouped_query=grouped_query,
    )


def _rows_of(path: Path, model: str, device: str, tensor_parallel: int) -> dict[str, FloatArray]:
    columns = read_columns(path)
    keep = (columns["model"].astype(str) == model) & (columns["device"].astype(str) == device)
    keep &= columns["tp"].astype(np.int64) == tensor_parallel
    if not keep.any():
        raise SpecError(f"{path}: no rows of {model} on {device} with tp={tensor_parallel}; use a table that has them")
    numbers = (name for name in columns if name not in ("model", "device"))
    return {name: columns[name][keep].astype(np.float64) for name in numbers}


def _operator_shape(rows: dict[str, FloatArray], tokens: FloatArray) -> FloatArray:
    """Milliseconds of one layer's measured operators at these token counts; attention and embedding left out."""
    layer_ms = sum(column for name, column in rows.items() if name.endswith("_ms") and name != "emb_ms")
    order = np.argsort(rows["num_tokens"])
    return np.asarray(np.interp(tokens, rows["num_tokens"][order], np.asarray(layer_ms)[order]))


def _grid(rows: FloatArray, columns: FloatArray, seconds: FloatArray) -> Grid:
    """Collect a function of two sizes from a long table in which it repeats; rows of size 0 are left out."""
    present = rows > 0
    rows, columns, seconds = rows[present], columns[present], seconds[present]
    row_sizes, column_sizes = np.unique(rows), np.unique(columns)
    values = np.full((len(row_sizes), len(column_sizes)), np.nan)
    values[np.searchsorted(row_sizes, rows), np.searchsorted(column_sizes, columns)] = seconds
    return Grid(row_sizes.astype(np.float64), column_sizes.astype(np.float64), values)


def _cell(sizes: FloatArray, value: float) -> tuple[int, float]:
    """(index of the size below, share of the way to the next); values outside are moved to the edge."""
    value = min(max(value, float(sizes[0])), float(sizes[-1]))
    index = min(int(np.searchsorted(sizes, value, side="right")) - 1, len(sizes) - 2)
    return index, float((value - sizes[index]) / (sizes[index + 1] - sizes[index]))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
