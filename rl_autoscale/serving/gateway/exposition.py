"""The gateway's Prometheus page, made from a snapshot when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from rl_autoscale.serving.gateway_api import (
    METRIC_PREFIX,
    ClassSnapshot,
    GatewaySnapshot,
    HistogramSnapshot,
    PoolSnapshot,
)

_ENDED = ("finished", "refused", "dropped", "cancelled", "failed")

CLASS_COUNTERS = {
    "arrivals": "Requests that arrived",
    "arrived_prompt_tokens": "Their prompt tokens, estimated",
    "first_tokens": "Requests whose first token went out",
    "late_first_tokens": "Of these, after the TTFT SLO; or late answers that do not stream",
    "met": "Requests finished with every SLO met",
    "slow_answers": "Requests finished late by their pace alone; not those of a few tokens",
    "finished_output_tokens": "Output tokens of finished requests",
}
CLASS_GAUGES = {
    "queue_length": "Requests held in the queue",
    "queued_prompt_tokens": "Their prompt tokens, estimated",
    "oldest_wait_s": "Age of the oldest held request, seconds",
    "in_flight": "Requests sent to replicas and not finished",
    "admission": "A request is refused when its expected TTFT exceeds this multiple of its SLO; +Inf never refuses",
    "selectivity": "The wait in it counts (work / mean work) to this power; 0 treats all requests alike",
}
POOL_GAUGES = {
    "in_flight": "Requests on the pool's replicas",
    "in_flight_interactive": "The interactive part",
    "busy_interactive": "Replicas with interactive work",
    "pending_prompt_tokens": "Prompt tokens sent whose first token has not come, estimated",
    "batch_cap": "Requests in flight allowed per replica",
}


class _Snapshots(Collector):
    """Translates one snapshot."""

    def __init__(self, snapshot: GatewaySnapshot, turned_away: Mapping[str, int], bytes_per_token: float) -> None:
        self._snapshot = snapshot
        self._turned_away = turned_away
        self._bytes_per_token = bytes_per_token

    def collect(self) -> Iterable[Metric]:
        classes, pools = self._snapshot.classes, self._snapshot.pools
        for field, text in CLASS_COUNTERS.items():
            yield _counter(field, text, "class", {name: getattr(book, field) for name, book in classes.items()})
        yield _ended(classes)
        for field, text in CLASS_GAUGES.items():
            yield _gauge(field, text, "class", {name: _level(book, field) for name, book in classes.items()})
        yield _histogram("ttft_seconds", "Arrival to first token", {n: book.ttft for n, book in classes.items()})
        yield _histogram("tpot_seconds", "Per output token after the first", {n: b.tpot for n, b in classes.items()})
        for field, text in POOL_GAUGES.items():
            yield _gauge("pool_" + field, text, "pool", {name: getattr(pool, field) for name, pool in pools.items()})
        yield _counter("pool_evictions", "Batch requests evicted", "pool", _evictions(pools))
        replicas = self._snapshot.in_flight_by_replica
        yield _gauge("replica_in_flight", "Requests on a replica", "replica", replicas)
        yield _counter("turned_away", "Not counted as arrivals: invalid or from strangers", "reason", self._turned_away)
        yield _gauge("bytes_per_token", "Ratio by which prompt tokens are estimated", "", {"": self._bytes_per_token})


def exposition(snapshot: GatewaySnapshot, turned_away: Mapping[str, int], bytes_per_token: float) -> bytes:
    """Prometheus text format."""
    registry = CollectorRegistry()
    registry.register(_Snapshots(snapshot, turned_away, bytes_per_token))
    return generate_latest(registry)


def _level(book: ClassSnapshot, field: str) -> float:
    value = getattr(book, field)
    return float("inf") if value is None else float(value)


def _evictions(pools: Mapping[str, PoolSnapshot]) -> dict[str, int]:
    return {name: pool.evictions for name, pool in pools.items()}


def _ended(classes: Mapping[str, ClassSnapshot]) -> Metric:
    family = CounterMetricFamily(f"{METRIC_PREFIX}_ended", "Requests by how they ended", labels=["class", "outcome"])
    for name, book in classes.items():
        for outcome in _ENDED:
            family.add_metric([name, outcome], getattr(book, outcome))
    return family


def _counter(field: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"{METRIC_PREFIX}_{field}", text, labels=[label])
    for name, value in values.items():
        family.add_metric([name], value)
    return family


def _gauge(field: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"{METRIC_PREFIX}_{field}", text, labels=[label] if label else [])
    for name, value in values.items():
        family.add_metric([name] if label else [], value)
    return family


def _histogram(field: str, text: str, values: Mapping[str, HistogramSnapshot]) -> Metric:
    family = HistogramMetricFamily(f"{METRIC_PREFIX}_{field}", text, labels=["class"])
    for name, histogram in values.items():
        buckets = [(str(bound), count) for bound, count in zip(histogram.bounds_s, histogram.counts, strict=True)]
        family.add_metric([name], [*buckets, ("+Inf", histogram.count)], histogram.sum_s)
    return family
