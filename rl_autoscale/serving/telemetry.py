"""Readings of replicas, back ends and gateway made into the rows of a `FleetState`.

What a number means when something is missing:

- A field that fewer than ``min_coverage`` of a pool's serving replicas have told within ``stale_after_s`` is NaN.
- With enough of them, sums are scaled up to all serving replicas: three silent replicas of ten are no drop in load.
- A pool without serving replicas runs nothing, and that is a zero, not a gap.
- The age of a row is the mean age of its replicas' readings (never below the back end's), so that one silent replica
  of a hundred ages the row a little and not wholly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from rl_autoscale.fleet.histogram import histogram_quantile
from rl_autoscale.fleet.spec import FleetSpec, ServiceClass
from rl_autoscale.fleet.state import NEVER_REFUSE, ClassTelemetry, FloatArray, PoolTelemetry
from rl_autoscale.serving.gateway_api import ClassSnapshot, GatewaySnapshot, HistogramSnapshot, PoolSnapshot
from rl_autoscale.serving.protocols import PoolObservation, Replica
from rl_autoscale.serving.samples import Histogram
from rl_autoscale.serving.windows import (
    ReplicaTrack,
    Stamped,
    counter_difference,
    histogram_difference,
    merge_histograms,
)

Row = dict[str, float]
TAIL_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class Limits:
    """When a reading is too old, and how much of a pool must be seen."""

    stale_after_s: float
    min_coverage: float


class PoolReadings:
    """The serving replicas of one pool at one moment.

    Args:
        serving: ready and draining replicas.
        tracks: of all replicas, by id.
        now_s: monotonic.
        limits: see `Limits`.
    """

    def __init__(
        self, serving: Sequence[Replica], tracks: Mapping[str, ReplicaTrack], now_s: float, limits: Limits
    ) -> None:
        self._tracks = [tracks[replica.replica_id] for replica in serving]
        self._ready = [tracks[replica.replica_id] for replica in serving if replica.phase == "ready"]
        self._now_s = now_s
        self._limits = limits

    @staticmethod
    def joined(pools: Sequence[PoolReadings]) -> PoolReadings:
        """The serving replicas of several pools, read at the same moment, as one."""
        whole = PoolReadings([], {}, pools[0]._now_s, pools[0]._limits)
        whole._tracks = [track for pool in pools for track in pool._tracks]
        whole._ready = [track for pool in pools for track in pool._ready]
        return whole

    def coverage(self) -> float:
        """Share of the serving replicas whose batch size is known and fresh; 1 where nothing serves."""
        return len(self._fresh("gauges", "running", self._tracks)) / len(self._tracks) if self._tracks else 1.0

    def age_s(self) -> float:
        """Mean age of the replicas' readings; one that never spoke is as old as its row. 0 where nothing serves."""
        born = [track.sample.taken_s if track.sample is not None else track.since_s for track in self._tracks]
        return float(np.mean([self._now_s - at_s for at_s in born])) if born else 0.0

    def field_age_s(self, name: str) -> float:
        """Mean age of one field over the replicas that have ever told it; inf if none has."""
        stamps = [
            stamped.at_s for track in self._tracks for kind in (track.gauges, track.events, track.values)
            if (stamped := kind.get(name)) is not None
        ]  # fmt: skip
        return self._now_s - float(np.mean(stamps)) if stamps else math.inf

    def total(self, name: str) -> float:
        """Sum of a gauge over all serving replicas."""
        known = [item.value for item in self._fresh("gauges", name, self._tracks)]
        return self._scaled(sum(known), len(known), len(self._tracks))

    def mean_of_ready(self, name: str) -> float:
        """Mean of a gauge over the ready replicas; 0 without any."""
        known = [item.value for item in self._fresh("gauges", name, self._ready)]
        return self._scaled(sum(known), len(known), len(self._ready)) / max(len(self._ready), 1)

    def per_s(self, name: str) -> float:
        """Rate of a counter over all serving replicas, each over its own last window."""
        known = [item.value / item.span_s for item in self._fresh("events", name, self._tracks)]
        return self._scaled(sum(known), len(known), len(self._tracks))

    def counts_per_s(self, name: str) -> float:
        """Rate of the values that entered a histogram."""
        known = [item.value.count / item.span_s for item in self._fresh("values", name, self._tracks)]
        return self._scaled(sum(known), len(known), len(self._tracks))

    def histogram(self, name: str) -> Histogram | None:
        """All replicas' values of the last window; None if no replica has any reading."""
        return merge_histograms([item.value for item in self._fresh("values", name, self._tracks)])

    def working(self) -> float:
        """How many serving replicas have any request."""
        known = [
            min(track.gauges["running"].value + track.gauges["waiting"].value, 1.0)
            for track in self._tracks
            if self._is_fresh(track.gauges.get("running")) and self._is_fresh(track.gauges.get("waiting"))
        ]
        return self._scaled(float(np.count_nonzero(known)), len(known), len(self._tracks))

    def _fresh(self, kind: str, name: str, tracks: list[ReplicaTrack]) -> list[Stamped]:  # type: ignore[type-arg]
        found = (getattr(track, kind).get(name) for track in tracks)
        return [item for item in found if self._is_fresh(item)]

    def _is_fresh(self, item: Stamped | None) -> bool:  # type: ignore[type-arg]
        return item is not None and self._now_s - item.at_s <= self._limits.stale_after_s

    def _scaled(self, known_sum: float, num_known: int, num_all: int) -> float:
        if num_all == 0:
            return 0.0
        if num_known == 0 or num_known < self._limits.min_coverage * num_all:
            return math.nan
        return known_sum * num_all / num_known


@dataclass(frozen=True, slots=True)
class GatewayWindow:
    """Two snapshots of one gateway life and the seconds between them; ``before`` is None when there is no window."""

    now: GatewaySnapshot
    before: GatewaySnapshot | None

    @staticmethod
    def between(before: GatewaySnapshot | None, now: GatewaySnapshot) -> GatewayWindow:
        """A restart of the gateway, or a snapshot that did not move on, leaves no window."""
        same = before is not None and before.started_at_s == now.started_at_s and now.uptime_s > before.uptime_s
        return GatewayWindow(now, before if same else None)

    @property
    def span_s(self) -> float:
        """Length; NaN without a window."""
        return math.nan if self.before is None else self.now.uptime_s - self.before.uptime_s


def pool_row(
    pool_index: int,
    spec: FleetSpec,
    seen: PoolObservation | None,
    readings: PoolReadings,
    gateway: GatewayWindow | None,
    window_s: float,
) -> Row:
    """One row of `PoolTelemetry` without its age; everything of a back end that does not answer is NaN."""
    running, waiting = readings.total("running"), readings.total("waiting")
    itl = readings.histogram("itl")
    row = _replica_counts(seen) | {
        "running": running,
        "waiting": waiting,
        "kv_usage": readings.mean_of_ready("kv_usage"),
        "itl_s": math.nan if itl is None else itl.mean,
        "preemptions": readings.per_s("preemptions") * window_s,
        "prompt_tokens_per_s": readings.per_s("prompt_tokens"),
        "generation_tokens_per_s": readings.per_s("generation_tokens"),
    }
    name = spec.pool_names[pool_index]
    if gateway is not None and name in gateway.now.pools:
        before = gateway.before.pools.get(name) if gateway.before is not None else None
        return row | _pool_at_gateway(gateway.now.pools[name], before, gateway.span_s, window_s)
    return row | _pool_without_gateway(spec, pool_index, readings, running + waiting, waiting)


def _replica_counts(seen: PoolObservation | None) -> Row:
    if seen is None:
        names = ("ready", "starting", "draining", "asked_for", "oldest_start_age_s", "newest_start_age_s")
        return dict.fromkeys(names, math.nan)
    phases = [replica.phase for replica in seen.replicas]
    starts = [replica.phase_age_s for replica in seen.replicas if replica.phase == "starting"]
    return {
        "ready": phases.count("ready"),
        "starting": len(starts),
        "draining": phases.count("draining"),
        "asked_for": math.nan if seen.asked_for is None else seen.asked_for,
        "oldest_start_age_s": max(starts, default=0.0),
        "newest_start_age_s": min(starts, default=0.0),
    }


def _pool_at_gateway(now: PoolSnapshot, before: PoolSnapshot | None, span_s: float, window_s: float) -> Row:
    evictions = math.nan if before is None else (now.evictions - before.evictions) / span_s * window_s
    return {
        "in_flight": now.in_flight,
        "in_flight_interactive": now.in_flight_interactive,
        "busy_interactive": now.busy_interactive,
        "pending_prompt_tokens": now.pending_prompt_tokens,
        "batch_cap": now.batch_cap,
        "evictions": evictions,
    }


def _pool_without_gateway(
    spec: FleetSpec, pool_index: int, readings: PoolReadings, in_flight: float, waiting: float
) -> Row:
    """Engines know no classes; a fleet without a gateway has one (checked by `LiveFleet`), so its kind decides."""
    interactive = spec.classes[0].kind == "interactive"
    return {
        "in_flight": in_flight,
        "in_flight_interactive": in_flight if interactive else 0.0,
        "busy_interactive": readings.working() if interactive else 0.0,
        "pending_prompt_tokens": 0.0 if waiting == 0 else waiting * mean_prompt_tokens(readings),
        "batch_cap": float(spec.batch_limits[pool_index]),
        "evictions": 0.0,
    }


def mean_prompt_tokens(readings: PoolReadings) -> float:
    """Of the requests that got their first token in the window (both counters move then); NaN without any."""
    first_tokens_per_s = readings.counts_per_s("ttft")
    return readings.per_s("prompt_tokens") / first_tokens_per_s if first_tokens_per_s > 0 else math.nan


def class_row_at_gateway(name: str, window: GatewayWindow) -> Row:
    """One row of `ClassTelemetry` without its age, from the gateway's own books; NaN for a class it does not know."""
    now = window.now.classes.get(name)
    if now is None:
        return dict.fromkeys((item.name for item in fields(ClassTelemetry) if item.name != "age_s"), math.nan)
    before = window.before.classes.get(name) if window.before is not None else None
    ttft, tpot = _between(before, now, "ttft"), _between(before, now, "tpot")

    def grown(counter: str) -> float:
        return math.nan if before is None else counter_difference(getattr(before, counter), getattr(now, counter))

    finished = grown("finished")
    return {
        "arrivals_per_s": grown("arrivals") / window.span_s,
        "arrived_prompt_tokens_per_s": grown("arrived_prompt_tokens") / window.span_s,
        "queue_length": now.queue_length,
        "queued_prompt_tokens": now.queued_prompt_tokens,
        "oldest_wait_s": now.oldest_wait_s,
        "in_flight": now.in_flight,
        "first_tokens_per_s": grown("first_tokens") / window.span_s,
        "late_first_tokens_per_s": grown("late_first_tokens") / window.span_s,
        **_latencies(ttft, tpot),
        "finished_per_s": finished / window.span_s,
        "met_per_s": grown("met") / window.span_s,
        "slow_answers_per_s": grown("slow_answers") / window.span_s,
        "mean_output_tokens": grown("finished_output_tokens") / finished if finished > 0 else math.nan,
        "refused_per_s": grown("refused") / window.span_s,
        "dropped_per_s": (grown("dropped") + grown("failed")) / window.span_s,
        "admission": NEVER_REFUSE if now.admission is None else now.admission,
    }


def class_row_without_gateway(service_class: ServiceClass, readings: PoolReadings, waiting_growth_per_s: float) -> Row:
    """The only class of a fleet without a gateway, from the engines' histograms.

    vLLM counts no arrivals: those of a window are its first tokens, what the engines' queues grew by, and what they
    rejected. ``met_per_s`` is an upper bound, since TTFT and TPOT histograms do not say which requests met both; so is
    ``slow_answers_per_s``, which here holds short answers, too.
    """
    ttft, tpot = readings.histogram("ttft"), readings.histogram("tpot")
    first_tokens_per_s, finished_per_s = readings.counts_per_s("ttft"), readings.per_s("finished")
    rejected_per_s = float(np.nan_to_num(readings.per_s("rejected")))  # older engines reject nothing and say nothing
    arrivals_per_s = max(first_tokens_per_s + waiting_growth_per_s, 0.0) + rejected_per_s
    output = readings.histogram("output_tokens")
    begun_in_time = math.nan if ttft is None else ttft.share_up_to(service_class.ttft_slo_s)
    at_pace = math.nan if tpot is None else tpot.share_up_to(service_class.tpot_slo_s)
    return {
        "arrivals_per_s": arrivals_per_s,
        "arrived_prompt_tokens_per_s": arrivals_per_s * mean_prompt_tokens(readings) if arrivals_per_s else 0.0,
        "queue_length": 0.0,
        "queued_prompt_tokens": 0.0,
        "oldest_wait_s": 0.0,
        "in_flight": readings.total("running") + readings.total("waiting"),
        "first_tokens_per_s": first_tokens_per_s,
        "late_first_tokens_per_s": 0.0 if first_tokens_per_s == 0 else first_tokens_per_s * (1.0 - begun_in_time),
        **_latencies(ttft, tpot),
        "finished_per_s": finished_per_s,
        "met_per_s": 0.0 if finished_per_s == 0 else finished_per_s * min(begun_in_time, at_pace),
        "slow_answers_per_s": 0.0 if finished_per_s == 0 else finished_per_s * (1.0 - at_pace),
        "mean_output_tokens": math.nan if output is None else output.mean,
        "refused_per_s": 0.0,
        "dropped_per_s": rejected_per_s,
        "admission": NEVER_REFUSE,
    }


def _latencies(ttft: Histogram | None, tpot: Histogram | None) -> Row:
    row = {}
    for name, histogram in (("ttft", ttft), ("tpot", tpot)):
        row[f"{name}_mean_s"] = row[f"{name}_p95_s"] = math.nan
        if histogram is not None:
            row[f"{name}_mean_s"] = histogram.mean
            row[f"{name}_p95_s"] = histogram_quantile(histogram.counts, histogram.edges, TAIL_SHARE)
    return row


def _between(before: ClassSnapshot | None, now: ClassSnapshot, name: str) -> Histogram | None:
    if before is None:
        return None
    return histogram_difference(_plain(getattr(before, name)), _plain(getattr(now, name)))


def _plain(snapshot: HistogramSnapshot) -> Histogram:
    cumulative = np.array([*snapshot.counts, snapshot.count], dtype=np.float64)
    return Histogram(np.array(snapshot.bounds_s), np.diff(cumulative, prepend=0.0), snapshot.sum_s)


def columns(kind: type[PoolTelemetry] | type[ClassTelemetry], rows: Sequence[Row]) -> dict[str, FloatArray]:
    """One float64 array per field, shape (num_rows,); a row must name every field."""
    return {item.name: np.array([row[item.name] for row in rows], dtype=np.float64) for item in fields(kind)}
