"""The controller's own Prometheus metrics, in a registry of their own; every name is also in docs/metrics.md."""

from __future__ import annotations

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rl_autoscale.fleet.state import FloatArray
from rl_autoscale.serving.modes import MODES
from rl_autoscale.serving.safety import FAULTS
from rl_autoscale.serving.step_record import StepRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY_EDGES_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_POOL_GAUGES = (
    "ready",
    "starting",
    "draining",
    "asked_for",
    "running",
    "waiting",
    "in_flight",
    "kv_usage",
    "batch_cap",
)
_CLASS_GAUGES = (
    "arrivals_per_s", "queue_length", "oldest_wait_s", "ttft_p95_s", "tpot_p95_s", "finished_per_s", "met_per_s",
    "late_first_tokens_per_s", "slow_answers_per_s", "refused_per_s", "dropped_per_s", "admission",
)  # fmt: skip


class ControllerMetrics:
    """A listener of the controller that keeps metrics; missing telemetry shows as NaN, never as 0."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"rl_autoscale_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"rl_autoscale_{name}", text, labels, registry=registry)

        self._steps = counter("steps", "Control steps by who decided", "mode", "source")
        self._latency = Histogram(
            "rl_autoscale_decision_seconds", "From telemetry to applied", buckets=_LATENCY_EDGES_S, registry=registry
        )
        self._last_step = gauge("last_step_timestamp_seconds", "Unix time of the last control step")
        self._mode = gauge("mode", "1 for the mode in force", "mode")
        self._breaker = gauge("breaker_open", "1 while the fallback rule decides")
        self._faults = counter("faults", "Steps with a fault of this kind", "kind")
        self._overrides = counter("overrides", "Proposals of the policy that the fleet can never have")
        self._outside = gauge("features_outside_training", "Features outside the policy's envelope")
        self._changes = counter("changes", "Changes of target that were applied", "pool", "direction")
        self._failures = counter("apply_failures", "Calls to back ends and gateway that failed", "target")
        self._raw = gauge("proposed_replicas", "As the policy, or the rule in its place, proposed", "pool")
        self._final = gauge(
            "final_replicas", "After shield and cool-downs; in shadow mode what would be applied", "pool"
        )
        self._failed = gauge("failed_replicas", "Replicas that crashed or never became ready", "pool")
        self._age = gauge("telemetry_age_seconds", "Age of a pool's or a class's telemetry at the decision", "row")
        self._coverage = gauge("telemetry_coverage", "Share of serving replicas with fresh readings", "pool")
        self._pool = {name: gauge(f"pool_{name}", f"FleetState: {name} per pool", "pool") for name in _POOL_GAUGES}
        self._class = {name: gauge(f"class_{name}", f"FleetState: {name} per class", "class") for name in _CLASS_GAUGES}
        self._attainment = gauge("class_slo_attainment", "Of the window: met over ended; NaN if none ended", "class")

    def __call__(self, record: StepRecord) -> None:
        """Take in one step."""
        self._show_zeros(record)
        self._steps.labels(record.mode, record.source).inc()
        self._latency.observe(record.latency_s)
        self._last_step.set(record.wall_s)
        for mode in MODES:
            self._mode.labels(mode).set(float(mode == record.mode))
        self._breaker.set(float(bool(record.breaker)))
        for kind in record.faults:
            self._faults.labels(kind).inc()
        self._overrides.inc(float(record.overridden))
        self._outside.set(len(record.outside))
        for target in record.failures:
            self._failures.labels(target).inc()
        for p, name in enumerate(record.pool_names):
            self._pool_metrics(record, p, name)
        attainment = slo_attainment(record)
        for c, name in enumerate(record.class_names):
            for field, gauge in self._class.items():
                gauge.labels(name).set(float(getattr(record.state.classes, field)[c]))
            self._attainment.labels(name).set(float(attainment[c]))
            self._age.labels(name).set(float(record.state.classes.age_s[c]))

    def _show_zeros(self, record: StepRecord) -> None:
        """A counter that only appears with its first event has no rate at that event."""
        for kind in FAULTS:
            self._faults.labels(kind)
        for name in record.pool_names:
            self._changes.labels(name, "up")
            self._changes.labels(name, "down")
        for target in (*record.pool_names, "gateway"):
            self._failures.labels(target)

    def _pool_metrics(self, record: StepRecord, p: int, name: str) -> None:
        for field, gauge in self._pool.items():
            gauge.labels(name).set(float(getattr(record.state.pools, field)[p]))
        final, current = int(record.final.target_replicas[p]), int(record.current[p])
        self._raw.labels(name).set(float(record.raw.target_replicas[p]))
        self._final.labels(name).set(float(final))
        self._failed.labels(name).set(float(len(record.report.failed.get(name, ()))))
        self._age.labels(name).set(float(record.state.pools.age_s[p]))
        self._coverage.labels(name).set(record.report.coverage.get(name, float("nan")))
        if record.applied and final != current and name not in record.failures:
            self._changes.labels(name, "up" if final > current else "down").inc()

    def page(self) -> bytes:
        """The text format of all metrics."""
        return generate_latest(self.registry)


def slo_attainment(record: StepRecord) -> FloatArray:
    """Requests that met their SLOs over those that ended or were turned away in the window, per class; NaN for none."""
    classes = record.state.classes
    ended = classes.finished_per_s + classes.refused_per_s + classes.dropped_per_s
    share = np.full_like(ended, np.nan)
    np.divide(classes.met_per_s, ended, out=share, where=ended > 0)
    return share
