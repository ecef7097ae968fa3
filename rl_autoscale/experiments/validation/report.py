"""Findings as tables, JSON and figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from rl_autoscale.experiments.figures import COLOURS, GRID, INK, STYLE
from rl_autoscale.experiments.runs import write_text
from rl_autoscale.experiments.tables import Cell, Table
from rl_autoscale.experiments.validation.compare import METRICS, MetricError, RequestTimes
from rl_autoscale.experiments.validation.iterations import IterationErrors
from rl_autoscale.experiments.validation.queues import CONFIDENCE, QueueResult
from rl_autoscale.experiments.validation.vidur_runs import REGIMES, RunErrors
from rl_autoscale.experiments.validation.vllm_runs import RunPrediction
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.sim.iteration_table import REGIONS
from rl_autoscale.sim.layout import FloatArray

ITERATION_TARGET = 0.05
SCHEDULER_TARGET = 0.02
MEAN_TARGET, P99_TARGET = 0.05, 0.10
SHOWN = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "end to end"}


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """Everything that was compared; a part that was not asked for is empty."""

    iterations: tuple[IterationErrors, ...] = ()
    vidur: tuple[RunErrors, ...] = ()
    vllm: tuple[RunPrediction, ...] = ()
    vllm_measured: tuple[tuple[str, RequestTimes], ...] = ()
    queues: tuple[QueueResult, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """For JSON; per-request times are left to the figures."""
        vllm = [
            {name: getattr(item, name) for name in _VLLM_FIELDS}
            | {"errors": [error.as_dict() for error in item.errors]}
            for item in self.vllm
        ]
        return {
            "iterations": [asdict(item) for item in self.iterations],
            "vidur": [asdict(item) for item in self.vidur],
            "vllm": vllm,
            "queues": [asdict(item) | {"confirmed": item.confirmed} for item in self.queues],
        }


_VLLM_FIELDS = ("run", "engine", "iteration_times", "prefix_cache", "preemptions")


def all_tables(findings: Findings) -> dict[str, Table]:
    """Every table there is something for, by the name of its place in the page."""
    tables: dict[str, Table] = {}
    for name, judged in (("iterations", True), ("other-software", False)):
        chosen = [item for item in findings.iterations if item.judged is judged]
        if chosen:
            tables[name] = _iteration_table(chosen, judged=judged)
    if findings.vidur:
        tables["vidur-regimes"] = _regime_table(findings.vidur)
        tables["vidur-runs"] = _run_table(findings.vidur)
    if findings.vllm:
        tables["vllm"] = _vllm_table(findings.vllm)
    if findings.queues:
        tables["queues"] = _queue_table(findings.queues)
    return tables


def _iteration_table(items: Sequence[IterationErrors], *, judged: bool) -> Table:
    rows = []
    for profile, source in dict.fromkeys((item.profile, item.source) for item in items):
        by_kind = {item.kind: item for item in items if (item.profile, item.source) == (profile, source)}
        cells = [_iteration_cell(by_kind.get(kind), judged=judged) for kind in REGIONS]
        count = sum(item.num_rows for item in by_kind.values())
        rows.append((Cell(profile), Cell(source), Cell(f"{count:,}"), *cells))
    note = (
        f"Mean / 99th percentile of the absolute error, %. Bold: a mean above {ITERATION_TARGET:.0%}."
        if judged
        else "Median of predicted / theirs - 1, %."
    )
    title = "Profiles against measured iterations" if judged else "Profiles against other software"
    return Table(title, note, ("profile", "source", "iterations", *REGIONS), tuple(rows))


def _iteration_cell(item: IterationErrors | None, *, judged: bool) -> Cell:
    if item is None:
        return Cell("-")
    if not judged:
        return Cell(f"{item.bias * 100:+.1f}")
    return Cell(f"{item.mean * 100:.1f} / {item.p99 * 100:.1f}", strong=item.mean > ITERATION_TARGET)


def _regime_table(items: Sequence[RunErrors]) -> Table:
    """The worst run of each load regime and way of replaying."""
    rows = []
    for rules, times in dict.fromkeys((item.rules, _whose(item)) for item in items):
        for _, regime in REGIMES:
            chosen = [i for i in items if (i.rules, _whose(i), i.regime) == (rules, times, regime)]
            if chosen:
                cells = [_worst_cell(chosen, k, times == "Vidur" and regime != "overload") for k in range(len(METRICS))]
                rows.append((Cell(rules), Cell(times), Cell(regime), Cell(str(len(chosen))), *cells))
    return Table(
        "Vidur's runs by load",
        f"Largest error among the runs, of the median / of the 99th percentile, %. Bold: above {SCHEDULER_TARGET:.0%} "
        "with Vidur's iteration times, outside overload.",
        ("rules", "iteration times", "load", "runs", *SHOWN.values()),
        tuple(rows),
        num_text=3,
    )


def _whose(item: RunErrors) -> str:
    return "Vidur" if item.iteration_times == "Vidur" else "our profile"


def _worst_cell(items: Sequence[RunErrors], metric: int, judged: bool) -> Cell:
    worst = [max((item.errors[metric].quantiles[name] for item in items), key=abs) for name in ("p50", "p99")]
    return Cell(" / ".join(f"{value * 100:+.1f}" for value in worst), strong=judged and max(map(abs, worst)) > 0.02)


def _run_table(items: Sequence[RunErrors]) -> Table:
    rows = [
        (
            Cell(item.run.removesuffix("_overload")),
            Cell(item.rules),
            Cell(_whose(item)),
            Cell(f"{item.load:.2f}"),
            Cell(f"{item.restarts} / {item.measured_restarts}"),
            *(Cell(_quantile_text(error)) for error in item.errors),
            Cell(f"{item.errors[0].request_median * 100:.1f} / {item.errors[2].request_median * 100:.1f}"),
        )
        for item in items
    ]
    return Table(
        "Every run of Vidur",
        "Errors of p50 / p99, %. Preemptions: replayed / Vidur's. Last column: median absolute error per request of "
        "TTFT / end to end, %.",
        ("run", "rules", "iteration times", "load", "preemptions", *SHOWN.values(), "per request"),
        tuple(rows),
        num_text=3,
    )


def _quantile_text(error: MetricError) -> str:
    return f"{error.quantiles['p50'] * 100:+.1f} / {error.quantiles['p99'] * 100:+.1f}"


def _vllm_table(items: Sequence[RunPrediction]) -> Table:
    rows = []
    for item in items:
        for error in item.errors:
            values = {"mean": error.mean, **error.quantiles}
            limits = {name: P99_TARGET if name == "p99" else MEAN_TARGET for name in values}
            cells = [
                Cell(f"{value * 100:+.1f}", strong=name != "p90" and abs(value) > limits[name])
                for name, value in values.items()
            ]
            rows.append(
                (
                    Cell(item.run),
                    Cell(item.engine),
                    Cell(item.iteration_times),
                    Cell("yes" if item.prefix_cache else "no"),
                    Cell(SHOWN[error.metric]),
                    *cells,
                    Cell(f"{error.request_median * 100:.1f} / {error.request_mean * 100:.1f}"),
                )
            )
    return Table(
        "A real vLLM server",
        f"Errors, %. Bold: above {MEAN_TARGET:.0%} (mean, median) or {P99_TARGET:.0%} (p99). Last column: median / "
        "mean absolute error per request.",
        ("run", "engine", "iteration times", "prefix cache", "metric", "mean", "p50", "p90", "p99", "per request"),
        tuple(rows),
        num_text=5,
    )


def _queue_table(items: Sequence[QueueResult]) -> Table:
    rows = [
        (
            Cell(item.queue),
            Cell(f"{item.expected_s:.4f}"),
            Cell(f"{item.measured_s:.4f} ± {item.half_width_s:.4f}", strong=not item.confirmed),
            Cell(f"{(item.measured_s / item.expected_s - 1) * 100:+.2f}"),
        )
        for item in items
    ]
    return Table(
        "Queueing theory",
        f"Mean wait, seconds; {CONFIDENCE:.0%} confidence intervals. Bold: the interval misses the closed form.",
        ("queue", "closed form", "simulated", "difference %"),
        tuple(rows),
        num_text=1,
    )


def update_page(page: Path, tables: dict[str, Table]) -> None:
    """Replace the tables of a page, each between ``<!-- table: NAME -->`` and ``<!-- end -->``; the rest stays.

    Raises:
        SpecError: the page does not exist or has no place for a table.
    """
    if not page.is_file():
        raise SpecError(f"{page}: no such file; --update takes a page with '<!-- table: NAME -->' marks")
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin = f"<!-- table: {name} -->"
        place = re.compile(f"{re.escape(begin)}.*?<!-- end -->", re.DOTALL)
        found = place.search(text)
        if found is None:
            raise SpecError(f"{page}: no '{begin}' ... '<!-- end -->'; add it where the table belongs")
        block = f"{begin}\n\n{table.note}\n\n{table.markdown()}\n\n<!-- end -->"
        text = text[: found.start()] + block + text[found.end() :]
    write_text(page, text)


def draw_cdfs(title: str, measured: RequestTimes, predicted: dict[str, RequestTimes], path: Path) -> None:
    """Cumulative distributions of TTFT, TPOT and end-to-end time, measured in black."""
    colours = [COLOURS["learned"], COLOURS["chiron"], COLOURS["hpa"], COLOURS["headroom"]]
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.4), layout="constrained")
        axes = figure.subplots(1, len(METRICS), sharey=True)
        for axis, metric in zip(axes, METRICS, strict=True):
            _cdf(axis, getattr(measured, metric), "measured", INK, 2.4)
            for (name, times), colour in zip(predicted.items(), colours, strict=False):
                _cdf(axis, getattr(times, metric), name, colour, 1.2)
            axis.set_xlabel(f"{SHOWN[metric]}, s")
            axis.grid(color=GRID, linewidth=0.7)
            axis.set_axisbelow(True)
        axes[0].set_ylabel("share of requests")
        axes[0].set_title(title)
        axes[1].legend(frameon=False, fontsize=8.0, loc="center right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white")


def _cdf(axis: Any, values: FloatArray, label: str, colour: str, width: float) -> None:
    values = np.sort(values[np.isfinite(values)])
    axis.step(values, np.arange(1, len(values) + 1) / len(values), label=label, color=colour, linewidth=width)


def draw_all(findings: Findings, folder: Path) -> list[Path]:
    """One figure per recorded run of a real server; the paths written."""
    paths = []
    for run, measured in findings.vllm_measured:
        predicted = {
            f"{item.iteration_times}, {'with' if item.prefix_cache else 'no'} prefix cache": item.times
            for item in findings.vllm
            if item.run == run
        }
        paths.append(folder / f"{run}.png")
        draw_cdfs(f"{run}: measured and predicted", measured, predicted, paths[-1])
    return paths
