"""JSONL traces of the Mooncake form: one object per line with hashes of the prompt's blocks.

``{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}``; the stamp is in
milliseconds.
Source: github.com/kvcache-ai/Mooncake, FAST25-release/traces; the same form is used by
alibaba-edu/qwen-bailian-usagetraces-anon.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from rl_autoscale.workload.csv_reader import open_text
from rl_autoscale.workload.raw import RawColumns

_NUMBERS = ("timestamp", "input_length", "output_length")
_HASHES = "hash_ids"


def read_mooncake(path: Path) -> RawColumns:
    """Read a Mooncake JSONL trace; broken lines become unreadable rows."""
    rows = _Rows()
    with open_text(path) as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                rows.add(number, text)
    return rows.columns()


class _Rows:
    """Collects objects; a field that cannot be read becomes NaN and a reason."""

    def __init__(self) -> None:
        self._line = array("q")
        self._numbers = {name: array("d") for name in _NUMBERS}
        self._hash_counts, self._hash_ids = array("q"), array("q")
        self._unreadable: dict[int, str] = {}
        self._unused: dict[str, None] = {}

    def add(self, line: int, text: str) -> None:
        item, complaint = _parse(text)
        for name, values in self._numbers.items():
            value = item.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.append(float(value) if abs(value) < 1e18 else float("nan"))
            else:
                values.append(float("nan"))
                complaint = complaint or (f"{name} {value!r} is not a number" if name in item else f"{name} is missing")
        ids = item.get(_HASHES, [])
        if not (isinstance(ids, list) and all(isinstance(part, int) and 0 <= part < 1 << 63 for part in ids)):
            complaint = complaint or f"{_HASHES} is not a list of whole numbers in 0..2^63-1"
            ids = []
        if complaint:
            self._unreadable[len(self._line)] = complaint
        self._line.append(line)
        self._hash_ids.extend(ids)
        self._hash_counts.append(len(ids))
        self._unused.update(dict.fromkeys(key for key in item if key not in (*_NUMBERS, _HASHES)))

    def columns(self) -> RawColumns:
        stamp_ms, prompt, output = (np.array(self._numbers[name], dtype=np.float64) for name in _NUMBERS)
        return RawColumns(
            stamp_ms / 1e3,
            prompt,
            output,
            line=np.array(self._line, dtype=np.int64),
            unreadable=self._unreadable,
            hash_counts=np.array(self._hash_counts, dtype=np.int64),
            hash_ids=np.array(self._hash_ids, dtype=np.int64),
            unused=tuple(self._unused),
        )


def _parse(text: str) -> tuple[dict[str, Any], str]:
    """The object of a line, or an empty one and what is wrong."""
    try:
        item = json.loads(text)
    except json.JSONDecodeError as error:
        return {}, f"not valid JSON ({error.msg} at column {error.colno})"
    return (item, "") if isinstance(item, dict) else ({}, "not a JSON object")
