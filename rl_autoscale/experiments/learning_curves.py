"""Learning curves of one training or of several seeds of it: mean and bootstrap interval over seeds, figure and table.

<out>/learning.jsonl            of one training; of several seeds <out>/seed-K/learning.jsonl
<out>/learning.png, .md         what `write_curves` makes of them
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rl_autoscale.experiments.runs import write_text
from rl_autoscale.experiments.statistics import Estimate, FloatArray, estimate_of, resamples
from rl_autoscale.experiments.tables import Cell, Table, interval
from rl_autoscale.fleet.errors import SpecError

CURVE_FILE = "learning.jsonl"
SHOWN = {
    "train/reward": "reward per step",
    "train/cost_over_ideal": "cost over ideal",
    "train/slo_attainment": "SLO attainment",
}
"""Metrics that are drawn, with the words of their axes (docs/metrics.md)."""

NUM_POINTS = 60
LAST_SHARE = 0.1
"""The end of a training, over which its table averages."""


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """Curves of several seeds on one grid.

    Attributes:
        names: of the seeds' folders.
        timesteps: shape (num_points,); up to where the shortest run got.
        metrics: by name, shape (num_seeds, num_points): means over what lies between two points.
        ends: by name, shape (num_seeds,): means over the last tenth.
    """

    names: tuple[str, ...]
    timesteps: FloatArray
    metrics: dict[str, FloatArray]
    ends: dict[str, FloatArray]

    def band(self, name: str) -> tuple[FloatArray, FloatArray]:
        """Mean over seeds, shape (num_points,), and its 95 % bootstrap band, shape (2, num_points)."""
        values = self.metrics[name]
        drawn = values[resamples(len(values), np.random.default_rng(0), 1000)].mean(axis=1)
        return values.mean(axis=0), np.quantile(drawn, [0.025, 0.975], axis=0)

    def end(self, name: str) -> Estimate:
        """The last tenth: mean over seeds with its bootstrap interval."""
        values = self.ends[name]
        drawn = values[resamples(len(values), np.random.default_rng(0), 1000)].mean(axis=1)
        return estimate_of(float(values.mean()), drawn, len(values))


def curve_folders(out: Path) -> list[Path]:
    """The folders of a training or of its seeds that hold a curve; empty where there is none."""
    if (out / CURVE_FILE).exists():
        return [out]
    folders = [path.parent for path in out.glob(f"seed-*/{CURVE_FILE}")]
    return sorted(folders, key=lambda path: (len(path.name), path.name))


def read_curves(folders: Sequence[Path]) -> Curves:
    """Read curves and bring them onto one grid.

    A training that was resumed repeats what came after its checkpoint; the later line counts.

    Raises:
        SpecError: no folder, or one whose curve is empty or damaged.
    """
    if not folders:
        raise SpecError("no learning curve there; give the folder of an 'rl-autoscale train' run")
    raw = [_read(folder / CURVE_FILE) for folder in folders]
    end = min(float(steps[-1]) for steps, _ in raw)
    num_points = min(NUM_POINTS, *(int((steps <= end).sum()) for steps, _ in raw))
    edges = np.linspace(0.0, end, num_points + 1)
    known = [name for name in SHOWN if all(name in metrics for _, metrics in raw)]
    return Curves(
        tuple(folder.name for folder in folders),
        edges[1:],
        {name: np.array([_binned(steps, metrics[name], edges) for steps, metrics in raw]) for name in known},
        {
            name: np.array([metrics[name][steps > (1.0 - LAST_SHARE) * steps[-1]].mean() for steps, metrics in raw])
            for name in known
        },
    )


def curve_table(curves: Curves) -> Table:
    """How each seed ended, and their mean."""
    rows = [
        (Cell(name), *(Cell(f"{curves.ends[metric][k]:.4g}") for metric in curves.ends))
        for k, name in enumerate(curves.names)
    ]
    if len(curves.names) > 1:
        rows.append((Cell("mean"), *(Cell(interval(curves.end(metric)), strong=True) for metric in curves.ends)))
    return Table(
        "End of training",
        f"Means over the last {LAST_SHARE:.0%} of each run, on training traffic, exploration included.",
        ("seed", *(SHOWN[metric] for metric in curves.ends)),
        tuple(rows),
        num_text=1,
        interval_note="In brackets: 95 % bootstrap interval over seeds." if len(curves.names) > 1 else "",
    )


def write_curves(out: Path) -> tuple[Curves, list[Path]]:
    """Draw ``learning.png`` and write ``learning.md`` into a training's folder.

    Raises:
        SpecError: see `read_curves`.
    """
    curves = read_curves(curve_folders(out))
    table = curve_table(curves)
    paths = [out / "learning.png", out / "learning.md"]
    draw_curves(curves, paths[0])
    write_text(paths[1], f"# {table.title}\n\n{table.full_note}\n\n{table.markdown()}\n")
    return curves, paths


def draw_curves(curves: Curves, path: Path) -> None:
    """One panel per metric: every seed thin, their mean thick, the interval as a band.

    Args:
        curves: to draw.
        path: a PNG to write.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from rl_autoscale.experiments.figures import COLOURS, GRID, STYLE, save

    colour = COLOURS["learned"]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(curves.metrics), 3.4), layout="constrained")
        panels = figure.subplots(1, len(curves.metrics), squeeze=False)[0]
        for axis, (name, values) in zip(panels, curves.metrics.items(), strict=True):
            mean, band = curves.band(name)
            if len(values) > 1:
                axis.plot(curves.timesteps, values.T, color=colour, linewidth=0.6, alpha=0.45)
                axis.fill_between(curves.timesteps, *band, color=colour, alpha=0.2, linewidth=0)
            axis.plot(curves.timesteps, mean, color=colour, linewidth=2.2)
            axis.set(title=SHOWN[name], xlabel="control steps")
            axis.grid(axis="y", color=GRID, linewidth=0.7)
            axis.set_axisbelow(True)
        save(figure, path)


def _read(path: Path) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Time steps and metrics of one curve, in order, each step once."""
    by_step: dict[int, dict[str, float]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            by_step[int(row["timesteps"])] = row
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{path}: not a learning curve ({error}); remove it, or train with --fresh") from None
    if not by_step:
        raise SpecError(f"{path}: holds no rollout yet; wait for the first one")
    steps = sorted(by_step)
    whole = [name for name in SHOWN if all(isinstance(by_step[step].get(name), int | float) for step in steps)]
    return np.array(steps, dtype=np.float64), {
        name: np.array([by_step[step][name] for step in steps]) for name in whole
    }


def _binned(steps: FloatArray, values: FloatArray, edges: FloatArray) -> FloatArray:
    """Means of the values between two edges; where there are none, interpolated."""
    place = np.clip(np.searchsorted(edges, steps, side="left") - 1, 0, len(edges) - 2)
    inside = steps <= edges[-1]
    count = np.bincount(place[inside], minlength=len(edges) - 1)
    total = np.bincount(place[inside], weights=values[inside], minlength=len(edges) - 1)
    means = total / np.maximum(count, 1)
    return np.where(count > 0, means, np.interp(edges[1:], steps, values))
