"""Our own parquet: ``arrival_s, prompt_tokens, output_tokens[, class, session, hash_ids]``, the span as metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.errors import MissingExtraError, TraceError
from rl_autoscale.workload.raw import Labels, RawColumns
from rl_autoscale.workload.trace import NO_SESSION, FloatArray, Workload

_METADATA_KEY = b"rl_autoscale"
_REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
_OPTIONAL = ("class", "session", "hash_ids")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("reading and writing parquet", "parquet") from None
    return pyarrow


def read_parquet(path: Path) -> tuple[RawColumns, dict[str, Any]]:
    """Read our own parquet.

    Returns:
        The columns, and the metadata `write_parquet` left (empty for a file another program wrote).

    Raises:
        MissingExtraError: without pyarrow.
        TraceError: when the file is no parquet or lacks a required column.
    """
    arrow = _pyarrow()
    try:
        schema = arrow.parquet.read_schema(path)
        missing = [name for name in _REQUIRED if name not in schema.names]
        if missing:
            raise TraceError(f"{path}: no column {', '.join(missing)}; the file has {', '.join(schema.names)}")
        used = [*_REQUIRED, *(name for name in _OPTIONAL if name in schema.names)]
        table = arrow.parquet.read_table(path, columns=used)
        metadata = json.loads((schema.metadata or {}).get(_METADATA_KEY, b"{}"))
    except TraceError:
        raise
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise TraceError(f"{path}: cannot be read as parquet ({error})") from None
    counts, ids = _hashes(table)
    labels, sessions = Labels(), Labels(missing=NO_SESSION)
    columns = RawColumns(
        arrival_s=_numbers(path, table, "arrival_s"),
        prompt_tokens=_numbers(path, table, "prompt_tokens"),
        output_tokens=_numbers(path, table, "output_tokens"),
        class_code=_codes(table, "class", labels),
        class_labels=labels.names,
        session=_codes(table, "session", sessions),
        hash_counts=counts,
        hash_ids=ids,
        unused=tuple(name for name in schema.names if name not in used),
    )
    return columns, metadata


def _numbers(path: Path, table: Any, name: str) -> FloatArray:
    column = table[name]
    if not (_pyarrow().types.is_integer(column.type) or _pyarrow().types.is_floating(column.type)):
        raise TraceError(f"{path}: column {name} holds {column.type}; numbers are needed")
    return np.asarray(column.cast("float64").to_numpy(), dtype=np.float64)  # a null becomes NaN, which is a bad row


def _codes(table: Any, name: str, labels: Labels) -> npt.NDArray[np.int32] | None:
    """Labels, or numbers taken as labels, in order of first appearance."""
    if name not in table.column_names:
        return None
    arrow = _pyarrow()
    # numbers that are null and empty text both mean "none"
    column = table[name].cast(arrow.string()).combine_chunks().fill_null("").dictionary_encode()
    numbers = np.array(
        [labels.code("" if label == str(NO_SESSION) else label) for label in column.dictionary.to_pylist()]
    )
    codes = np.asarray(column.indices.to_numpy(zero_copy_only=False))
    return numbers[codes].astype(np.int32) if codes.size else np.empty(0, dtype=np.int32)


def _hashes(table: Any) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64] | None]:
    if "hash_ids" not in table.column_names:
        return None, None
    arrow = _pyarrow()
    column = table["hash_ids"].combine_chunks()
    counts = arrow.compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    ids = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(counts, dtype=np.int64), np.asarray(ids, dtype=np.int64)


def write_parquet(workload: Workload, path: Path) -> None:
    """Write all of a workload; `read_parquet` gives the same back. Raises MissingExtraError without pyarrow."""
    arrow = _pyarrow()
    columns: dict[str, Any] = {
        "arrival_s": workload.arrival_s,
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": workload.output_tokens,
        "class": arrow.DictionaryArray.from_arrays(workload.class_index, list(workload.class_names)),
    }
    if workload.session is not None:
        columns["session"] = workload.session
    if workload.hash_offsets is not None:
        columns["hash_ids"] = arrow.LargeListArray.from_arrays(workload.hash_offsets, workload.hash_ids)
    metadata = {
        "span_s": workload.span_s,
        "class_names": list(workload.class_names),
        "hash_block_tokens": workload.hash_block_tokens,
    }
    table = arrow.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata).encode()})
    arrow.parquet.write_table(table, path, compression="zstd")
