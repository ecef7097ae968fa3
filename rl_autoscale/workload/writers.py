"""`write_trace`: a workload to our own CSV or parquet, all of it or nothing."""

from __future__ import annotations

import csv
import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.parquet_io import write_parquet
from rl_autoscale.workload.trace import NO_SESSION, Workload


def write_trace(workload: Workload, path: Path) -> tuple[str, ...]:
    """Write a workload; the ending chooses the form. The file appears complete or not at all.

    Returns:
        Notes on what the form cannot hold.

    Raises:
        SpecError: for an ending other than .csv or .parquet, or a folder that does not exist.
        MissingExtraError: for parquet without pyarrow.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise SpecError(f"{path}: cannot write '{path.suffix}'; end the name in .csv or .parquet")
    with atomic_path(path) as partial:
        if path.suffix == ".parquet":
            write_parquet(workload, partial)
            return ()
        _write_csv(workload, partial)
    return (f"{path.name}: a CSV keeps no span (parquet does); readers take the last arrival plus one mean gap",)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it there on success, remove it on any error."""
    if not path.parent.is_dir():
        raise SpecError(f"{path}: the folder {path.parent} does not exist; create it first")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)  # mkstemp makes private files; a result is an ordinary one
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_csv(workload: Workload, path: Path) -> None:
    header = ["arrival_s", "prompt_tokens", "output_tokens", "class"]
    columns: list[list[object]] = [
        workload.arrival_s.tolist(),
        workload.prompt_tokens.tolist(),
        workload.output_tokens.tolist(),
        [workload.class_names[index] for index in workload.class_index.tolist()],
    ]
    if workload.session is not None:
        header.append("session")
        columns.append(["" if session == NO_SESSION else session for session in workload.session.tolist()])
    if workload.hash_offsets is not None and workload.hash_ids is not None:
        header.append("hash_ids")
        ids, bounds = workload.hash_ids.tolist(), workload.hash_offsets.tolist()
        columns.append([" ".join(map(str, ids[a:b])) for a, b in itertools.pairwise(bounds)])
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(zip(*columns, strict=True))
