"""What trackers are shown of a benchmark: the report's tables and figures, section by section, and plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from rl_autoscale.experiments.report import write_report
from rl_autoscale.experiments.rows import ROWS_FILE, Row
from rl_autoscale.experiments.showings import benchmark_job, benchmark_showing, training_job
from rl_autoscale.experiments.train_config import TrainConfig

MakeRows = Callable[..., list[Row]]


def test_a_benchmark_shows_its_tables_figures_and_numbers(make_rows: MakeRows, tmp_path: Path) -> None:
    scales = {"learned": 0.9, "hpa": 1.0, "oracle": 0.7}
    rows = [*make_rows(scales, scenario="made-up"), *make_rows(scales, scenario="up")]
    rows += [row for row in make_rows({"keda": 1.0}, scenario="up") if row.slo_attainment < 0.95]
    (tmp_path / ROWS_FILE).write_text("".join(row.to_json() + "\n" for row in rows))
    report = write_report(tmp_path)
    showing = benchmark_showing(tmp_path, report)
    assert {"made_up/front", "up/front", "suite/suite_front", "suite/suite_profiles"} == set(showing.figures)
    assert showing.figures["up/front"] == tmp_path / "front-up.png"
    hours = showing.sheets["made_up/GPU_hours_at_equal_attainment"]
    assert hours.columns[:2] == ("policy", "refusal")
    assert {row[0] for row in hours.rows} == {"learned", "hpa", "oracle"}
    assert any(name.startswith("suite/") for name in showing.sheets)
    numbers = showing.sheets["numbers/gpu_hours"]
    last = next(row for row in numbers.rows if row[:2] == ("up", "keda") and row[3] == 0.99)
    assert last[4:7] == (None, None, None)  # not reached
    assert all(isinstance(row[4], float | None) for row in numbers.rows)
    fronts = showing.sheets["numbers/fronts"]
    assert len(fronts.rows) == 2 * 3 * 4 + 2
    assert all(math.isfinite(value) for row in fronts.rows for value in row[4:] if isinstance(value, float))
    assert showing.numbers["made_up/gpu_hours_95_over_best_rule"] == pytest.approx(0.9, rel=0.01)
    assert showing.page == report.html
    assert {path.name for path in showing.files} == {"rows.jsonl", "tables.csv"}
    assert benchmark_job(tmp_path, report).tags == ("made-up", "up")


def test_one_scenario_has_no_suite(make_rows: MakeRows, tmp_path: Path) -> None:
    (tmp_path / ROWS_FILE).write_text("".join(row.to_json() + "\n" for row in make_rows({"learned": 0.9, "hpa": 1.0})))
    showing = benchmark_showing(tmp_path, write_report(tmp_path))
    assert {name.split("/")[0] for name in (*showing.sheets, *showing.figures)} == {"made_up", "numbers"}


def test_seeds_of_a_training_are_a_group(tmp_path: Path) -> None:
    config = TrainConfig(scenarios=("bursty", "fleets/mine.yaml"))
    job = training_job(config, tmp_path / "five" / "seed-3")
    assert (job.kind, job.name, job.group, job.tags) == ("train", "five/seed-3", "five", ("bursty", "mine"))
    assert job.config["ppo"]["seed"] == config.ppo.seed
    assert training_job(config).group is None
