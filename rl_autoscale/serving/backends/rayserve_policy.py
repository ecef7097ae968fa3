"""Our policy inside Ray Serve: Serve calls it, Serve acts (custom autoscaling policy classes, Ray 2.60).

    autoscaling_config:
      min_replicas: 1
      max_replicas: 8
      upscale_delay_s: 0        # the policy and its shield decide how fast
      downscale_delay_s: 0
      policy:
        policy_function: rl_autoscale.serving.backends.rayserve_policy:FleetPolicy
        policy_kwargs: {fleet: /etc/rl-autoscale/fleet.yaml, policy: headroom, knobs: {headroom: 1.5}}

Serve knows requests, not tokens. What it knows fills the observation; what a replica returns from its method
``record_autoscaling_stats`` under the name of a field of `PoolTelemetry` or `ClassTelemetry` (``kv_usage``,
``arrivals_per_s``; with several classes ``arrivals_per_s/chat``) fills more. The rest stays missing.

Serve has no place for the rest of a decision: batch caps and admission stay what the application says.

Serve pickles this module by value and calls it in its controller's loop: it stays small, and never raises there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from rl_autoscale.agents.registry import make_policy
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.shield import Shield
from rl_autoscale.fleet.spec import FleetSpec, ShieldSpec
from rl_autoscale.fleet.state import ClassTelemetry, FleetState, FloatArray, PoolTelemetry

POOL_FIELDS = tuple(field.name for field in fields(PoolTelemetry))
CLASS_FIELDS = tuple(field.name for field in fields(ClassTelemetry))
AVERAGED = frozenset(
    {"kv_usage", "itl_s", "batch_cap", "mean_output_tokens", "admission", "age_s"}
    | {f"{name}_{statistic}_s" for name in ("ttft", "tpot") for statistic in ("mean", "p95")}
)
"""Fields that are a mean over replicas; of ``oldest_wait_s`` the largest counts; all others add up."""


class FleetPolicy:
    """A class policy for Serve's ``policy_function``; one pool, as Serve scales one deployment.

    Args:
        fleet: path of the fleet's YAML; exactly one pool, whose bounds hold inside Serve's own.
        policy: a registered policy's name, for example ``headroom`` or ``learned``.
        knobs: its keyword arguments.
        shield: limits, as in `ShieldSpec`.
        monotonic_s: the clock that spaces decisions.

    Raises:
        SpecError: the fleet has more than one pool, or a file or a knob is wrong. Serve then reports the deployment
            as failed.
    """

    def __init__(
        self,
        fleet: str,
        policy: str,
        knobs: Mapping[str, Any] | None = None,
        shield: Mapping[str, Any] | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = FleetSpec.from_yaml(Path(fleet))
        if len(self._spec.pools) != 1:
            names = ", ".join(self._spec.pool_names)
            raise SpecError(f"{fleet}: Ray Serve scales one deployment, so one pool; got {names}")
        self._policy = make_policy(policy, **dict(knobs or {}))
        self._policy.reset(self._spec)
        self._shield = Shield(self._spec, ShieldSpec.from_dict(dict(shield or {})))
        self._monotonic_s = monotonic_s
        self._starts = PendingStarts()
        self._began_s = monotonic_s()
        self._decided_s: float | None = None
        self._held: int | None = None

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Answer Serve's tick (about ten a second): a new decision each control interval, the held one in between.

        Args:
            ctx: Serve's `AutoscalingContext`.

        Returns:
            Replicas wanted, and no state for Serve to keep.
        """
        now_s = self._monotonic_s()
        interval_s = self._spec.control_interval_s
        if self._held is None or self._decided_s is None or now_s - self._decided_s >= interval_s:
            window_s = interval_s if self._decided_s is None else now_s - self._decided_s
            self._decided_s = now_s
            self._held = self._decide(ctx, now_s, window_s)
        return self._held, {}

    def _decide(self, ctx: Any, now_s: float, window_s: float) -> int:
        try:
            ages_s = self._starts.update(ctx.target_num_replicas - ctx.current_num_replicas, now_s)
            state = read_context(ctx, self._spec, time_s=now_s - self._began_s, window_s=window_s, start_ages_s=ages_s)
            decision = self._shield.clip(self._policy.decide(state), state)
            return int(decision.target_replicas[0])
        except Exception:  # an error here would stop Serve's loop for every deployment: hold, and say so
            logging.getLogger(__name__).exception("policy %s failed; holding the target", self._policy.name)
            return int(ctx.target_num_replicas)


class PendingStarts:
    """When each replica that does not serve yet was asked for; the first asked for is the first to serve."""

    def __init__(self) -> None:
        self._asked_s: list[float] = []

    def update(self, num_starting: int, now_s: float) -> tuple[float, float]:
        """Ages in seconds of the oldest and the newest pending start; zeros when there is none."""
        num_starting = max(0, num_starting)
        served = max(0, len(self._asked_s) - num_starting)
        self._asked_s = self._asked_s[served:] + [now_s] * (num_starting - len(self._asked_s))
        return (now_s - self._asked_s[0], now_s - self._asked_s[-1]) if self._asked_s else (0.0, 0.0)


def read_context(
    ctx: Any, spec: FleetSpec, *, time_s: float, window_s: float, start_ages_s: tuple[float, float]
) -> FleetState:
    """Translate Serve's context; what it does not say is NaN.

    ``running`` is what Serve counts at the replicas, requests that wait inside an engine included, so ``waiting`` is
    zero unless the replicas report both. Requests queued at Serve's handles are the class's queue.
    """
    reported = combine(ctx.aggregated_metrics or {})
    at_replicas, queued = float(ctx.total_running_requests), float(ctx.total_queued_requests)
    age_s = float(getattr(ctx.config, "metrics_interval_s", None) or 0.0)
    pool = {
        "ready": float(ctx.current_num_replicas),
        "starting": float(max(0, ctx.target_num_replicas - ctx.current_num_replicas)),
        "asked_for": float(ctx.target_num_replicas),
        "oldest_start_age_s": start_ages_s[0],
        "newest_start_age_s": start_ages_s[1],
        "running": at_replicas,
        "waiting": 0.0,
        "in_flight": at_replicas,
        "age_s": age_s,
    }
    single = {"queue_length": queued, "in_flight": at_replicas} if len(spec.classes) == 1 else {}
    rows = []
    for name in spec.class_names:
        said = {field: reported[key] for field in CLASS_FIELDS if (key := f"{field}/{name}") in reported}
        plain = {field: reported[field] for field in CLASS_FIELDS if field in reported and field not in POOL_FIELDS}
        rows.append({"age_s": age_s, **single, **(plain if len(spec.classes) == 1 else {}), **said})
    pool |= {field: reported[field] for field in POOL_FIELDS if field in reported}
    return FleetState(
        time_s=np.float64(time_s),  # type: ignore[arg-type]
        window_s=np.float64(window_s),  # type: ignore[arg-type]
        pools=PoolTelemetry.from_matrix(_matrix([pool], POOL_FIELDS)),
        classes=ClassTelemetry.from_matrix(_matrix(rows, CLASS_FIELDS)),
    )


def combine(metrics: Mapping[str, Mapping[Any, float]]) -> dict[str, float]:
    """One figure for all replicas, from ``metrics[name][replica]``; names that mean nothing here are left out."""
    combined = {}
    for name, by_replica in metrics.items():
        field = name.partition("/")[0]
        values = np.array(list(by_replica.values()), dtype=np.float64)
        if values.size == 0 or field not in (*POOL_FIELDS, *CLASS_FIELDS):
            continue
        if field == "oldest_wait_s":
            combined[name] = float(values.max())
        else:
            combined[name] = float(values.mean() if field in AVERAGED else values.sum())
    return combined


def _matrix(rows: list[dict[str, float]], names: tuple[str, ...]) -> FloatArray:
    return np.array([[row.get(name, np.nan) for name in names] for row in rows], dtype=np.float64)
