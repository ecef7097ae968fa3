"""What `sim_to_real.py` measured: the runs of one policy in one world, as a table and a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from rl_autoscale.envs.scenario import Scenario
from rl_autoscale.experiments.figures import GRID, STYLE
from rl_autoscale.workload.trace import Workload

CORRECTED = "simulator, vLLM's times"
COLOURS = {"simulator": "#222222", "emulator": "#0072B2", "vllm": "#D55E00", CORRECTED: "#8c8c8c"}
MARKS = ("<!-- results: benchmarks/sim_to_real.py -->", "<!-- end of results -->")
_APART = 0.04  # between lines of the picture that would cover each other


@dataclass
class Run:
    """One policy in one world; times in seconds from the first moment of the load.

    Attributes:
        step_s: when the controller decided.
        asked: replicas wanted, per step.
        ready: replicas ready, per step.
        others: share of steps that somebody else than the policy decided (hold, fallback rule).
        replica_minutes: starting, ready and draining replicas.
        num_refused: 429 to the client: refused early, or waited in vain.
        startup_s: from asking for a second replica to having it; of the simulator the mean.
        num_lost: neither answered in full nor refused.
        spread: least and largest attainment of the simulator over `NUM_DRAWS` start-up draws and moments.
    """

    world: str
    policy: str
    num_arrived: int
    slo_attainment: float
    replica_minutes: float
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float
    num_refused: int
    num_lost: int
    others: float = 0.0
    startup_s: float = float("nan")
    step_s: list[float] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    ready: list[float] = field(default_factory=list)
    spread: tuple[float, float] | None = None


def at(run: Run, times_s: np.ndarray) -> np.ndarray:
    """Replicas asked for at given times; before the first decision those of the start."""
    index = np.searchsorted(run.step_s, times_s, side="right") - 1
    return np.asarray(run.asked)[np.maximum(index, 0)]


def table(runs: list[Run], span_s: float) -> str:
    columns = (
        "policy", "world", "attainment (over draws)", "429 / lost", "asks for more at",
        "replicas asked, mean (same as simulator)", "replica-minutes", "TTFT p50 / p95", "TPOT p50",
        "2nd replica after", "not the policy",
    )  # fmt: skip
    rows = [columns, ("---",) * len(columns)]
    grid_s = np.arange(0.0, span_s, 1.0)
    simulated = {run.policy: at(run, grid_s) for run in runs if run.world == "simulator"}
    for run in runs:
        asked = at(run, grid_s)
        first_s = next((t for t, target in zip(run.step_s, run.asked, strict=True) if target > 1), float("nan"))
        rows.append((
            run.policy,
            run.world,
            f"{run.slo_attainment:.1%}{_between(run)}",
            f"{run.num_refused} / {run.num_lost}",
            f"{first_s:.0f} s",
            f"{asked.mean():.2f} ({np.mean(asked == simulated[run.policy]):.0%})",
            f"{run.replica_minutes:.1f}",
            f"{run.ttft_p50_s:.2f} / {run.ttft_p95_s:.2f} s",
            f"{run.tpot_p50_s * 1e3:.1f} ms",
            f"{run.startup_s:.0f} s" if np.isfinite(run.startup_s) else "never",
            f"{run.others:.0%}",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _between(run: Run) -> str:
    return "" if run.spread is None else f" ({run.spread[0]:.0%} to {run.spread[1]:.0%})"


def draw(runs: list[Run], scenario: Scenario, load: Workload, path: Path) -> None:
    pool = scenario.fleet.pools[0]
    request_s = load.output_tokens.mean() * pool.hardware.decode_s_per_token(pool.batch_limit, 0.0)
    labels = list(dict.fromkeys(run.policy for run in runs))
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        for axis, label in zip(np.atleast_1d(figure.subplots(1, len(labels), sharey=True)), labels, strict=True):
            per_s, edges = np.histogram(load.arrival_s, bins=np.arange(0.0, load.span_s + 5.0, 5.0))
            axis.stairs(per_s / 5.0 * request_s, edges, fill=True, color=GRID, label="load in replicas, by the profile")
            for k, run in enumerate(run for run in runs if run.policy == label):
                look = {"color": COLOURS[run.world], "ls": "--" if run.world == CORRECTED else "-"}
                axis.step(run.step_s, np.array(run.asked) + _APART * k, where="post", label=run.world, **look)
            axis.set(title=label, xlabel="seconds", xlim=(0, load.span_s), ylim=(0, 3.4), yticks=range(4))
        figure.axes[0].set_ylabel("replicas asked for")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path)


def renew(page: Path, runs: list[Run], scenario: Scenario, load: Workload) -> None:
    """Write picture and table of a page anew; what stands outside its marks stays."""
    draw(runs, scenario, load, page.parent / "images" / "sim-to-real.png")
    before, _, rest = page.read_text().partition(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{table(runs, load.span_s)}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
