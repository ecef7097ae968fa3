"""A suite's figures: performance profiles, and suite attainment over suite cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rl_autoscale.experiments.analysis import CLAIRVOYANT, LEARNED
from rl_autoscale.experiments.figures import ATTAINMENT_TICKS, GRID, STYLE, colour_of, save, scaled
from rl_autoscale.experiments.suite_analysis import Contender, Suite
from rl_autoscale.experiments.suite_statistics import performance_profile

_TITLES = {"off": "no early refusal", "on": "the gateway refuses what would miss its TTFT"}
_MOST_SCORE = 4.0


def draw_profiles(suite: Suite, path: Path) -> None:
    """Share of episodes with a score of at most τ, per policy: higher is better at every τ.

    Args:
        suite: findings.
        path: a PNG to write.
    """
    lowest = min(float(item.settings[item.chosen].scores(suite.target).min()) for item in suite.contenders)
    thresholds = np.linspace(max(0.9 * lowest, 0.0), _MOST_SCORE, 160)

    def draw(axis: Axes, item: Contender, colour: str, strong: bool) -> None:
        share, band = performance_profile(item.settings[item.chosen].scores(suite.target), thresholds, suite.drawn)
        axis.plot(
            thresholds, share, color=colour, linewidth=2.4 if strong else 1.3, label=item.policy, linestyle=_style(item)
        )
        if strong:
            axis.fill_between(thresholds, *band, color=colour, alpha=0.2, linewidth=0)

    figure, axes = _panels(suite, draw)
    for axis in axes:
        axis.set(xlim=(thresholds[0], thresholds[-1]), ylim=(0, 1), xlabel="score τ: cost + price of falling short")
    axes[0].set_ylabel("share of episodes with a score ≤ τ")
    save(figure, path)


def draw_suite_front(suite: Suite, path: Path) -> None:
    """Suite attainment over suite cost of every setting, deployed.

    Args:
        suite: findings.
        path: a PNG to write.
    """

    def draw(axis: Axes, item: Contender, colour: str, strong: bool) -> None:
        cost = [estimate.value for estimate in item.cost]
        attainment = scaled(np.array([estimate.value for estimate in item.attainment]))
        axis.plot(
            *(cost, attainment), color=colour, linewidth=2.4 if strong else 1.3, linestyle=_style(item),
            marker="o", markersize=5.5 if strong else 3.5, label=item.policy, zorder=5 if strong else 3,
        )  # fmt: skip

    most = min(_MOST_SCORE, 1.1 * max(estimate.value for item in suite.contenders for estimate in item.cost))
    figure, axes = _panels(suite, draw)
    for axis in axes:
        axis.set_yticks(
            [float(scaled(tick)) for tick in ATTAINMENT_TICKS],
            [f"{tick:.1%}".replace(".0%", "%") for tick in ATTAINMENT_TICKS],
        )
        axis.set(xlim=(0, most), ylim=(scaled(0.78), scaled(0.9992)), xlabel="cost of the suite")
    axes[0].set_ylabel("SLO attainment of the suite")
    save(figure, path)


def _panels(suite: Suite, draw: Callable[[Axes, Contender, str, bool], None]) -> tuple[Figure, list[Axes]]:
    """One panel per refusal setting, every contender drawn by ``draw(axis, contender, colour, strong)``."""
    shown = [refusal for refusal in ("off", "on") if any(item.refusal == refusal for item in suite.contenders)]
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4 * len(shown), 4.6), layout="constrained")
        axes = list(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0])
        for axis, refusal in zip(axes, shown, strict=True):
            inside = [item for item in suite.contenders if item.refusal == refusal]
            others = [item.policy for item in inside]
            for item in inside:
                colour = colour_of(item.registered if item.registered == LEARNED else item.policy, others)
                draw(axis, item, colour, item.registered == LEARNED or item is suite.focal)
            axis.set_title(_TITLES[refusal])
            axis.grid(axis="y", color=GRID, linewidth=0.7)
            axis.set_axisbelow(True)
            axis.legend(frameon=False, fontsize=8, loc="lower right", handlelength=2.2)
        return figure, axes


def _style(item: Contender) -> Any:
    if item.registered == CLAIRVOYANT:
        return (0, (1, 1.5))
    return "-" if item.registered == LEARNED or item.policy.endswith("-tuned") else (0, (5, 2))
