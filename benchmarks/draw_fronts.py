"""Draw what docs/results.md says of every scenario: GPU-hours against the best of nineteen rules, at four attainments.

    python benchmarks/draw_fronts.py [--page docs/results.md] [--out docs/images/fronts.png]

The picture is drawn from the page's own table ("against all nineteen rules"), so the two cannot disagree.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HEADINGS = "| scenario | 90 % | 95 % | 98 % | 99 % | best rule at 98 % |"
TARGETS = ("90 %", "95 %", "98 %", "99 %")
COLOURS = ("#9ecae1", "#4292c6", "#08519c", "#08306b")
UNDECIDED = 3.0
"""Per cent: worse by more is what the benchmark calls a loss."""


def read_changes(page: str) -> dict[str, list[float]]:
    """Per cent by scenario, shape (4,); NaN where one of the two does not get there.

    Raises:
        SystemExit: the page holds no such table, or a cell that is no figure.
    """
    start = page.find(HEADINGS)
    if start < 0:
        raise SystemExit(f"error: the page has no table that begins '{HEADINGS}'")
    changes = {}
    for line in page[start:].splitlines()[2:]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        changes[name.strip("`")] = [_change(cell) for cell in cells[: len(TARGETS)]]
    return changes


def _change(cell: str) -> float:
    if cell == "not reached":
        return float("nan")
    found = re.fullmatch(r"\**([+-]?[0-9.]+) %\**", cell)
    if found is None:
        raise SystemExit(f"error: '{cell}' is no change in per cent; write '-1.2 %' or 'not reached'")
    return float(found.group(1))


def draw(changes: dict[str, list[float]], path: Path) -> None:
    """A row per scenario, the one with the largest gain on top, a dot per attainment."""
    names = sorted(changes, key=lambda name: float(np.nanmean(changes[name])), reverse=True)
    figure = Figure(figsize=(8, 0.27 * len(names) + 1.1), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(-UNDECIDED, UNDECIDED, color="0.93", zorder=0)
    axis.axvline(0, color="0.4", linewidth=1)
    values = np.array([changes[name] for name in names])
    rows = np.arange(len(names))
    axis.hlines(rows, np.nanmin(values, axis=1), np.nanmax(values, axis=1), color="0.8", linewidth=2, zorder=1)
    for k, (target, colour) in enumerate(zip(TARGETS, COLOURS, strict=True)):
        axis.plot(values[:, k], rows, "o", color=colour, markersize=5 + k, label=f"{target} in time", zorder=2 + k)
    axis.set_yticks(rows, names)
    axis.set_ylim(-0.8, len(names) - 0.2)
    axis.set_xlabel("GPU-hours of PPO against the cheapest of nineteen rules, its knob known in hindsight, %")
    axis.grid(axis="x", color="0.9")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    axis.annotate("PPO cheaper", (0.02, 1.0), xycoords="axes fraction", va="bottom", color="0.35")
    axis.annotate("dearer", (1.0, 1.0), xycoords="axes fraction", va="bottom", ha="right", color="0.35")
    axis.legend(loc="lower left", frameon=True, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the page, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/fronts.png"))
    options = parser.parse_args()
    draw(read_changes(options.page.read_text(encoding="utf-8")), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
