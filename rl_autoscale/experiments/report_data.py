"""A benchmark's findings for machines: ``tables.json``, ``tables.csv``, ``suite.json``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from rl_autoscale.experiments.analysis import Findings
from rl_autoscale.experiments.tables import Table


def as_data(findings: Sequence[Findings]) -> list[dict[str, Any]]:
    """The findings as plain data; null where there is no number."""

    def number(value: float) -> float | None:
        return value if abs(value) < float("inf") else None

    return [
        {
            "scenario": one.scenario,
            "seeds": list(one.seeds),
            "policies": [
                {
                    "policy": item.policy,
                    "refusal": item.refusal,
                    "gpu_hours": {
                        f"{target:g}": {"value": number(e.value), "low": number(e.low), "high": number(e.high)}
                        for target, e in zip(one.targets, item.hours, strict=True)
                    },
                    "hypervolume": number(item.hypervolume.value),
                    "front": [
                        {item.knob or "knob": value, "tuned_for": tuned_for, "slo_attainment": a, "gpu_hours": h}
                        for (tuned_for, value), a, h in zip(
                            item.settings, *(x.tolist() for x in item.sweep.mean()), strict=True
                        )
                    ],
                }
                for item in one.entries
            ],
            "focal": None if one.focal is None else {"policy": one.focal.policy, "refusal": one.focal.refusal},
            "comparisons": [
                {
                    "against": item.other.policy,
                    "refusal": item.other.refusal,
                    "ratio": {
                        f"{target:g}": {"value": number(e.value), "low": number(e.low), "high": number(e.high)}
                        | {"verdict": item.verdict(k)}
                        for k, (target, e) in enumerate(zip(one.targets, item.ratios, strict=True))
                    },
                }
                for item in one.comparisons
            ],
        }
        for one in findings
    ]


HOURS_COLUMNS = ("scenario", "policy", "refusal", "attainment", "gpu_hours", "low", "high", "num_seeds")


def hours_rows(findings: Sequence[Findings]) -> list[tuple[str | float, ...]]:
    """GPU-hours at equal attainment, one row per scenario, policy, refusal and target; infinite where not reached."""
    return [
        (one.scenario, item.policy, item.refusal, target, e.value, e.low, e.high, len(one.seeds))
        for one in findings
        for item in one.entries
        for target, e in zip(one.targets, item.hours, strict=True)
    ]


def render_csv(findings: Sequence[Findings]) -> str:
    """`hours_rows` as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HOURS_COLUMNS)
    for *labels, target, value, low, high, num_seeds in hours_rows(findings):
        writer.writerow((*labels, target, *(f"{number:.6g}" for number in (value, low, high)), num_seeds))
    return text.getvalue()


def plain(table: Table) -> dict[str, Any]:
    """A table as plain data: one record per row, as shown."""
    rows = [dict(zip(table.headings, (cell.text for cell in row), strict=True)) for row in table.rows]
    return {"title": table.title, "note": table.full_note, "rows": rows}
