"""Columns as a file gave them, before anything is believed; and the one place that says what a bad row is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rl_autoscale.workload.lengths import MAX_TOKENS
from rl_autoscale.workload.trace import FloatArray, Int32Array, Int64Array

SHOWN_BAD_ROWS = 5
"""An error names so many bad rows, then counts the rest."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        line: 1-based line of a text file (the header is line 1), or 1-based row of a parquet file.
        reason: what is wrong with it.
    """

    line: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class RawColumns:
    """What a reader found; rows in file order, numbers unchecked.

    Attributes:
        arrival_s: shape (N,), float64, in seconds on the file's own clock (wall-clock stamps: since the first row);
            NaN if unreadable.
        prompt_tokens: shape (N,), float64; NaN if unreadable or missing.
        output_tokens: shape (N,), float64; NaN if unreadable or missing.
        line: shape (N,), int64, each row's line; None where row i is line i + 1 of a parquet file or the lines are
            not known yet.
        unreadable: row to reason, for fields that are not what they should be.
        class_code: shape (N,), int32 index into `class_labels`; None without a class column.
        class_labels: names in order of first appearance.
        session: shape (N,), int32; None without a session column.
        hash_counts: shape (N,), int64, prefix blocks per row; None without.
        hash_ids: shape (sum(hash_counts),), int64.
        unused: names of the columns or keys that were not read.
        start: what the clock's zero was, for people.
    """

    arrival_s: FloatArray
    prompt_tokens: FloatArray
    output_tokens: FloatArray
    line: Int64Array | None = None
    unreadable: Mapping[int, str] = field(default_factory=dict)
    class_code: Int32Array | None = None
    class_labels: tuple[str, ...] = ()
    session: Int32Array | None = None
    hash_counts: Int64Array | None = None
    hash_ids: Int64Array | None = None
    unused: tuple[str, ...] = ()
    start: str = ""

    @property
    def num_rows(self) -> int:
        """Rows, good and bad."""
        return int(self.arrival_s.size)


def find_bad_rows(columns: RawColumns, *, in_order: bool) -> dict[int, str]:
    """Name every row that cannot be a request.

    Args:
        columns: what was read.
        in_order: whether a row that arrives before an earlier good row is bad.

    Returns:
        Row index to reason, ascending; one reason per row, the first that applies.
    """
    arrival_s, prompt, output = columns.arrival_s, columns.prompt_tokens, columns.output_tokens
    with np.errstate(invalid="ignore"):
        checks: list[tuple[npt.NDArray[np.bool_], str, FloatArray]] = [
            (~np.isfinite(arrival_s), "arrival time {} is missing or not finite", arrival_s),
            (arrival_s < 0, "arrival time {} s is negative", arrival_s),
            *_token_checks("prompt", prompt),
            (output == 0, "0 output tokens: the request failed, there is nothing to serve", output),
            *_token_checks("output", output),
        ]
    reasons: dict[int, str] = dict(columns.unreadable)
    for mask, reason, values in checks:
        for row in np.flatnonzero(mask).tolist():
            reasons.setdefault(row, reason.format(f"{values[row]:.10g}"))
    if in_order:
        _add_disorder(arrival_s, reasons)
    return dict(sorted(reasons.items()))


def _token_checks(side: str, tokens: FloatArray) -> list[tuple[npt.NDArray[np.bool_], str, FloatArray]]:
    return [
        (~np.isfinite(tokens), f"{side} tokens {{}} are missing or not finite", tokens),
        (tokens < 1, f"{{}} {side} tokens; at least 1 is needed", tokens),
        (tokens > MAX_TOKENS, f"{{}} {side} tokens exceed {MAX_TOKENS:,}", tokens),
        (tokens != np.floor(tokens), f"{{}} {side} tokens is not a whole number", tokens),
    ]


def _add_disorder(arrival_s: FloatArray, reasons: dict[int, str]) -> None:
    good = np.ones(arrival_s.size, dtype=np.bool_)
    good[list(reasons)] = False
    so_far = np.maximum.accumulate(np.where(good, arrival_s, -np.inf))
    for row in np.flatnonzero(good & (arrival_s < so_far)).tolist():
        reasons[row] = f"arrives at {arrival_s[row]:.10g} s, before an earlier row at {so_far[row]:.10g} s"


def as_bad_rows(columns: RawColumns, reasons: Mapping[int, str]) -> tuple[BadRow, ...]:
    """Replace row indices by what a person looks up in the file."""
    lines = columns.line
    return tuple(BadRow(row + 1 if lines is None else int(lines[row]), reason) for row, reason in reasons.items())


def describe_bad_rows(source: str, bad: Sequence[BadRow], num_rows: int) -> str:
    """One line that names the first bad rows and counts them all."""
    shown = "; ".join(f"{source}:{row.line}: {row.reason}" for row in bad[:SHOWN_BAD_ROWS])
    more = f"; and {len(bad) - SHOWN_BAD_ROWS:,} more" if len(bad) > SHOWN_BAD_ROWS else ""
    return f"{len(bad):,} of {num_rows:,} rows cannot be used: {shown}{more}"


class Labels:
    """Numbers text labels in order of first appearance, chunk by chunk."""

    def __init__(self, missing: int | None = None) -> None:
        """Start empty; where `missing` is given, empty text gets that code and no number."""
        self._codes: dict[str, int] = {}
        self._missing = missing

    def code(self, label: str) -> int:
        """The number of one label."""
        if self._missing is not None and not label:
            return self._missing
        return self._codes.setdefault(label, len(self._codes))

    def codes(self, labels: npt.NDArray[np.bytes_]) -> Int32Array:
        """The numbers of an array of UTF-8 byte strings; same shape."""
        distinct, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
        numbers = np.empty(distinct.size, dtype=np.int32)
        for place in np.argsort(first).tolist():
            numbers[place] = self.code(distinct[place].decode("utf-8"))
        return numbers[inverse]

    @property
    def names(self) -> tuple[str, ...]:
        """All labels seen."""
        return tuple(self._codes)
