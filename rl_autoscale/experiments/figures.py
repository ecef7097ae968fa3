"""The report's figures: a cost/attainment front per scenario, and a time line of two policies on one seed.

Colours are Okabe and Ito's, which stay apart for every kind of colour vision; lines carry their names, and rules,
learned and clairvoyant policies differ in line style too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rl_autoscale.experiments.analysis import CLAIRVOYANT, LEARNED, Entry, Findings
from rl_autoscale.experiments.statistics import FloatArray, front_indices

INK, FAINT, GRID = "#222222", "#6b6b6b", "#e6e6e6"
COLOURS = {
    "learned": "#D55E00",
    "chiron": "#0072B2",
    "hpa": "#009E73",
    "headroom": "#CC79A7",
    "static": "#8c8c8c",
    "oracle": "#222222",
}
OTHER_COLOURS = ("#56B4E9", "#E69F00", "#7b5ea7", "#a65628")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "text.color": INK, "xtick.color": FAINT,
    "ytick.color": FAINT, "xtick.major.size": 3, "ytick.major.size": 3, "figure.dpi": 110, "savefig.dpi": 160,
}  # fmt: skip
ATTAINMENT_TICKS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


@dataclass(frozen=True, slots=True)
class Timeline:
    """One policy's episode as the time line shows it.

    Attributes:
        title: policy and knob.
        columns: `EpisodeResult.timeline`.
        control_interval_s: length of a step.
        gpu_hours: of the episode.
        slo_attainment: of the episode.
    """

    title: str
    columns: Mapping[str, FloatArray]
    control_interval_s: float
    gpu_hours: float
    slo_attainment: float


def colour_of(policy: str, others: Sequence[str] = ()) -> str:
    """A policy's colour: its family's, or one of the spare ones by its place among the others."""
    for family, colour in COLOURS.items():
        if policy.startswith(family):
            return colour
    return OTHER_COLOURS[list(others).index(policy) % len(OTHER_COLOURS)] if policy in others else OTHER_COLOURS[0]


def draw_front(findings: Findings, path: Path) -> None:
    """Attainment over GPU-hours, early refusal off and on side by side, with intervals at the targets.

    Args:
        findings: of one scenario.
        path: a PNG to write.
    """
    shown = [refusal for refusal in ("off", "on") if any(item.refusal == refusal for item in findings.entries)]
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4 * len(shown), 4.5), layout="constrained")
        axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)
        span = _hours_span(findings)
        for axis, refusal in zip(axes[0], shown, strict=True):
            _front_panel(axis, [item for item in findings.entries if item.refusal == refusal], findings, span)
            axis.set_title("no early refusal" if refusal == "off" else "the gateway refuses what would miss its TTFT")
        axes[0, 0].set_ylabel("SLO attainment, share of arrived requests")
        save(figure, path)


def draw_timeline(left: Timeline, right: Timeline, path: Path) -> None:
    """Load, replicas, queue and misses of two policies on the same traffic, on the same scales.

    Args:
        left: one policy.
        right: the other.
        path: a PNG to write.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(11.0, 7.6), layout="constrained")
        axes = figure.subplots(4, 2, sharex=True, sharey="row", height_ratios=(1.0, 1.9, 1.0, 1.0))
        for column, timeline in enumerate((left, right)):
            _timeline_column(axes[:, column], timeline, labelled=column == 0)
        for axis, label in zip(axes[:, 0], ("requests/s", "replicas", "queued\nrequests", "misses/s"), strict=True):
            axis.set_ylabel(label)
        for axis in axes.flat:
            axis.set_ylim(bottom=0)  # after both columns are drawn: the scale is shared
        for axis in axes[-1]:
            axis.set_xlabel("minutes")
        save(figure, path)


def scaled(attainment: FloatArray | float) -> FloatArray:
    """Each halving of the misses is the same height."""
    return np.asarray(-np.log10(np.maximum(1.0 - np.asarray(attainment), 1e-4)))


def _hours_span(findings: Findings) -> tuple[float, float]:
    """The part of the axis where adaptive policies are between 85 % and their best."""
    hours = []
    for item in findings.entries:
        attainment, cost = item.sweep.mean()
        front = front_indices(attainment, cost)
        hours += [float(h) for a, h in zip(attainment[front], cost[front], strict=True) if a >= 0.8]
    if not hours:
        return 0.0, 1.0
    cheapest = min(hours)
    return 0.0 if cheapest < 0.2 * max(hours) else 0.9 * cheapest, min(max(hours), 2.4 * cheapest) * 1.02


def _front_panel(axis: Axes, entries: Sequence[Entry], findings: Findings, span: tuple[float, float]) -> None:
    names = [item.policy for item in entries if item.policy.split("-")[0] not in COLOURS]
    labels: list[tuple[float, float, str, str]] = []
    for item in entries:
        attainment, hours = item.sweep.mean()
        front = front_indices(attainment, hours)
        colour = colour_of(item.registered if item.registered == LEARNED else item.policy, names)
        strong = item.registered == LEARNED
        axis.plot(
            *(hours[front], scaled(attainment[front])),
            color=colour, linewidth=2.4 if strong else 1.4, marker="o", markersize=4.5 if strong else 3,
            linestyle=_line_style(item), alpha=1.0 if strong else 0.9, zorder=5 if strong else 3,
        )  # fmt: skip
        for target, estimate in zip(findings.targets, item.hours, strict=True):
            if np.isfinite(estimate.low) and np.isfinite(estimate.high):
                axis.hlines(scaled(target), estimate.low, estimate.high, color=colour, linewidth=4.5, alpha=0.28)
        inside = front[(hours[front] >= span[0]) & (hours[front] <= span[1]) & (attainment[front] >= 0.78)]
        if len(inside):
            last = inside[-1]
            labels.append((float(hours[last]), float(scaled(attainment[last])), item.policy, colour))
    low, high = scaled(0.78), scaled(0.9992)
    axis.set(xlim=span, ylim=(low, high), xlabel="GPU-hours of the episode")
    axis.set_yticks(
        [float(scaled(tick)) for tick in ATTAINMENT_TICKS],
        [f"{tick:.1%}".replace(".0%", "%") for tick in ATTAINMENT_TICKS],
    )
    axis.grid(axis="y", color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    _place_labels(axis, labels, span)


def _line_style(item: Entry) -> Any:
    if item.registered == CLAIRVOYANT:
        return (0, (1, 1.5))
    if item.policy.endswith("-tuned") or item.registered == LEARNED:
        return "-"
    return (0, (4, 2)) if item.policy.endswith("-literal") else (0, (7, 2))


def _place_labels(axis: Axes, labels: list[tuple[float, float, str, str]], span: tuple[float, float]) -> None:
    """Names right of the panel, pushed apart, each tied to the end of its line."""
    low, high = axis.get_ylim()
    gap = (high - low) / 19.0
    labels.sort(key=lambda item: item[1])
    heights: list[float] = []
    for _, y, _, _ in labels:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    overshoot = heights[-1] - (high - gap / 2) if heights else 0.0
    for k in range(len(heights) - 1, -1, -1):  # push back down from the top
        ceiling = high - gap / 2 if k == len(heights) - 1 else heights[k + 1] - gap
        heights[k] = min(heights[k], ceiling) if overshoot > 0 else heights[k]
    edge = span[1] + (span[1] - span[0]) * 0.02
    for (x, y, name, colour), height in zip(labels, heights, strict=True):
        axis.annotate(
            name, (x, y), (edge, height), color=colour, fontsize=8.8, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.45, "shrinkB": 3},
        )  # fmt: skip


def _timeline_column(axes: Any, timeline: Timeline, *, labelled: bool) -> None:
    columns = timeline.columns
    minutes = np.asarray(columns["time_s"]) / 60.0
    ready, starting = columns["ready"].sum(axis=1), columns["starting"].sum(axis=1)
    # the first observation has no window behind it
    arrivals = np.nan_to_num(columns["arrivals_per_s"]).sum(axis=1)
    axes[0].set_title(f"{timeline.title}\n{timeline.slo_attainment:.2%} at {timeline.gpu_hours:.1f} GPU-hours")
    axes[0].fill_between(minutes[1:], arrivals[1:], color="#c9d6df", step="pre", linewidth=0)
    axes[0].plot(minutes[1:], arrivals[1:], color="#5b7486", linewidth=0.9, drawstyle="steps-pre")
    axes[1].fill_between(minutes, ready, color="#0072B2", alpha=0.45, step="post", linewidth=0, label="ready")
    axes[1].fill_between(
        minutes, ready, ready + starting, color="#E69F00", alpha=0.75, step="post", linewidth=0, label="starting"
    )
    queue = columns["queue_length"].sum(axis=1) + columns["waiting"].sum(axis=1)
    axes[2].fill_between(minutes, queue, color="#7b5ea7", alpha=0.6, step="post", linewidth=0)
    misses = columns["missed"].sum(axis=1) / timeline.control_interval_s
    axes[3].fill_between(minutes, misses, color="#D55E00", alpha=0.8, step="post", linewidth=0)
    for axis in axes:
        axis.margins(x=0)
        axis.grid(axis="y", color=GRID, linewidth=0.7)
        axis.set_axisbelow(True)
    if labelled:
        axes[1].legend(frameon=False, loc="upper right", ncols=2, fontsize=8.8, handlelength=1.2)


def save(figure: Figure, path: Path) -> None:
    """Write a picture, and its folder where there is none; the ending chooses the form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
