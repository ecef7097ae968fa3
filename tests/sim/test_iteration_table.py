"""The table of iterations: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.sim.iteration_table import REQUIRED_COLUMNS, read_table, table_from_columns

ROWS = {
    "prefill_chunk_tokens": [0, 512, 256],
    "prefill_kv_context": [0, 0, 1024],
    "decode_batch_size": [8, 0, 16],
    "mean_decode_context": [1000, 0, 500],
    "iter_time_ms": [10.0, 30.0, 25.0],
}


def columns(**changes: list[float]) -> dict[str, list[float]]:
    return {**ROWS, **changes}


def test_rows_are_sorted_into_regions_and_counted() -> None:
    table = table_from_columns(columns(), where="here")
    assert [table.region(name).tolist() for name in ("decode", "prefill", "mixed")] == np.eye(3, dtype=bool).tolist()
    np.testing.assert_allclose(table.new_tokens, [8, 512, 272])
    np.testing.assert_allclose(table.kv_tokens, [8000, 512, 1280 + 8000])
    np.testing.assert_allclose(table.iteration_s, [0.010, 0.030, 0.025])


def test_attention_features_follow_the_profile_formula() -> None:
    table = table_from_columns(columns(prefill_chunks=[0, 1, 2]), where="here")
    mixed = [16 * 500, 16, 2 * 256 * (1024 + 128), 2 * 1024, 2, 16 * 500, 16]
    np.testing.assert_allclose(table.attention_features[2], mixed)
    assert not table.attention_features[:2, 5:].any()
    np.testing.assert_allclose(table.new_tokens[2], 2 * 256 + 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iter_time_ms": [10.0, -1.0, 5.0]}, r"row 1: iter_time_ms=-1; it must be finite and > 0"),
        ({"iter_time_ms": [10.0, 1.0, float("nan")]}, r"row 2: iter_time_ms=nan"),
        ({"decode_batch_size": [8, 0, -2]}, r"row 2: decode_batch_size=-2; it must be finite and >= 0"),
        ({"decode_batch_size": [0, 0, 1]}, r"row 0: neither prefill_chunk_tokens nor decode_batch_size is positive"),
        ({"prefill_chunks": [0, 0, 1]}, r"row 1: prefill_chunks must be >= 1"),
        ({"iter_time_ms": ["fast", 1.0, 1.0]}, r"columns must be numbers"),
    ],
)
def test_impossible_rows_are_named(changes: dict[str, list[float]], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        table_from_columns(columns(**changes), where="here")


def test_a_missing_column_is_named_with_the_nearest_one() -> None:
    wrong = {name.replace("iter_time_ms", "iteration_time_ms"): values for name, values in ROWS.items()}
    with pytest.raises(SpecError, match=r"no column 'iter_time_ms'; did you mean 'iteration_time_ms'\?"):
        table_from_columns(wrong, where="here")


def write_csv(path: Path, models: tuple[str, ...] = ("a", "a", "b")) -> Path:
    lines = [",".join((*REQUIRED_COLUMNS, "model"))]
    lines += [",".join(str(ROWS[name][row]) for name in REQUIRED_COLUMNS) + f",{models[row]}" for row in range(3)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_csv_rows_are_selected_by_the_columns_it_has(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "times.csv")
    assert len(read_table(path, where={"model": "a", "tp": 4})) == 2  # no tp column: nothing to select
    with pytest.raises(SpecError, match=r"no row left with model=c; choose one model of: a, b"):
        read_table(path, where={"model": "c"})
    with pytest.raises(SpecError, match=r"rows of several; choose one model of: a, b"):
        read_table(path, where={"model": None})
    assert len(read_table(write_csv(tmp_path / "one.csv", ("a", "a", "a")), where={"model": None})) == 3


def test_parquet_is_read_like_csv(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(ROWS), tmp_path / "times.parquet")
    csv_table, parquet_table = read_table(write_csv(tmp_path / "times.csv")), read_table(tmp_path / "times.parquet")
    np.testing.assert_allclose(parquet_table.attention_features, csv_table.attention_features)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "no such file"),
        ("times.json", "{}", r"got '.json'; a table is a .parquet or .csv file"),
        ("times.parquet", "not parquet", "not a parquet file"),
        ("empty.csv", "", "no rows"),
        ("header.csv", ",".join(REQUIRED_COLUMNS) + "\n", "no rows"),
        ("ragged.csv", ",".join(REQUIRED_COLUMNS) + "\n1,2\n", "line 2 has 2 values, the header 5"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(SpecError, match=message):
        read_table(tmp_path / name)
