"""Traffic by time bucket from a CSV file: what most monitoring can export.

    time,arrivals,prompt_tokens,output_tokens
    2026-11-02T00:00:00Z,412,480211,80122
    2026-11-02T00:01:00Z,398,471003,79210

``time`` is where the bucket begins: an ISO 8601 stamp (UTC without an offset) or a number of seconds. ``prompt_tokens``
and ``output_tokens`` are the *totals* of the bucket's requests. An optional column ``class`` gives one line per bucket
and class. The bucket's length is the smallest distance between times; a bucket without a line, or with an empty field
under ``arrivals``, is a gap.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rl_autoscale.fleet.errors import TraceError
from rl_autoscale.workload.buckets import BucketLengths, BucketSeries
from rl_autoscale.workload.csv_reader import open_text, read_header
from rl_autoscale.workload.stamps import parse_stamp_ns
from rl_autoscale.workload.trace import FloatArray

COLUMNS = ("time", "arrivals", "prompt_tokens", "output_tokens")
CLASS_COLUMN = "class"
MAX_BUCKETS = 5_000_000
_OFF_GRID = 1e-3


def is_bucket_csv(path: Path) -> bool:
    """Whether a file's header is that of buckets, not of single requests."""
    if not path.is_file() or ".csv" not in path.suffixes:
        return False
    return {"time", "arrivals"} <= set(read_header(path))


def read_buckets(path: Path) -> list[BucketSeries]:
    """Read a file of the form above; one series per class.

    Raises:
        TraceError: ``file:line: reason`` for a value that cannot be, a missing column, or times on no common grid.
    """
    header = read_header(path)
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise TraceError(f"{path}:1: no column {', '.join(missing)}; needed: {', '.join(COLUMNS)} (and optional class)")
    rows: dict[str | None, dict[float, tuple[float, float, float]]] = {}
    with open_text(path) as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            fields = {str(name).strip(): (value or "").strip() for name, value in row.items() if name is not None}
            time_s, values = _read_row(fields, where)
            books = rows.setdefault(fields.get(CLASS_COLUMN) or None, {})
            if time_s in books:
                raise TraceError(f"{where}: time {fields['time']} is given twice; keep one line per bucket and class")
            books[time_s] = values
    if not rows:
        raise TraceError(f"{path}: the file has no rows")
    start_s, bucket_s, size = _grid(sorted({time_s for books in rows.values() for time_s in books}), path)
    return [_series(name, books, start_s, bucket_s, size) for name, books in rows.items()]


def _read_row(fields: Mapping[str, str], where: str) -> tuple[float, tuple[float, float, float]]:
    time_s = _time_s(fields["time"], where)
    arrivals, prompt, output = (_number(fields, name, where) for name in COLUMNS[1:])
    for name, total in (("prompt_tokens", prompt), ("output_tokens", output)):
        if arrivals >= 1 and total < arrivals:
            raise TraceError(
                f"{where}: {name}={total:g} is less than one per request ({arrivals:g} arrivals); the column holds the "
                "bucket's total, not a mean"
            )
    return time_s, (arrivals, prompt, output)


def _time_s(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        try:
            return parse_stamp_ns(text) / 1e9
        except ValueError as error:
            raise TraceError(f"{where}: time: {error}, nor a number of seconds") from None
    if not math.isfinite(number):
        raise TraceError(f"{where}: time {text} is not finite")
    return number


def _number(fields: Mapping[str, str], name: str, where: str) -> float:
    """A number >= 0; NaN for an empty field."""
    text = fields[name]
    if text in ("", "NaN", "nan", "null"):
        return math.nan
    try:
        value = float(text)
    except ValueError:
        raise TraceError(f"{where}: {name}='{text}' is not a number; leave it empty where there is no data") from None
    if not (math.isfinite(value) and value >= 0):
        raise TraceError(f"{where}: {name}={text} must be finite and at least 0; leave it empty where there is no data")
    return value


def _grid(times_s: list[float], path: Path) -> tuple[float, float, int]:
    """(start, bucket length, number of buckets); every time must lie on the grid."""
    if len(times_s) < 2:
        raise TraceError(f"{path}: one bucket has no length; give at least two")
    steps = np.diff(times_s)
    bucket_s = float(steps.min())
    multiples = steps / bucket_s
    off = np.flatnonzero(np.abs(multiples - np.rint(multiples)) > _OFF_GRID)
    if off.size:
        raise TraceError(
            f"{path}: buckets of {bucket_s:g} s do not fit the step of {steps[off[0]]:g} s after time "
            f"{times_s[int(off[0])]:.10g}; give all buckets the same length"
        )
    size = int(np.rint((times_s[-1] - times_s[0]) / bucket_s)) + 1
    if size > MAX_BUCKETS:
        raise TraceError(f"{path}: {size:,} buckets of {bucket_s:g} s between first and last time; check the times")
    return times_s[0], bucket_s, size


def _series(
    name: str | None, books: Mapping[float, tuple[float, float, float]], start_s: float, bucket_s: float, size: int
) -> BucketSeries:
    table = np.full((3, size), math.nan)
    for time_s, values in books.items():
        table[:, round((time_s - start_s) / bucket_s)] = values
    arrivals = table[0]
    return BucketSeries(
        name, start_s, bucket_s, arrivals,
        BucketLengths.of_means(mean_per_request(table[1], arrivals)),
        BucketLengths.of_means(mean_per_request(table[2], arrivals)),
    )  # fmt: skip


def mean_per_request(total: FloatArray, requests: FloatArray) -> FloatArray:
    """Tokens per request; NaN where there are no requests or no tokens."""
    sound = (requests > 0) & (total > 0)
    return np.asarray(np.divide(total, requests, out=np.full(len(total), math.nan), where=sound))
