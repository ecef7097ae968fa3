"""The decision log: one JSON object per control step, for people who ask "why did it do that?"."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class DecisionLog:
    """Appends lines to a file; when it is full the file becomes ``<name>.1`` and so on.

    Failing to write (a full disk) is counted and never stops the controller.

    Args:
        path: of the newest file.
        max_bytes: of one file.
        keep: older files kept.
    """

    def __init__(self, path: Path, *, max_bytes: int = 64 * 2**20, keep: int = 3) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self.num_failed = 0

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; NaN and infinity become null."""
        line = json.dumps(finite(record), separators=(",", ":")) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size + len(line) > self._max_bytes:
                self._rotate()
            with self._path.open("a", encoding="utf-8") as log:
                log.write(line)
        except OSError:
            self.num_failed += 1

    def _rotate(self) -> None:
        names = [self._path, *(Path(f"{self._path}.{k}") for k in range(1, self._keep + 1))]
        for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
            if newer.exists():
                newer.replace(older)


def finite(value: Any) -> Any:
    """The same, with numbers that JSON does not have replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
