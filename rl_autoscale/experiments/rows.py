"""One row per episode, kept as JSON lines: appended whole, resumed by key, never half-read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rl_autoscale.experiments.runs import write_text
from rl_autoscale.fleet.errors import SpecError

Refusal = Literal["off", "on"]
"""Early refusal at the gateway: off or on (rules: at a fixed strictness; a policy that decides it: at its own)."""

ROWS_FILE = "rows.jsonl"
SUPERSEDED_FILE = "rows.superseded.jsonl"


@dataclass(frozen=True, slots=True)
class Row:
    """What one policy did in one episode.

    Attributes:
        key: hash of everything the result depends on.
        scenario: name.
        policy: what tables call it.
        registered: its name in the registry.
        knob: name of the swept knob; None for a policy without one.
        knob_value: its value.
        refusal: early refusal off or on.
        seed: of the test workload, start-ups and routing.
        gpu_hours: starting, ready and draining replicas.
        slo_attainment: share of arrived requests that met all their SLOs.
        asked_attainment: what the knobs were tuned for on training traffic; None for a point of a sweep.
        tuned_for: which of several sets of tuned constants its knob is swept with; None where there is one.
        knobs: all keyword arguments of the policy, for the reader; without a workload's arrays.
        metrics: `EpisodeResult.summary()`; docs/metrics.md defines each.
        wall_s: time the episode took.
    """

    key: str
    scenario: str
    policy: str
    registered: str
    knob: str | None
    knob_value: float | None
    refusal: Refusal
    seed: int
    gpu_hours: float
    slo_attainment: float
    asked_attainment: float | None = None
    tuned_for: float | None = None
    knobs: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0

    def to_json(self) -> str:
        """One line of strict JSON; numbers that are not finite become null (NaN) or strings ("inf")."""
        return json.dumps(plain(asdict(self)), allow_nan=False)

    @staticmethod
    def from_json(line: str) -> Row:
        """Inverse of `to_json`.

        Raises:
            ValueError: not a row.
        """
        data = json.loads(line)
        known = {item.name for item in fields(Row)}
        if not isinstance(data, dict) or not {"key", "scenario", "policy", "gpu_hours"} <= set(data) <= known:
            raise ValueError("not a benchmark row")
        data["metrics"] = {name: math.nan if value is None else float(value) for name, value in data["metrics"].items()}
        data["slo_attainment"] = math.nan if data["slo_attainment"] is None else data["slo_attainment"]
        return Row(**data)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; a missing file has none, and a last line cut short by a crash is left out.

    Raises:
        SpecError: any other line is not a row; names file and line.
    """
    if not path.exists():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(Row.from_json(line))
        except (ValueError, TypeError) as error:
            if number == len(lines):  # no newline after it: the writer was killed in the middle
                continue
            raise SpecError(f"{path}:{number}: not a benchmark row ({error}); remove the line or the file") from None
    return rows


class RowStore:
    """The rows of one benchmark folder.

    Opening keeps the rows that the benchmark asks for (by key) in ``rows.jsonl`` and moves all others to
    ``rows.superseded.jsonl``, from where a benchmark that asks for them takes them back.
    """

    def __init__(self, folder: Path, wanted: Iterable[str]) -> None:
        self._path = folder / ROWS_FILE
        wanted_keys = set(wanted)
        superseded = folder / SUPERSEDED_FILE
        found = {row.key: row for path in (superseded, self._path) for row in read_rows(path)}
        self.rows = {key: row for key, row in found.items() if key in wanted_keys}
        self._others = {key: row for key, row in found.items() if key not in wanted_keys}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._others or superseded.exists():
                _write_rows(superseded, self._others.values())
            _write_rows(self._path, self.rows.values())
        except OSError as error:
            raise SpecError(f"{folder}: cannot be written ({error}); choose another folder with --out") from None

    def take_back(self, wanted: Iterable[str]) -> None:
        """Take back superseded rows that are asked for after all."""
        for key in wanted:
            if key in self._others:
                self.append(self._others.pop(key))

    def append(self, row: Row) -> None:
        """Add one row to the file, in one write."""
        self.rows[row.key] = row
        with self._path.open("ab", buffering=0) as file:
            file.write((row.to_json() + "\n").encode())
            os.fsync(file.fileno())


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(row.to_json() + "\n" for row in rows))


def plain(value: Any) -> Any:
    """A value as strict JSON can have it; numbers that are not finite as `Row.to_json` writes them."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return plain(value.item())
    return value
