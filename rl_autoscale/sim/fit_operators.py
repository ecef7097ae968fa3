"""Iteration times from operators measured one by one, as LLMServingSim's profiler measures them under vLLM.

    iteration = layers x (linear, norm and rotary operators at all new tokens + attention of the whole batch)
              + embedding and last norm at all new tokens + LM head and sampler at all sequences

Attention is measured for whole batches: one prompt chunk beside decode sequences of equal context. Beside a chunk,
decode attention runs in the prefill kernel and takes longer than alone, on average twice as long at 128 sequences; a
sum of the two parts would miss that.

File format: casys-kaist/LLMServingSim 5daddb2 (MIT), profiler/README.md, as parquet; microseconds per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.interpolate import RegularGridInterpolator

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.sim.fit_sources import GpuSystem
from rl_autoscale.sim.iteration_table import FloatArray, IterationTable, read_columns, table_from_columns

Columns = dict[str, npt.NDArray[Any]]

ONCE_PER_ITERATION = ("embedding", "final_layernorm")
TWICE_PER_LAYER = ("layernorm",)
"""Operators of the dense table that do not run once per layer."""

_MICROSECOND = 1e-6


@dataclass(frozen=True, slots=True)
class OperatorTimes:
    """One (model, GPU) measured operator by operator; tensor parallelism 1.

    Attributes:
        system: the GPU and vLLM's limits on it.
        kv_tokens: KV tokens that a replica holds.
        num_layers: layers of the model.
        dense_tokens: shape (num_dense,), token counts at which the linear part was measured.
        dense_s: shape (num_dense,), seconds of everything that depends on tokens alone, all layers.
        head_sequences: shape (num_head,), sequence counts at which LM head and sampler were measured.
        head_s: shape (num_head,), seconds.
        prefill: attention seconds per layer over (chunk tokens, earlier context).
        decode: over (sequences, context of each).
        mixed: over (chunk tokens, earlier context, sequences, context of each).
        attention: the measured attention rows themselves.
    """

    system: GpuSystem
    kv_tokens: int
    num_layers: int
    dense_tokens: FloatArray
    dense_s: FloatArray
    head_sequences: FloatArray
    head_s: FloatArray
    prefill: RegularGridInterpolator
    decode: RegularGridInterpolator
    mixed: RegularGridInterpolator
    attention: Columns

    def iteration_s(
        self, chunks: int, chunk_tokens: int, chunk_context: int, num_decode: int, decode_context: int
    ) -> float:
        """Seconds of one iteration of equal prompt chunks, decode sequences of equal context, or both."""
        return self.batch_s([(chunk_tokens, chunk_context)] * chunks, num_decode, float(decode_context))

    def batch_s(self, chunks: Sequence[tuple[int, int]], num_decode: int, decode_context: float) -> float:
        """Seconds of one iteration.

        Args:
            chunks: one (new prompt tokens, prompt tokens already computed) pair per prompt chunk.
            num_decode: decode sequences.
            decode_context: their mean context in tokens, the new token included.
        """
        num_tokens = num_decode + sum(new for new, _ in chunks)
        shared_s = np.interp(num_tokens, self.dense_tokens, self.dense_s)
        shared_s += np.interp(num_decode + len(chunks), self.head_sequences, self.head_s)
        return float(shared_s + self.num_layers * self._attention_s(chunks, num_decode, decode_context))

    def _attention_s(self, chunks: Sequence[tuple[int, int]], num_decode: int, decode_context: float) -> float:
        """Attention of one layer; only one chunk beside decode was measured, so further chunks are added alone."""
        if not chunks:
            return _look_up(self.decode, (num_decode, decode_context))
        alone = [_look_up(self.prefill, chunk) for chunk in chunks]
        if num_decode == 0:
            return sum(alone)
        heaviest = max(range(len(chunks)), key=lambda k: alone[k])
        beside = _look_up(self.mixed, (*chunks[heaviest], num_decode, decode_context))
        return sum(alone) - alone[heaviest] + max(beside, alone[heaviest])

    def measured_table(self, *, max_tokens: int) -> IterationTable:
        """The iterations at which attention itself was measured, up to so many new tokens, that the KV cache holds."""
        rows = self.attention
        new_tokens = rows["prefill_chunk"] + rows["n_decode"]
        kv_tokens = rows["prefill_chunk"] + rows["kv_prefill"] + rows["n_decode"] * rows["kv_decode"]
        sequences = rows["n_decode"] + (rows["prefill_chunk"] > 0)
        seconds = np.interp(new_tokens, self.dense_tokens, self.dense_s)
        seconds += np.interp(sequences, self.head_sequences, self.head_s)
        seconds += self.num_layers * rows["time_us"] * _MICROSECOND
        columns = {
            "prefill_chunk_tokens": rows["prefill_chunk"],
            "prefill_kv_context": rows["kv_prefill"],
            "decode_batch_size": rows["n_decode"],
            "mean_decode_context": rows["kv_decode"],
            "iter_time_ms": seconds * 1e3,
        }
        keep = (new_tokens <= max_tokens) & (kv_tokens <= self.kv_tokens)
        return table_from_columns({name: column[keep] for name, column in columns.items()}, where="attention table")


def read_operators(stem: Path, system: GpuSystem, *, num_layers: int, kv_tokens: int) -> OperatorTimes:
    """Read ``<stem>_dense.parquet``, ``<stem>_per_sequence.parquet`` and ``<stem>_attention.parquet``.

    Args:
        stem: folder and common beginning of the three files.
        system: the GPU and vLLM's limits on it.
        num_layers: layers of the model.
        kv_tokens: KV tokens that a replica holds.

    Raises:
        SpecError: a file is missing, or an operator was not measured at the same sizes as the others.
        MissingExtraError: pyarrow is not installed.
    """
    dense_tokens, dense = _by_operator(stem.with_name(f"{stem.name}_dense.parquet"), "tokens")
    head_sequences, head = _by_operator(stem.with_name(f"{stem.name}_per_sequence.parquet"), "sequences")
    attention = read_columns(stem.with_name(f"{stem.name}_attention.parquet"))
    calls = {name: float(num_layers) for name in dense}
    calls |= {name: 1.0 for name in ONCE_PER_ITERATION} | {name: 2.0 * num_layers for name in TWICE_PER_LAYER}
    has_prompt, has_decode = attention["prefill_chunk"] > 0, attention["n_decode"] > 0
    return OperatorTimes(
        system=system,
        kv_tokens=kv_tokens,
        num_layers=num_layers,
        dense_tokens=dense_tokens,
        dense_s=np.asarray(sum(calls[name] * seconds for name, seconds in dense.items())),
        head_sequences=head_sequences,
        head_s=np.asarray(sum(head.values())),
        prefill=_grid(attention, has_prompt & ~has_decode, ("prefill_chunk", "kv_prefill")),
        decode=_grid(attention, has_decode & ~has_prompt, ("n_decode", "kv_decode")),
        mixed=_grid(attention, has_prompt & has_decode, ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")),
        attention=attention,
    )


def _by_operator(path: Path, size: str) -> tuple[FloatArray, dict[str, FloatArray]]:
    """(sizes, seconds of each operator at them)."""
    columns = read_columns(path)
    operators = columns["layer"].astype(str)
    sizes = np.unique(columns[size])
    seconds: dict[str, FloatArray] = {}
    for name in np.unique(operators):
        rows = operators == name
        order = np.argsort(columns[size][rows])
        if not np.array_equal(columns[size][rows][order], sizes):
            raise SpecError(
                f"{path}: operator {name} lacks some of the {len(sizes)} values of {size}; measure them all"
            )
        seconds[str(name)] = columns["time_us"][rows][order] * _MICROSECOND
    return sizes.astype(np.float64), seconds


def _grid(columns: Columns, rows: npt.NDArray[np.bool_], axes: tuple[str, ...]) -> RegularGridInterpolator:
    """Linear interpolation over a grid of measured sizes; beyond it, the last slope goes on."""
    sizes = [np.unique(columns[axis][rows]) for axis in axes]
    values = np.full([len(size) for size in sizes], np.nan)
    at = tuple(np.searchsorted(size, columns[axis][rows]) for size, axis in zip(sizes, axes, strict=True))
    values[at] = columns["time_us"][rows] * _MICROSECOND
    while np.isnan(values).any():  # several overlapping grids were measured: keep the largest full one at hand
        missing = np.isnan(values)
        holes = [np.moveaxis(missing, axis, 0).reshape(size.size, -1).mean(axis=1) for axis, size in enumerate(sizes)]
        axis = int(np.argmax([share.max() for share in holes]))
        keep = np.arange(len(sizes[axis])) != int(np.argmax(holes[axis]))
        sizes[axis], values = sizes[axis][keep], np.compress(keep, values, axis=axis)
    if min(values.shape) < 2:
        raise SpecError(
            f"attention over {', '.join(axes)} is not measured on a grid; measure at least two by two sizes"
        )
    return RegularGridInterpolator(
        [size.astype(np.float64) for size in sizes], values, bounds_error=False, fill_value=None
    )


def _look_up(grid: RegularGridInterpolator, point: tuple[float, ...]) -> float:
    """The grid's value; below its first size the value there, because a smaller batch still pays the launch."""
    inside = [max(value, float(axis[0])) for value, axis in zip(point, grid.grid, strict=True)]
    return float(grid(inside)[0])
