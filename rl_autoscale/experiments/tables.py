"""Findings as tables: one plain form that the terminal, markdown, HTML, CSV and JSON all print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl_autoscale.experiments.analysis import USAGE_TARGET, Entry, Findings
from rl_autoscale.experiments.statistics import Estimate

NOT_REACHED = "not reached"


@dataclass(frozen=True, slots=True)
class Cell:
    """Text and how to show it."""

    text: str
    strong: bool = False
    tone: str = ""
    """``win``, ``loss`` or nothing."""
    short: str = ""
    """What a terminal shows instead: no interval."""


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table; the first ``num_text`` columns are text, the others numbers."""

    title: str
    note: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    num_text: int = 2
    interval_note: str = ""

    @property
    def full_note(self) -> str:
        """The note where intervals are shown."""
        return f"{self.note} {self.interval_note}".strip()

    def markdown(self) -> str:
        """As a GitHub table."""
        rule = ["---"] * self.num_text + ["---:"] * (len(self.headings) - self.num_text)
        lines = [self.headings, rule, *([_bold(cell) for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def hours_table(findings: Findings) -> Table:
    """GPU-hours at equal attainment of every policy, the cheapest rule of each column in bold."""
    best = [findings.cheapest_rule(k) for k in range(len(findings.targets))]
    rows = [
        (
            Cell(item.policy),
            Cell(item.refusal),
            *(
                Cell(
                    interval(estimate),
                    strong=best[k] is item,
                    short=f"{estimate.value:.2f}" if estimate.reached else "",
                )
                for k, estimate in enumerate(item.hours)
            ),
            Cell("-" if not item.hypervolume.reached else f"{item.hypervolume.value:.3f}"),
        )
        for item in sorted(findings.entries, key=_order)
    ]
    reference = findings.reference
    corner = (
        "no rule reaches 95 %" if reference is None else f"reference {reference[0]:.0%}, {reference[1]:.1f} GPU-hours"
    )
    return Table(
        "GPU-hours at equal attainment",
        f"Bold: the cheapest rule. Hypervolume: {corner}.",
        ("policy", "refusal", *(f"{target:.0%}" for target in findings.targets), "hypervolume"),
        tuple(rows),
        interval_note="In brackets: 95 % bootstrap intervals over seeds.",
    )


def comparison_table(findings: Findings) -> Table | None:
    """The focal policy against all others: what it saves or costs, with paired intervals; losses in bold."""
    focal = findings.focal
    if focal is None:
        return None
    rows = []
    for item in sorted(findings.comparisons, key=lambda item: _order(item.other)):
        cells = []
        for k, ratio in enumerate(item.ratios):
            verdict = item.verdict(k)
            tone = {"wins": "win", "loses": "loss"}.get(verdict, "")
            short = f"{ratio.value - 1:+.1%}" if ratio.reached else NOT_REACHED
            cells.append(Cell(change(ratio, focal, item.other, k), strong=verdict == "loses", tone=tone, short=short))
        rows.append((Cell(item.other.policy), Cell(item.other.refusal), *cells))
    closed = [Cell("-" if np.isnan(share) else f"{share:+.0%}", strong=share < 0) for share in findings.gap_closed]
    rows.append((Cell("gap to oracle closed"), Cell(""), *closed))
    return Table(
        f"{focal.policy} (refusal {focal.refusal}) against each policy",
        "Change in GPU-hours at equal attainment, negative is cheaper. Bold: it loses. Last row: share of the way from "
        "the cheapest rule to the clairvoyant plan.",
        ("against", "refusal", *(f"{target:.0%}" for target in findings.targets)),
        tuple(rows),
        interval_note="In brackets: paired 95 % bootstrap intervals.",
    )


def deployment_table(findings: Findings) -> Table | None:
    """What was asked of policies that saw training traffic only, and what they delivered on the test traffic."""
    rows = [
        (
            Cell(item.policy),
            Cell(item.refusal),
            Cell(f"{item.asked_attainment:.1%}"),
            Cell(f"{item.attainment:.2%}", strong=item.attainment < item.asked_attainment),
            Cell(f"{item.worst_attainment:.2%}"),
            Cell(f"{item.gpu_hours:.1f}"),
            Cell("-" if np.isnan(item.over_hindsight) else f"{item.over_hindsight:.2f} ×"),
        )
        for item in findings.deployed
    ]
    if not rows:
        return None
    return Table(
        "Deployed: asked and delivered",
        "Constants fixed on training or validation traffic before the test traffic was seen; policies that can be "
        "asked for an attainment turn their own knob by the misses they see. Bold: it delivered less than was asked. "
        "Last column: GPU-hours over what the cheapest rule, its knob chosen in hindsight, needs for the attainment "
        "delivered.",
        ("policy", "refusal", "asked", "delivered", "worst seed", "GPU-hours", "over hindsight"),
        tuple(rows),
    )


def usage_table(findings: Findings) -> Table | None:
    """How each policy used the fleet, all at (nearly) one attainment; None where no episode was measured for it."""
    measured = [item for item in findings.used if not np.isnan(item.metrics["gpu_utilisation"])]
    if not measured:
        return None
    rows = []
    for item in sorted(measured, key=lambda item: (item.policy, item.refusal == "on")):
        metrics = item.metrics
        actions = metrics["scale_ups"] + metrics["scale_downs"]
        shares = [f"{metrics[name]:.0%}" for name in ("gpu_utilisation", "gpu_efficiency")]
        gaps = [f"{metrics[name]:.2f} ×" for name in ("over_provisioned", "under_provisioned")]
        service = [f"{metrics['qoe']:.3f}", f"{metrics['hol_blocking_s']:.3f}"]
        counts = [f"{actions:.0f}", f"{metrics['reversals']:.0f}"]
        texts = (item.policy, item.refusal, f"{item.attainment:.1%}", *shares, *gaps, *service, *counts)
        rows.append(tuple(Cell(text.replace("nan", "-")) for text in texts))
    return Table(
        f"How the fleet was used at {USAGE_TARGET:.0%}",
        "Each policy at its cheapest knob value that delivers it, else its best. Used: share of rented GPU time with "
        "an iteration running; filled: what the work takes in full batches. Over and under: GPUs held beyond and short "
        "of that work, over it. QoE and blocking: of the worst class. All are defined in docs/metrics.md.",
        (
            "policy",
            "refusal",
            "delivered",
            "used",
            "filled",
            "over",
            "under",
            "QoE",
            "blocked s",
            "changes",
            "reversals",
        ),
        tuple(rows),
    )


def all_tables(findings: Findings) -> list[Table]:
    """Every table there is something for."""
    tables = (hours_table(findings), comparison_table(findings), deployment_table(findings), usage_table(findings))
    return [table for table in tables if table is not None]


def point(estimate: Estimate) -> str:
    """``12.30``, without its interval."""
    return f"{estimate.value:.2f}" if estimate.reached else NOT_REACHED


def interval(estimate: Estimate) -> str:
    """``12.3 [11.9, 12.8]``; an open upper end reads ∞."""
    if not estimate.reached:
        return NOT_REACHED
    if np.isnan(estimate.low):
        return f"{estimate.value:.2f}"
    high = "∞" if np.isinf(estimate.high) else f"{estimate.high:.2f}"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {high}]"


def change(ratio: Estimate, focal: Entry, other: Entry, k: int) -> str:
    """``-12 % [-15, -9]``, or who did not reach the target."""
    if not ratio.reached:
        missing = [item.policy for item in (focal, other) if not item.hours[k].reached]
        return f"{' and '.join(missing)}: {NOT_REACHED}"
    if np.isnan(ratio.low):
        return f"{ratio.value - 1:+.1%}"
    high = "∞" if np.isinf(ratio.high) else f"{ratio.high - 1:+.1%}"
    return f"{ratio.value - 1:+.1%} [{ratio.low - 1:+.1%}, {high}]"


def verdicts(findings: Sequence[Findings]) -> tuple[int, int, int]:
    """(wins, losses, ties) of the focal policies against rules, over scenarios, rules and targets."""
    found = [
        item.verdict(k)
        for one in findings
        for item in one.comparisons
        if item.other.is_rule
        for k in range(len(one.targets))
    ]
    return found.count("wins"), found.count("loses"), found.count("tie")


def _order(item: Entry) -> tuple[bool, str, bool]:
    """Learned and rules by name, then the clairvoyant plan; refusal on after off."""
    return item.registered == "oracle", item.policy, item.refusal == "on"


def _bold(cell: Cell) -> str:
    text = cell.text.replace("|", "\\|")
    return f"**{text}**" if cell.strong and text else text
