"""Pictures of an episode: a text panel and charts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rl_autoscale.envs.mdp import MdpStep
from rl_autoscale.fleet.spec import FleetSpec

_WIDTH = 40


def _bar(share: float) -> str:
    filled = round(_WIDTH * min(max(share, 0.0), 1.0))
    return "█" * filled + "·" * (_WIDTH - filled)


def ansi_frame(spec: FleetSpec, step: MdpStep | None, books: dict[str, float]) -> str:
    """One screen of text: pools, classes, books."""
    if step is None:
        return "no step yet\n"
    pools, classes = step.state.pools, step.state.classes
    lines = [f"t = {step.state.time_s[0]:.0f} s   reward {step.reward.total[0]:+.3f}"]
    for p, pool in enumerate(spec.pools):
        ready, starting, draining = (int(x[0, p]) for x in (pools.ready, pools.starting, pools.draining))
        lines.append(
            f"{pool.name:>12} {_bar(ready / pool.max_replicas)} {ready} ready, {starting} starting, {draining} draining"
        )
        lines.append(
            f"{'KV':>12} {_bar(float(pools.kv_usage[0, p]))} {pools.kv_usage[0, p]:.0%}, "
            f"cap {pools.batch_cap[0, p]:.0f}"
        )
    for c, item in enumerate(spec.classes):
        lines.append(
            f"{item.name:>12} {classes.arrivals_per_s[0, c]:.1f} arrivals/s, queue {classes.queue_length[0, c]:.0f}, "
            f"refused {classes.refused_per_s[0, c]:.1f}/s, TTFT p95 {classes.ttft_p95_s[0, c]:.2f} s"
        )
    lines.append(f"{'so far':>12} {books['gpu_hours']:.2f} GPU-hours, SLO attainment {books['slo_attainment']:.2%}")
    return "\n".join(lines) + "\n"


def rgb_frame(spec: FleetSpec, history: list[MdpStep]) -> npt.NDArray[np.uint8]:
    """Charts of the episode so far, shape (480, 640, 3), uint8: replicas, arrivals and queue, misses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), dpi=100, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib's canvas is untyped
    axes: Any = figure.subplots(3, 1, sharex=True)
    if history:
        time_s = np.array([step.state.time_s[0] for step in history])
        ready = np.array([step.state.pools.ready[0].sum() for step in history])
        target = np.array([step.decision.target_replicas[0].sum() for step in history])
        axes[0].step(time_s, target, where="post", color="#999999", label="asked for")
        axes[0].step(time_s, ready, where="post", color="#0072B2", label="ready")
        axes[0].legend(loc="upper left", frameon=False, fontsize=8)
        axes[1].plot(time_s, [step.state.classes.arrivals_per_s[0].sum() for step in history], color="#009E73")
        axes[2].plot(time_s, [step.reward.misses[0] for step in history], color="#D55E00")
    for axis, label in zip(axes, ("replicas", "arrivals/s", "misses / mean arrivals"), strict=True):
        axis.set_ylabel(label, fontsize=8)
        axis.tick_params(labelsize=8)
    axes[2].set_xlabel("seconds", fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()
