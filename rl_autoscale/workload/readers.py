"""`read_trace`: any known file to a `Workload`, with a report of everything that was not taken as it stood."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.errors import TraceError, did_you_mean
from rl_autoscale.workload.csv_reader import LAYOUTS, read_csv, read_header
from rl_autoscale.workload.jsonl_reader import read_mooncake
from rl_autoscale.workload.parquet_io import read_parquet
from rl_autoscale.workload.raw import BadRow, RawColumns, as_bad_rows, describe_bad_rows, find_bad_rows
from rl_autoscale.workload.trace import FloatArray, Int64Array, Workload

TraceFormat = Literal["azure", "burstgpt", "mooncake", "csv", "parquet"]
OnBadRows = Literal["error", "skip"]
OnDisorder = Literal["sort", "bad_row"]

DEFAULT_CLASS = "default"
"""Class of requests whose file names none."""

_BLOCK_SIZES_TOKENS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What happened while a file was read; nothing is left out silently.

    Attributes:
        path: the file.
        format: how it was read.
        num_rows: rows in the file, bad ones included.
        bad_rows: rows that were skipped, with line and reason.
        notes: everything else a user should know, one line each.
    """

    path: Path
    format: TraceFormat
    num_rows: int
    bad_rows: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadResult:
    """A workload and how it was read."""

    workload: Workload
    report: ReadReport


def read_trace(
    path: Path | str,
    format: TraceFormat | None = None,
    *,
    on_bad_rows: OnBadRows = "error",
    on_disorder: OnDisorder = "sort",
    hash_block_tokens: int | None = None,
) -> ReadResult:
    """Read a trace file.

    Azure, BurstGPT and Mooncake files keep their own clock: time 0 is the first good row. Our own files start at 0
        already.
    The span is the file's own where it says one, else the last arrival plus one mean gap.

    Args:
        path: a .csv, .jsonl (both also .gz) or .parquet file.
        format: by default told from the ending and the header.
        on_bad_rows: ``error`` refuses a file with any bad row; ``skip`` leaves them out and lists them in the report.
        on_disorder: ``sort`` puts late rows where they belong and says so; ``bad_row`` treats each as bad.
        hash_block_tokens: prompt tokens per hashed block; by default inferred from the lengths.

    Raises:
        TraceError: for a missing, empty or unknown file, or bad rows (``file:line: reason`` for the first few, and
            how many).
        MissingExtraError: for parquet without pyarrow.
    """
    path = Path(path)
    if not path.is_file():
        raise TraceError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise TraceError(f"{path}: the file is empty")
    try:
        form = format or detect_format(path)
        columns, metadata = _read_columns(path, form, in_order=on_disorder == "bad_row")
    except (OSError, EOFError, UnicodeError) as error:  # unreadable, cut-off gzip, binary under a text name
        raise TraceError(f"{path}: cannot be read ({error})") from None
    if columns.num_rows == 0:
        raise TraceError(f"{path}: the file has no rows; a workload needs at least one request")
    reasons = find_bad_rows(columns, in_order=on_disorder == "bad_row")
    bad = as_bad_rows(columns, reasons)
    if bad and on_bad_rows == "error":
        hint = "repair the file, or leave these rows out with --on-bad-rows skip"
        raise TraceError(f"{describe_bad_rows(str(path), bad, columns.num_rows)}; {hint}")
    good = np.ones(columns.num_rows, dtype=np.bool_)
    good[list(reasons)] = False
    if not good.any():
        raise TraceError(f"{path}: every row is bad; {describe_bad_rows(str(path), bad, columns.num_rows)}")
    workload, notes = _assemble(path, form, columns, good, metadata, hash_block_tokens)
    if bad:
        notes.insert(0, describe_bad_rows(path.name, bad, columns.num_rows).replace("cannot be used", "were left out"))
    return ReadResult(workload, ReadReport(path, form, columns.num_rows, bad, tuple(notes)))


def detect_format(path: Path) -> TraceFormat:
    """Tell a file's format from its ending and, for CSV, its header; raises TraceError listing what is known."""
    endings = [ending for ending in path.suffixes if ending != ".gz"]
    ending = endings[-1].lower() if endings else ""
    if ending == ".parquet":
        return "parquet"
    if ending in (".jsonl", ".ndjson"):
        return "mooncake"
    if ending != ".csv":
        raise TraceError(
            f"{path}: unknown ending '{ending}'; a trace is a .csv, .jsonl or .parquet file (say --format otherwise)"
        )
    header = read_header(path)
    for name, layout in LAYOUTS.items():
        if all(column in header for column in layout.required):
            return _format_of_layout(name)
    known = "; ".join(f"{_format_of_layout(name)}: {', '.join(layout.required)}" for name, layout in LAYOUTS.items())
    raise TraceError(f"{path}:1: the header '{','.join(header)}' is none that is known ({known})")


def _format_of_layout(name: str) -> TraceFormat:
    formats: dict[str, TraceFormat] = {"azure": "azure", "burstgpt": "burstgpt", "native": "csv"}
    return formats[name]


def _read_columns(path: Path, form: TraceFormat, *, in_order: bool) -> tuple[RawColumns, dict[str, Any]]:
    if form not in get_args(TraceFormat):
        formats = get_args(TraceFormat)
        raise TraceError(f"unknown trace format '{form}'{did_you_mean(form, formats)}; known: {', '.join(formats)}")
    if form == "parquet":
        return read_parquet(path)
    if form == "mooncake":
        return read_mooncake(path), {}
    return read_csv(path, LAYOUTS["native" if form == "csv" else form], in_order=in_order), {}


def _assemble(
    path: Path,
    form: TraceFormat,
    columns: RawColumns,
    good: npt.NDArray[np.bool_],
    metadata: dict[str, Any],
    hash_block_tokens: int | None,
) -> tuple[Workload, list[str]]:
    """Good rows, in order, on a clock from 0."""
    notes = []
    if columns.unused:
        notes.append(f"{path.name}: columns not used: {', '.join(columns.unused)}")
    arrival_s = columns.arrival_s
    own_clock = form in ("azure", "burstgpt", "mooncake")
    first_s = float(arrival_s[good].min()) if own_clock else 0.0
    if own_clock and (columns.start or first_s > 0):
        notes.append(f"{path.name}: time 0 is {columns.start or f'{first_s:g} s on the file clock'}")
    arrival_s = arrival_s - first_s
    rows = np.flatnonzero(good)
    steps_back = np.diff(arrival_s[rows])
    if (steps_back < 0).any():
        count, worst = int((steps_back < 0).sum()), -float(steps_back.min())
        notes.append(f"{path.name}: {count:,} rows came out of order (by up to {worst:g} s) and were sorted")
        rows = rows[np.argsort(arrival_s[rows], kind="stable")]
    return _to_workload(path, columns, rows, arrival_s[rows], metadata, hash_block_tokens, notes), notes


def _to_workload(
    path: Path,
    columns: RawColumns,
    rows: npt.NDArray[np.intp],
    arrival_s: FloatArray,
    metadata: dict[str, Any],
    hash_block_tokens: int | None,
    notes: list[str],
) -> Workload:
    prompt_tokens = columns.prompt_tokens[rows].astype(np.int32)
    class_index, class_names = _classes(columns, rows, metadata)
    offsets, ids, block_tokens = _hashes(path, columns, rows, prompt_tokens, metadata, hash_block_tokens, notes)
    return Workload(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=columns.output_tokens[rows].astype(np.int32),
        class_index=class_index,
        class_names=class_names,
        span_s=_span_s(path, arrival_s, metadata),
        session=None if columns.session is None else columns.session[rows],
        hash_offsets=offsets,
        hash_ids=ids,
        hash_block_tokens=block_tokens,
    )


def _span_s(path: Path, arrival_s: FloatArray, metadata: dict[str, Any]) -> float:
    last_s = float(arrival_s[-1])
    if "span_s" in metadata:
        if not float(metadata["span_s"]) >= last_s:
            raise TraceError(
                f"{path}: its metadata says span_s={metadata['span_s']}, but a request arrives at {last_s} s"
            )
        return float(metadata["span_s"])
    # one mean gap after the last arrival: unbiased rate, and a repeated trace would not glue two arrivals together
    gap_s = (last_s - float(arrival_s[0])) / max(arrival_s.size - 1, 1)
    return last_s + gap_s if last_s + gap_s > 0 else 1.0


def _classes(
    columns: RawColumns, rows: npt.NDArray[np.intp], metadata: dict[str, Any]
) -> tuple[npt.NDArray[np.int16], tuple[str, ...]]:
    if columns.class_code is None:
        return np.zeros(rows.size, dtype=np.int16), (DEFAULT_CLASS,)
    labels = tuple(label or DEFAULT_CLASS for label in columns.class_labels)
    names = tuple(dict.fromkeys((*metadata.get("class_names", ()), *labels)))
    number = np.array([names.index(label) for label in labels], dtype=np.int16)
    return number[columns.class_code[rows]], names


def _hashes(
    path: Path,
    columns: RawColumns,
    rows: npt.NDArray[np.intp],
    prompt_tokens: npt.NDArray[np.int32],
    metadata: dict[str, Any],
    block_tokens: int | None,
    notes: list[str],
) -> tuple[Int64Array | None, Int64Array | None, int]:
    counts, ids = columns.hash_counts, columns.hash_ids
    if counts is None or ids is None or not counts.any():
        return None, None, 0
    starts = np.concatenate(([0], np.cumsum(counts)))[rows]
    kept = counts[rows]
    offsets = np.concatenate(([0], np.cumsum(kept)))
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], kept)
    size = block_tokens or int(metadata.get("hash_block_tokens", 0)) or infer_block_tokens(prompt_tokens, kept)
    if size is None:
        raise TraceError(
            f"{path}: the number of hash_ids fits no block size of {', '.join(map(str, _BLOCK_SIZES_TOKENS))} tokens; "
            "say it with hash_block_tokens"
        )
    if not block_tokens and "hash_block_tokens" not in metadata:
        notes.append(f"{path.name}: prefix blocks of {size} tokens, inferred from the lengths")
    return offsets, ids[places], size


def infer_block_tokens(prompt_tokens: npt.NDArray[np.int32], num_blocks: Int64Array) -> int | None:
    """The smallest size that explains every request's number of blocks, a last part block counted or not; else None."""
    has_blocks = num_blocks > 0
    prompt, blocks = prompt_tokens[has_blocks].astype(np.int64), num_blocks[has_blocks]
    for size in _BLOCK_SIZES_TOKENS:
        if ((blocks == -(-prompt // size)) | (blocks == prompt // size)).all():
            return size
    return None
