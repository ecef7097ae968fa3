"""Iteration times as a table: what a latency profile is fitted to and judged by.

One row is one engine iteration: ``prefill_chunks`` prompt chunks of equal size beside a decode batch of equal contexts.
Every source (AIConfigurator, Vidur, a live vLLM server, a user's own measurement) is brought into this form first, so
the fit and its error mean the same thing whatever the source. docs/profiles.md describes the file schema for users.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.errors import MissingExtraError, SpecError, did_you_mean

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

REGIONS = ("prefill", "decode", "mixed")
"""Kinds of iteration: prompt chunks alone, decode alone, both."""

REQUIRED_COLUMNS = (
    "prefill_chunk_tokens",
    "prefill_kv_context",
    "decode_batch_size",
    "mean_decode_context",
    "iter_time_ms",
)
"""Columns a table file must have."""

OPTIONAL_COLUMNS = ("prefill_chunks",)
"""Columns a table file may have; ``prefill_chunks`` defaults to 1 where there are chunk tokens."""


@dataclass(frozen=True, slots=True)
class IterationTable:
    """Iterations and their durations; every array has shape (num_rows,) and dtype float64.

    Attributes:
        chunk_tokens: new prompt tokens of each chunk; 0 where there is no prefill.
        chunk_context_tokens: prompt tokens of each chunk's request that were computed before.
        num_chunks: prompt chunks in the iteration; 0 where there is no prefill.
        num_decode: decode sequences, one new token each.
        decode_context_tokens: mean KV tokens a decode sequence reads, its new token included.
        iteration_s: seconds, > 0.
    """

    chunk_tokens: FloatArray
    chunk_context_tokens: FloatArray
    num_chunks: FloatArray
    num_decode: FloatArray
    decode_context_tokens: FloatArray
    iteration_s: FloatArray

    def __len__(self) -> int:
        return len(self.iteration_s)

    def __getitem__(self, rows: BoolArray | npt.NDArray[np.int64]) -> IterationTable:
        """The chosen rows."""
        return IterationTable(*(getattr(self, name)[rows] for name in self.__slots__))

    @property
    def new_tokens(self) -> FloatArray:
        """Tokens that pass through the linear layers; shape (num_rows,)."""
        return np.asarray(self.num_chunks * self.chunk_tokens + self.num_decode)

    @property
    def kv_tokens(self) -> FloatArray:
        """KV tokens the batch holds; shape (num_rows,)."""
        prompts = self.num_chunks * (self.chunk_context_tokens + self.chunk_tokens)
        return np.asarray(prompts + self.num_decode * self.decode_context_tokens)

    def region(self, name: str) -> BoolArray:
        """Rows of one of `REGIONS`; shape (num_rows,)."""
        prefill, decode = self.num_chunks > 0, self.num_decode > 0
        return np.asarray({"prefill": prefill & ~decode, "decode": decode & ~prefill, "mixed": prefill & decode}[name])

    @property
    def attention_features(self) -> FloatArray:
        """Shape (num_rows, 7), the multipliers of ``LatencyProfile.attention_coefficients_s`` in their order."""
        decode_context, holds_chunk = self.num_decode * self.decode_context_tokens, self.num_chunks > 0
        return np.stack(
            [
                decode_context,
                self.num_decode,
                self.num_chunks * self.chunk_tokens * (self.chunk_context_tokens + self.chunk_tokens / 2.0),
                self.num_chunks * self.chunk_context_tokens,
                self.num_chunks,
                decode_context * holds_chunk,
                self.num_decode * holds_chunk,
            ],
            axis=-1,
        )


def table_from_columns(columns: dict[str, Any], *, where: str) -> IterationTable:
    """Build a checked table from named columns (`REQUIRED_COLUMNS`, times in milliseconds).

    Args:
        columns: arrays or sequences of one length.
        where: what to call the source in messages.

    Raises:
        SpecError: a column is missing, is not numeric, or holds a value that no iteration can have.
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        hint = did_you_mean(missing[0], columns)
        raise SpecError(f"{where}: no column '{missing[0]}'{hint}; needed: {', '.join(REQUIRED_COLUMNS)}")
    try:
        values = {
            name: np.asarray(columns[name], dtype=np.float64)
            for name in REQUIRED_COLUMNS + OPTIONAL_COLUMNS
            if name in columns
        }
    except (TypeError, ValueError) as error:
        raise SpecError(f"{where}: columns must be numbers ({error})") from None
    chunk_tokens = values["prefill_chunk_tokens"]
    has_prefill = chunk_tokens > 0
    table = IterationTable(
        chunk_tokens=chunk_tokens,
        chunk_context_tokens=np.where(has_prefill, values["prefill_kv_context"], 0.0),
        num_chunks=np.where(has_prefill, values.get("prefill_chunks", np.ones_like(chunk_tokens)), 0.0),
        num_decode=values["decode_batch_size"],
        decode_context_tokens=np.where(values["decode_batch_size"] > 0, values["mean_decode_context"], 0.0),
        iteration_s=values["iter_time_ms"] / 1e3,
    )
    _check(table, values, where)
    return table


def _check(table: IterationTable, values: dict[str, FloatArray], where: str) -> None:
    """Name the first row that cannot be an iteration."""
    for name, column in values.items():
        limit = "finite and > 0" if name == "iter_time_ms" else "finite and >= 0"
        bad = ~np.isfinite(column) | (column <= 0 if name == "iter_time_ms" else column < 0)
        if bad.any():
            row = int(np.argmax(bad))
            raise SpecError(
                f"{where}: row {row}: {name}={column[row]:g}; it must be {limit}; correct or remove the row"
            )
    chunkless = (table.chunk_tokens > 0) & (table.num_chunks < 1)
    for bad, what in (
        (chunkless, "prefill_chunks must be >= 1 where prefill_chunk_tokens > 0"),
        (table.new_tokens <= 0, "neither prefill_chunk_tokens nor decode_batch_size is positive"),
    ):
        if bad.any():
            raise SpecError(f"{where}: row {int(np.argmax(bad))}: {what}; correct or remove the row")


def read_table(path: Path, *, where: Mapping[str, str | int | None] | None = None) -> IterationTable:
    """Read a parquet or CSV file of iterations.

    Args:
        path: ends in .parquet or .csv.
        where: columns that tell one profile's rows from another's, for example ``{"model": "...", "tp": 1}``. A column
            that the file lacks is skipped; one that it has must equal the value; None stands for "the only value".

    Raises:
        SpecError: the file is missing, is neither parquet nor CSV, lacks a column, or no row is left.
        MissingExtraError: parquet without pyarrow.
    """
    columns = read_columns(path)
    num_rows = len(next(iter(columns.values()), []))
    keep = np.ones(num_rows, dtype=np.bool_)
    for name, wanted in (where or {}).items():
        if name in columns:
            keep &= _matching_rows(columns[name], keep, name, wanted, path)
    if not keep.any():
        raise SpecError(f"{path}: no rows; a table needs some")
    return table_from_columns({name: column[keep] for name, column in columns.items()}, where=str(path))


def _matching_rows(
    column: npt.NDArray[Any], keep: BoolArray, name: str, wanted: str | int | None, path: Path
) -> BoolArray:
    found = column.astype(str)
    present = sorted(set(found[keep]))
    if wanted is None and len(present) == 1:
        wanted = present[0]
    if wanted is None or str(wanted) not in present:
        got = "rows of several" if wanted is None else f"no row left with {name}={wanted}"
        raise SpecError(f"{path}: {got}; choose one {name} of: {', '.join(present)}")
    return np.asarray(found == str(wanted))


def read_columns(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every column of a .parquet or .csv file by name, text where it is CSV; raises as `read_table` does."""
    readers = {".parquet": _read_parquet, ".csv": _read_csv}
    if path.suffix not in readers:
        raise SpecError(f"{path}: got '{path.suffix}'; a table is a .parquet or .csv file")
    try:
        return readers[path.suffix](path)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read ({error})") from None


def _read_parquet(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MissingExtraError("reading parquet", "parquet") from None
    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise SpecError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
    return {name: table[name].to_numpy() for name in table.column_names}


def _read_csv(path: Path) -> dict[str, npt.NDArray[Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise SpecError(
                f"{path}: line {number} has {len(row)} values, the header {len(header)}; correct or remove it"
            )
    return {name: np.array([row[index] for row in rows]) for index, name in enumerate(header)}
