"""Rows survive a crash, a change of configuration and numbers that are not finite."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rl_autoscale.experiments.rows import ROWS_FILE, Row, RowStore, read_rows
from rl_autoscale.fleet.errors import SpecError


def row(key: str, attainment: float = 0.9) -> Row:
    return Row(
        key, "tiny", "hpa", "hpa", "target", 40.0, "off", 0, 1.5, attainment,
        knobs={"admission": math.inf}, metrics={"ttft_p99_s/chat": math.nan},
    )  # fmt: skip


def test_a_row_round_trips_as_strict_json() -> None:
    back = Row.from_json(row("a").to_json())
    assert (back.key, back.gpu_hours, back.knob_value) == ("a", 1.5, 40.0)
    assert math.isnan(back.metrics["ttft_p99_s/chat"])
    assert back.knobs == {"admission": "inf"}
    assert math.isnan(Row.from_json(row("a", math.nan).to_json()).slo_attainment)


def test_a_last_line_cut_short_is_left_out_but_any_other_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / ROWS_FILE
    whole = row("a").to_json() + "\n" + row("b").to_json() + "\n"
    path.write_text(whole[:-20])
    assert [item.key for item in read_rows(path)] == ["a"]
    path.write_text(whole[:5] + "\n" + whole)
    with pytest.raises(SpecError, match=r"rows\.jsonl:1: not a benchmark row"):
        read_rows(path)
    assert read_rows(tmp_path / "none.jsonl") == []


def test_appending_after_a_crash_does_not_glue_lines_together(tmp_path: Path) -> None:
    (tmp_path / ROWS_FILE).write_text(row("a").to_json() + "\n" + row("b").to_json()[:30])
    store = RowStore(tmp_path, ["a", "b"])
    assert set(store.rows) == {"a"}
    store.append(row("b"))
    assert [item.key for item in read_rows(tmp_path / ROWS_FILE)] == ["a", "b"]


def test_rows_nobody_asks_for_step_aside_and_come_back(tmp_path: Path) -> None:
    first = RowStore(tmp_path, ["a", "b"])
    first.append(row("a"))
    first.append(row("b"))
    second = RowStore(tmp_path, ["b", "c"])
    assert set(second.rows) == {"b"}
    assert [item.key for item in read_rows(tmp_path / ROWS_FILE)] == ["b"]
    second.take_back(["a", "z"])
    assert set(second.rows) == {"a", "b"}
    assert set(RowStore(tmp_path, ["a", "b"]).rows) == {"a", "b"}
