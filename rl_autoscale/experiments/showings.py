"""What a finished benchmark or training shows in a tracker: the report's tables and figures, and the same as numbers.

Sections are ``suite`` (all scenarios together), each scenario by its name, and ``numbers``, whose tables hold plain
numbers, for charts of one's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from rl_autoscale.experiments.analysis import Findings
from rl_autoscale.experiments.learning_curves import Curves, curve_table
from rl_autoscale.experiments.report import Report
from rl_autoscale.experiments.report_data import HOURS_COLUMNS, hours_rows
from rl_autoscale.experiments.tables import Table, all_tables
from rl_autoscale.experiments.tracking import Job, Sheet, Showing
from rl_autoscale.experiments.train_config import TrainConfig

KEPT_OF_BENCHMARK = ("config.yaml", "rows.jsonl", "run.json", "workloads.json", "tuning.json", "tables.csv")
FRONT_COLUMNS = ("scenario", "policy", "refusal", "knob", "knob_value", "tuned_for", "slo_attainment", "gpu_hours")


def benchmark_showing(folder: Path, report: Report) -> Showing:
    """Of a benchmark whose report has been written."""
    sheets = _sheets("suite", report.suite_tables)
    for one in report.findings:
        sheets |= _sheets(one.scenario, all_tables(one))
    sheets["numbers/gpu_hours"] = Sheet(HOURS_COLUMNS, tuple(map(_without_nan, hours_rows(report.findings))))
    sheets["numbers/fronts"] = Sheet(FRONT_COLUMNS, tuple(_front_rows(report.findings)))
    return Showing(
        "benchmark",
        focal_numbers(report.findings),
        sheets,
        _figures(report),
        report.html,
        tuple(path for name in KEPT_OF_BENCHMARK if (path := folder / name).exists()),
    )


def benchmark_job(folder: Path, report: Report) -> Job:
    """Its configuration and its scenarios."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return Job("benchmark", tags=tuple(one.scenario for one in report.findings), config=config)


def training_job(config: TrainConfig, seed_folder: Path | None = None) -> Job:
    """A training's configuration and scenarios.

    Args:
        config: resolved.
        seed_folder: of one seed among several: they are a group, named as the folder they lie in.
    """
    tags, settings = tuple(Path(name).stem for name in config.scenarios), config.model_dump(mode="json")
    if seed_folder is None:
        return Job("train", tags=tags, config=settings)
    group = seed_folder.parent.name
    return Job("train", f"{group}/{seed_folder.name}", group, tags, settings)


def policy_showing(policy: Path) -> Showing:
    """An exported policy's files, to be kept with the run that made it."""
    return Showing("policy", files=_files(policy))


def curves_job(folder: Path) -> Job:
    """The report of a training, or of the seeds of one, among whose runs it is shown."""
    return Job("train", group=folder.name)


def curves_showing(folder: Path, curves: Curves, paths: Sequence[Path]) -> Showing:
    """How a training or its seeds ended, the learning curve, and the policy or the seeds' mean.

    Args:
        folder: of the training, or of its seeds.
        curves: of it.
        paths: what `write_curves` wrote.
    """
    figures = {f"curves/{path.stem}": path for path in paths if path.suffix == ".png"}
    policies = [path for path in (folder / "mean" / "policy", folder / "policy") if path.is_dir()]
    files = _files(policies[0]) if policies else ()
    return Showing("policy", sheets=_sheets("curves", [curve_table(curves)]), figures=figures, files=files)


def focal_numbers(findings: Sequence[Findings]) -> dict[str, float]:
    """GPU-hours of each scenario's focal policy, and over those of the cheapest rule; ``scenario/gpu_hours_98``."""
    numbers: dict[str, float] = {}
    for one in findings:
        if one.focal is None:
            continue
        for k, target in enumerate(one.targets):
            hours = one.focal.hours[k].value
            best = one.cheapest_rule(k)
            name = f"{_plain(one.scenario)}/gpu_hours_{100 * target:g}"
            numbers[name] = hours
            if best is not None and best is not one.focal:
                numbers[f"{name}_over_best_rule"] = hours / best.hours[k].value
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _sheets(section: str, tables: Sequence[Table]) -> dict[str, Sheet]:
    return {
        f"{_plain(section)}/{_plain(table.title)}": Sheet(
            table.headings, tuple(tuple(cell.text for cell in row) for row in table.rows)
        )
        for table in tables
    }


def _front_rows(findings: Sequence[Findings]) -> list[tuple[str | float | None, ...]]:
    return [
        (one.scenario, item.policy, item.refusal, item.knob, value, tuned_for, attainment, hours)
        for one in findings
        for item in one.entries
        for (tuned_for, value), attainment, hours in zip(
            item.settings, *(x.tolist() for x in item.sweep.mean()), strict=True
        )
    ]


def _figures(report: Report) -> Mapping[str, Path]:
    """``front-azure-code.png`` is that scenario's; what belongs to none is the suite's."""
    figures = {}
    for path in report.figures:
        of = [one.scenario for one in report.findings if path.stem.endswith(f"-{one.scenario}")]
        scenario = max(of, key=len, default=None)
        stem = path.stem if scenario is None else path.stem.removesuffix(f"-{scenario}")
        figures[f"{_plain(scenario or 'suite')}/{_plain(stem)}"] = path
    return figures


def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if path.is_file()))


def _without_nan(row: Sequence[str | float]) -> tuple[str | float | None, ...]:
    return tuple(None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row)


def _plain(text: str) -> str:
    """For a panel's name: letters, digits and underscores."""
    return re.sub(r"\W+", "_", text).strip("_")
