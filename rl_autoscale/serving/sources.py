"""Where replica metrics come from: each replica's own ``/metrics``, or a Prometheus server that scrapes them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlencode, urlsplit

from rl_autoscale.serving.http_client import Http, HttpError, send
from rl_autoscale.serving.metric_names import EngineNames
from rl_autoscale.serving.protocols import Clock, Replica
from rl_autoscale.serving.samples import ReplicaSample, SeriesValue, build_sample, parse_exposition

_MAX_THREADS = 32


@dataclass(frozen=True, slots=True)
class Readings:
    """What a source could read: a sample or a reason for every replica asked for."""

    samples: dict[str, ReplicaSample] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


class MetricsSource(Protocol):
    """Reads the newest metrics of replicas; bounded in time, never raises for what a server does wrong."""

    def read(self, replicas: Sequence[Replica]) -> Readings:
        """Samples by replica id."""
        ...

    def close(self) -> None:
        """Let go of threads and connections."""
        ...


class DirectSource:
    """Scrapes every replica's metrics page, in parallel and within one time limit for all.

    Args:
        names: of the engine.
        clock: stamps the samples.
        http: see `http_client.Http`.
        timeout_s: for all scrapes together.
    """

    def __init__(self, names: EngineNames, clock: Clock, http: Http = send, *, timeout_s: float = 2.0) -> None:
        self._names = names
        self._clock = clock
        self._http = http
        self._timeout_s = timeout_s
        self._executor = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="scrape")
        self._pending: dict[str, Future[ReplicaSample]] = {}

    def read(self, replicas: Sequence[Replica]) -> Readings:
        """Scrape; a replica whose last scrape still hangs is not asked again."""
        readings = Readings()
        asked: dict[str, Future[ReplicaSample]] = {}
        self._pending = {key: scrape for key, scrape in self._pending.items() if not scrape.done()}
        for replica in replicas:
            if replica.url is None:
                readings.failures[replica.replica_id] = "no address yet"
            elif replica.replica_id in self._pending:
                readings.failures[replica.replica_id] = "the previous scrape still hangs"
            else:
                asked[replica.replica_id] = self._executor.submit(self._scrape, replica.url)
        wait(asked.values(), timeout=self._timeout_s)
        for replica_id, scrape in asked.items():
            if not scrape.done():
                self._pending[replica_id] = scrape
                readings.failures[replica_id] = f"no answer within {self._timeout_s:g} s"
            elif (error := scrape.exception()) is not None:
                readings.failures[replica_id] = str(error) or type(error).__name__
            else:
                readings.samples[replica_id] = scrape.result()
        return readings

    def close(self) -> None:
        """Start no further scrape; one under way ends within its time limit."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _scrape(self, url: str) -> ReplicaSample:
        taken_s = self._clock.monotonic_s()
        answer = self._http("GET", url.rstrip("/") + self._names.metrics_path, timeout_s=self._timeout_s)
        if answer.status != 200:
            raise HttpError(f"{url}{self._names.metrics_path}: status {answer.status}")
        sample = parse_exposition(answer.body.decode("utf-8", errors="replace"), self._names, taken_s)
        if sample.empty:
            raise HttpError(f"{url}{self._names.metrics_path}: holds none of the engine's metrics")
        return sample


class PrometheusSource:
    """Asks a Prometheus server for the newest raw series, so that rates, resets and quantiles have one copy: ours.

    Ages are Prometheus' evaluation time minus its scrape time, so this machine's wall clock plays no part.

    Args:
        url: of the server, for example ``http://prometheus:9090``.
        names: of the engine.
        clock: for ages.
        http: see `http_client.Http`.
        selector: label matchers that narrow the query to this fleet, for example ``job="vllm",namespace="llm"``.
        replica_label: the label that names a replica: its host:port (``instance``), or its id (``pod``).
        timeout_s: of each query.
    """

    def __init__(
        self,
        url: str,
        names: EngineNames,
        clock: Clock,
        http: Http = send,
        *,
        selector: str = "",
        replica_label: str = "instance",
        timeout_s: float = 2.0,
    ) -> None:
        self._url = url.rstrip("/") + "/api/v1/query"
        self._names = names
        self._clock = clock
        self._http = http
        self._replica_label = replica_label
        self._timeout_s = timeout_s
        more = f",{selector}" if selector else ""
        self._query = f'{{__name__=~"{names.name_pattern}"{more}}}'
        busiest = names.fields["running"].names[0].replace(":", "[:_]")
        self._age_query = f'timestamp({{__name__=~"{busiest}"{more}}})'

    def read(self, replicas: Sequence[Replica]) -> Readings:
        """Two instant queries, whatever the number of replicas."""
        try:
            asked_s = self._clock.monotonic_s()
            series = self._ask(self._query)
            stamps = self._ask(self._age_query)
        except (HttpError, ValueError) as error:
            return Readings(failures={replica.replica_id: str(error) for replica in replicas})
        by_replica: defaultdict[str, list[SeriesValue]] = defaultdict(list)
        for labels, _, value in series:
            by_replica[labels.get(self._replica_label, "")].append((labels.get("__name__", ""), labels, value))
        ages = {labels.get(self._replica_label, ""): max(now_s - at_s, 0.0) for labels, now_s, at_s in stamps}
        readings = Readings()
        for replica in replicas:
            key = self._key(replica)
            sample = build_sample(by_replica.get(key, []), self._names, asked_s - ages.get(key, 0.0))
            if sample.empty or key not in ages:
                readings.failures[replica.replica_id] = f"Prometheus has no series with {self._replica_label}='{key}'"
            else:
                readings.samples[replica.replica_id] = sample
        return readings

    def close(self) -> None:
        """Nothing is kept between reads."""

    def _key(self, replica: Replica) -> str:
        if self._replica_label == "instance":
            return urlsplit(replica.url or "").netloc
        return replica.replica_id

    def _ask(self, query: str) -> list[tuple[dict[str, str], float, float]]:
        """(labels, evaluation time, value) of every series of an instant vector."""
        answer = self._http(
            "POST",
            self._url,
            body=urlencode({"query": query}).encode(),
            headers={"Content-Type": "application/x-www-form-urlencoded"},
            timeout_s=self._timeout_s,
        )
        if answer.status != 200:
            raise HttpError(f"{self._url}: status {answer.status}")
        try:
            data: Any = json.loads(answer.body)["data"]["result"]
            return [(item["metric"], float(item["value"][0]), float(item["value"][1])) for item in data]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{self._url}: not the answer of a Prometheus server ({error!r})") from None
