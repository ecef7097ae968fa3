"""The picture of a replay: load, replicas and misses over time, one line per policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from rl_autoscale.experiments.figures import COLOURS, GRID, STYLE, colour_of, save
from rl_autoscale.experiments.replay import Outcome, thinned
from rl_autoscale.sim.result import SECONDS_PER_HOUR

POINTS = 700
"""Of each line; a week at ten seconds would be 60,000."""

_UNITS = (("days", 24 * SECONDS_PER_HOUR), ("hours", SECONDS_PER_HOUR), ("minutes", 60.0))


def draw_replay(outcomes: Sequence[Outcome], span_s: float, path: Path) -> None:
    """Three panels on one time axis: requests per second, replicas (ready and starting), misses so far.

    Args:
        outcomes: one line each, in their order.
        span_s: length of the traffic; what comes after it (the last requests) is left out.
        path: the picture; its ending chooses the form (png, svg, pdf).
    """
    unit, unit_s = next((item for item in _UNITS if span_s >= 2 * item[1]), _UNITS[-1])
    others = [item.choice.registered for item in outcomes if item.choice.registered.split("-")[0] not in COLOURS]
    with rc_context(STYLE):
        figure = Figure(figsize=(10.0, 7.2), layout="constrained")
        load, replicas, misses = figure.subplots(3, 1, sharex=True, height_ratios=(1.0, 1.7, 1.2))
        for place, outcome in enumerate(outcomes):
            columns = thinned(outcome.result.timeline, span_s, POINTS)
            at = columns["time_s"] / unit_s
            if place == 0:
                load.fill_between(at, columns["arrivals_per_s"], color="#c9d6df", linewidth=0)
            look = {
                "color": colour_of(outcome.choice.registered, others),
                "linestyle": "--" if outcome.choice.refusal == "on" else "-",
                "linewidth": 1.3,
            }
            held = columns["ready"] + columns["starting"]
            label = f"{name_of(outcome)}: {outcome.result.slo_attainment:.2%}, ${outcome.result.cost_usd:,.0f}"
            replicas.plot(at, held, label=label, **look)
            misses.plot(at, np.cumsum(columns["missed"]), **look)
        for axis, title in (
            (load, "requests/s"),
            (replicas, "replicas\nready and starting"),
            (misses, "misses so far"),
        ):
            axis.set_ylabel(title)
            axis.set_ylim(bottom=0)
            axis.margins(x=0)
            axis.grid(axis="y", color=GRID, linewidth=0.7)
            axis.set_axisbelow(True)
        misses.set_xlabel(unit)
        figure.legend(*replicas.get_legend_handles_labels(), loc="outside upper left", frameon=False, ncols=3)
        save(figure, path)


def name_of(outcome: Outcome) -> str:
    """The policy, and whether the gateway refuses early."""
    return f"{outcome.choice.label}{' + refusal' if outcome.choice.refusal == 'on' else ''}"
