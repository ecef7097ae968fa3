"""CSV traces: a fast path that trusts the file, and a careful one that says which line is wrong and why.

The careful path is the definition. The fast one (NumPy's C parser, a quarter of a million rows at a time) is used when
it finds nothing to complain about, and a test holds the two equal.
"""

from __future__ import annotations

import csv
import gzip
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from rl_autoscale.fleet.errors import TraceError
from rl_autoscale.workload.raw import Labels, RawColumns, find_bad_rows
from rl_autoscale.workload.stamps import STAMP_BYTES, parse_stamp_ns, parse_stamps
from rl_autoscale.workload.trace import NO_SESSION, FloatArray, Int64Array

_CHUNK_ROWS = 250_000
_LABEL_BYTES = 64


@dataclass(frozen=True, slots=True)
class CsvLayout:
    """Which column means what.

    Attributes:
        arrival, prompt, output: required columns.
        stamps: whether arrivals are wall-clock stamps; otherwise seconds.
        class_name, session, hashes: optional columns; None where the format has none.
        known: columns the format is known to have and that are left out on purpose, so no note names them.
    """

    arrival: str
    prompt: str
    output: str
    stamps: bool = False
    class_name: str | None = None
    session: str | None = None
    hashes: str | None = None
    known: frozenset[str] = frozenset()

    @property
    def required(self) -> tuple[str, str, str]:
        """Columns without which a file is not of this format."""
        return self.arrival, self.prompt, self.output


LAYOUTS: dict[str, CsvLayout] = {
    "azure": CsvLayout("TIMESTAMP", "ContextTokens", "GeneratedTokens", stamps=True),
    "burstgpt": CsvLayout(
        "Timestamp",
        "Request tokens",
        "Response tokens",
        class_name="Model",
        session="Session ID",
        known=frozenset({"Elapsed time", "Total tokens", "Log Type"}),
    ),
    "native": CsvLayout(
        "arrival_s", "prompt_tokens", "output_tokens", class_name="class", session="session", hashes="hash_ids"
    ),
}
"""Azure: github.com/Azure/AzurePublicDataset, 2023 and 2024. BurstGPT: github.com/HPMLL/BurstGPT."""


def open_text(path: Path) -> TextIO:
    """Open a text file, gzipped or not."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open("r", encoding="utf-8-sig", newline="")


def read_header(path: Path) -> list[str]:
    """Column names of a CSV file; raises TraceError for an empty one."""
    with open_text(path) as file:
        header = next(csv.reader(file), None)
    if not header or not any(name.strip() for name in header):
        raise TraceError(f"{path}: the file is empty; a header line with column names is expected")
    return [name.strip() for name in header]


def read_csv(path: Path, layout: CsvLayout, *, in_order: bool) -> RawColumns:
    """Read a CSV trace.

    Args:
        path: the file, gzipped or not.
        layout: which column means what.
        in_order: whether rows out of order are bad; decides which path is trusted.

    Raises:
        TraceError: when the file is empty or lacks a required column.
    """
    header = read_header(path)
    missing = [name for name in layout.required if name not in header]
    if missing:
        raise TraceError(f"{path}:1: no column {', '.join(missing)}; the header has {', '.join(header)}")
    optional = (layout.class_name, layout.session, layout.hashes)
    used = [*layout.required, *(name for name in optional if name in header)]
    unused = tuple(name for name in header if name and name not in used and name not in layout.known)
    columns = None
    if layout.hashes not in header:
        columns = _read_fast(path, layout, header, unused)
    if columns is None or columns.num_rows == 0 or find_bad_rows(columns, in_order=in_order):
        columns = _read_carefully(path, layout, header, unused)
    return columns


def _read_fast(path: Path, layout: CsvLayout, header: Sequence[str], unused: tuple[str, ...]) -> RawColumns | None:
    """The file through NumPy's parser; None when anything at all is unusual."""
    time_type = f"S{STAMP_BYTES}" if layout.stamps else "f8"
    wanted = [(layout.arrival, time_type), (layout.prompt, "f8"), (layout.output, "f8")]
    wanted += [(name, f"S{_LABEL_BYTES}") for name in (layout.class_name, layout.session) if name in header and name]
    dtype = np.dtype(wanted)
    usecols = [header.index(name) for name, _ in wanted]
    classes, sessions = Labels(), Labels(missing=NO_SESSION)
    parts: list[tuple[np.ndarray, ...]] = []
    try:
        with open_text(path) as file:
            next(csv.reader(file))
            for chunk in _chunks(file, dtype, usecols, num_fields=len(header)):
                part = _fast_columns(chunk, layout, classes, sessions)
                if part is None:
                    return None
                parts.append(part)
    except (ValueError, UnicodeError):
        return None
    if not parts:
        return None
    time, prompt, output, class_code, session = (np.concatenate(column) for column in zip(*parts, strict=True))
    arrival_s, start = _from_first_stamp(time) if layout.stamps else (time, "")
    return RawColumns(
        arrival_s,
        prompt,
        output,
        class_code=class_code if class_code.size else None,
        class_labels=classes.names,
        session=session if session.size else None,
        unused=unused,
        start=start,
    )


def _chunks(file: TextIO, dtype: np.dtype, usecols: Sequence[int], num_fields: int) -> Iterator[np.ndarray]:
    """Parse the rest of the file piece by piece; raises ValueError for a row with another number of fields."""
    while lines := list(itertools.islice(file, _CHUNK_ROWS)):
        # loadtxt overlooks surplus fields when columns are chosen: "1,234,5" would be read as 1 and 234
        if any(line.count(",") != num_fields - 1 and line.strip() for line in lines):
            raise ValueError("a row with another number of fields, or a quoted comma")
        yield np.loadtxt(lines, dtype=dtype, delimiter=",", usecols=usecols, comments=None, quotechar='"', ndmin=1)


def _fast_columns(
    chunk: np.ndarray, layout: CsvLayout, classes: Labels, sessions: Labels
) -> tuple[np.ndarray, ...] | None:
    """Columns of one chunk; None for a label that may have been cut or a stamp of another form."""
    empty = np.empty(0, dtype=np.int32)
    class_code, session = empty, empty
    for name, labels in ((layout.class_name, classes), (layout.session, sessions)):
        if name in (chunk.dtype.names or ()):
            values = np.char.strip(chunk[name])
            if (np.char.str_len(chunk[name]) >= _LABEL_BYTES).any():
                return None
            codes = labels.codes(values)
            class_code, session = (codes, session) if labels is classes else (class_code, codes)
    time: np.ndarray | None = chunk[layout.arrival]
    if layout.stamps:
        time = parse_stamps(np.ascontiguousarray(time))
    if time is None:
        return None
    return time, chunk[layout.prompt], chunk[layout.output], class_code, session


def _from_first_stamp(time_ns: Int64Array) -> tuple[FloatArray, str]:
    """Seconds since the first stamp (in integers, so that 100 ns digits survive), and that stamp for people."""
    first = int(time_ns.min())
    return (time_ns - first) / 1e9, f"{np.datetime64(first, 'ns')} UTC"


def _read_carefully(path: Path, layout: CsvLayout, header: Sequence[str], unused: tuple[str, ...]) -> RawColumns:
    """The file row by row, keeping every line number and every complaint."""
    rows = _CarefulRows(layout, header)
    with open_text(path) as file:
        reader = csv.reader(file)
        next(reader)
        try:
            for fields in reader:
                if fields:  # csv gives [] for a blank line, which is no row
                    rows.add(reader.line_num, fields)
        except csv.Error as error:
            raise TraceError(f"{path}:{reader.line_num + 1}: cannot be read as CSV ({error})") from None
    return rows.columns(unused)


class _CarefulRows:
    """Collects rows of text; a field that cannot be read becomes NaN and a reason."""

    def __init__(self, layout: CsvLayout, header: Sequence[str]) -> None:
        self._layout = layout
        self._place = {name: place for place, name in enumerate(header)}
        self._num_fields = len(header)
        self._classes, self._sessions = Labels(), Labels(missing=NO_SESSION)
        self._line, self._stamp = array("q"), array("q")
        self._numbers = {name: array("d") for name in layout.required}
        self._class_code, self._session = array("i"), array("i")
        self._hash_counts, self._hash_ids = array("q"), array("q")
        self._unreadable: dict[int, str] = {}

    def add(self, line: int, fields: Sequence[str]) -> None:
        row = len(self._line)
        self._line.append(line)
        complaints: list[str] = []
        if len(fields) != self._num_fields:
            complaints.append(f"{len(fields)} fields where the header has {self._num_fields}")
        for name, values in self._numbers.items():
            convert = parse_stamp_ns if self._layout.stamps and name == self._layout.arrival else float
            value = self._convert(fields, name, convert, complaints)
            if convert is float:
                values.append(float("nan") if value is None else value)
            else:
                self._stamp.append(0 if value is None else int(value))
                values.append(float("nan") if value is None else 0.0)
        self._add_labels(fields)
        self._add_hashes(fields, complaints)
        if complaints:
            self._unreadable[row] = complaints[0]

    def _convert(
        self, fields: Sequence[str], name: str, convert: Callable[[str], float], complaints: list[str]
    ) -> float | None:
        text = self._field(fields, name)
        if not text:
            complaints.append(f"{name} is missing")
            return None
        try:
            return convert(text)
        except ValueError as error:
            complaints.append(f"{name}: {error}" if convert is not float else f"{name} '{text}' is not a number")
            return None

    def _field(self, fields: Sequence[str], name: str) -> str:
        place = self._place[name]
        return fields[place].strip() if place < len(fields) else ""

    def _add_labels(self, fields: Sequence[str]) -> None:
        layout = self._layout
        if layout.class_name in self._place:
            self._class_code.append(self._classes.code(self._field(fields, layout.class_name)))
        if layout.session in self._place:
            self._session.append(self._sessions.code(self._field(fields, layout.session)))

    def _add_hashes(self, fields: Sequence[str], complaints: list[str]) -> None:
        if self._layout.hashes not in self._place:
            return
        text = self._field(fields, self._layout.hashes)
        try:
            ids = array("q", map(int, text.strip("[]").replace(",", " ").split()))
        except (ValueError, OverflowError):
            complaints.append(f"{self._layout.hashes} '{text[:40]}' is not a list of whole numbers")
            ids = array("q")
        self._hash_ids.extend(ids)
        self._hash_counts.append(len(ids))

    def columns(self, unused: tuple[str, ...]) -> RawColumns:
        arrival_s, prompt, output = (np.array(self._numbers[name], dtype=np.float64) for name in self._layout.required)
        start = ""
        readable = np.isfinite(arrival_s)
        if self._layout.stamps and readable.any():
            stamps = np.array(self._stamp, dtype=np.int64)
            relative, start = _from_first_stamp(stamps[readable])
            arrival_s[readable] = relative
        has_hashes = self._layout.hashes in self._place
        return RawColumns(
            arrival_s,
            prompt,
            output,
            line=np.array(self._line, dtype=np.int64),
            unreadable=self._unreadable,
            class_code=np.array(self._class_code, dtype=np.int32) if self._class_code else None,
            class_labels=self._classes.names,
            session=np.array(self._session, dtype=np.int32) if self._session else None,
            hash_counts=np.array(self._hash_counts, dtype=np.int64) if has_hashes else None,
            hash_ids=np.array(self._hash_ids, dtype=np.int64) if has_hashes else None,
            unused=unused,
            start=start,
        )
