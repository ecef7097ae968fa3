"""Past traffic out of Prometheus: requests and token lengths per time bucket, of the engines or of the gateway.

The sums over replicas are made by the server (``sum(increase(...[bucket]))``): a week of raw series of a fleet would
not fit a request. ``increase`` knows counter resets; it needs two scrapes inside a bucket, and gives nothing, not zero,
where it has fewer. So do we.

An engine counts a request when its first token comes out, and never counts one that was turned away or gave up before.
What the fleet could not serve is therefore not in its history; the gateway's history has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import numpy as np

from rl_autoscale.fleet.errors import TraceError
from rl_autoscale.serving.gateway_api import METRIC_PREFIX
from rl_autoscale.serving.http_client import Http, HttpError, send
from rl_autoscale.serving.metric_names import EngineNames, engine_names
from rl_autoscale.workload.bucket_csv import mean_per_request
from rl_autoscale.workload.buckets import BucketLengths, BucketSeries
from rl_autoscale.workload.trace import BoolArray, FloatArray

GATEWAY = "gateway"
"""In the place of an engine's name: our gateway's series, which know classes and what was refused."""

POINTS_PER_QUERY = 1000
MAX_BUCKETS = 200_000
MIN_STEP_S = 5.0

Progress = Callable[[int, int], None]
"""Told queries done and in all."""


@dataclass(frozen=True, slots=True)
class Window:
    """Buckets of ``step_s`` seconds from ``start_s`` (seconds since 1970).

    Raises:
        TraceError: nothing in it, too short buckets or too many.
    """

    start_s: float
    end_s: float
    step_s: float

    def __post_init__(self) -> None:
        if not self.step_s >= MIN_STEP_S:
            raise TraceError(f"--step {self.step_s:g} s is below {MIN_STEP_S:g} s; a bucket needs at least two scrapes")
        if self.end_s - self.start_s < self.step_s:
            raise TraceError(
                f"--from to --to is {self.end_s - self.start_s:g} s, less than one --step of {self.step_s:g} s"
            )
        if self.num_buckets > MAX_BUCKETS:
            raise TraceError(f"{self.num_buckets:,} buckets; ask for at most {MAX_BUCKETS:,}: raise --step")

    @property
    def num_buckets(self) -> int:
        """Whole buckets."""
        return int((self.end_s - self.start_s) / self.step_s + 1e-9)


class PrometheusHistory:
    """Range queries for traffic.

    Args:
        url: of the server, for example ``http://prometheus:9090``; a prefix (Mimir's ``/prometheus``) is kept.
        engine: an engine of `metric_names.yaml`, or `GATEWAY`.
        selector: label matchers that narrow every query, for example ``job="vllm",namespace="llm"``.
        http: see `http_client.Http`.
        token: bearer token, where the server wants one.
        timeout_s: of each query.
    """

    def __init__(
        self,
        url: str,
        *,
        engine: str = "vllm",
        selector: str = "",
        http: Http = send,
        token: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._url = url.rstrip("/")
        self._names: EngineNames | None = None if engine == GATEWAY else engine_names(engine)
        self._more = f",{selector}" if selector else ""
        self._http = http
        self._headers = {"Content-Type": "application/x-www-form-urlencoded"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout_s = timeout_s
        self._engine = engine

    def read(self, window: Window, progress: Progress | None = None) -> list[BucketSeries]:
        """Traffic per bucket; one series per class from the gateway, one without a class from engines.

        Raises:
            TraceError: the server cannot be reached or does not understand, or has nothing of the kind.
        """
        asked = _Asked(self._range, window, progress, 5 if self._names is None else 7)
        series = self._from_gateway(asked) if self._names is None else [self._from_engine(self._names, asked)]
        if not series or all(np.isnan(item.arrivals).all() for item in series):
            raise TraceError(
                f"{self._url} has no {self._engine} traffic in this time"
                f"{f' with {self._more[1:]}' if self._more else ''}; check --from, --to, --selector and --engine, and "
                f"that --step ({window.step_s:g} s) spans at least two scrapes"
            )
        return series

    def _from_gateway(self, asked: _Asked) -> list[BucketSeries]:
        fields = ("arrivals", "arrived_prompt_tokens", "finished_output_tokens")
        columns = {field: asked.by_label("class", self._increase(f"{METRIC_PREFIX}_{field}_total")) for field in fields}
        finished = asked.by_label("class", self._increase(f"{METRIC_PREFIX}_ended_total", 'outcome="finished"'))
        found = []
        for name, arrivals in columns["arrivals"].items():
            nothing = np.full(asked.window.num_buckets, math.nan)
            prompt = mean_per_request(columns["arrived_prompt_tokens"].get(name, nothing), arrivals)
            output = mean_per_request(columns["finished_output_tokens"].get(name, nothing), finished.get(name, nothing))
            lengths = BucketLengths.of_means(prompt), BucketLengths.of_means(output)
            found.append(BucketSeries(name, asked.window.start_s, asked.window.step_s, arrivals, *lengths))
        return found

    def _from_engine(self, names: EngineNames, asked: _Asked) -> BucketSeries:
        arrivals = self._sum(names, asked, "ttft", "_count")
        prompt = self._lengths(names, asked, "prompt_lengths", "prompt_tokens", arrivals)
        output = self._lengths(names, asked, "output_tokens", "generation_tokens", arrivals)
        return BucketSeries(None, asked.window.start_s, asked.window.step_s, arrivals, prompt, output)

    def _lengths(
        self, names: EngineNames, asked: _Asked, histogram: str, counter: str, arrivals: FloatArray
    ) -> BucketLengths:
        """From the engine's histogram of lengths; else the mean, from its token counter."""
        for name in names.fields[histogram].names if histogram in names.fields else ():
            buckets = asked.by_label("le", self._increase(f"{_either(name)}_bucket"))
            if buckets:
                total = asked.total(self._increase(f"{_either(name)}_sum"))
                count = asked.total(self._increase(f"{_either(name)}_count"))
                return _histogram_lengths(buckets, total, count)
        if counter not in names.fields:
            return BucketLengths.of_means(np.full(asked.window.num_buckets, math.nan))
        return BucketLengths.of_means(mean_per_request(self._sum(names, asked, counter, "(_total)?"), arrivals))

    def _sum(self, names: EngineNames, asked: _Asked, field: str, suffix: str) -> FloatArray:
        """Increase of the first of a field's names that has any data."""
        found = np.full(asked.window.num_buckets, math.nan)
        for name in names.fields[field].names if field in names.fields else ():
            found = asked.total(self._increase(_either(name) + suffix))
            if not np.isnan(found).all():
                break
        return found

    def _increase(self, name_pattern: str, matcher: str = "") -> str:
        own = f",{matcher}" if matcher else ""
        return f'increase({{__name__=~"{name_pattern}"{own}{self._more}}}[{{step}}])'

    def _range(self, query: str, start_s: float, end_s: float, step_s: float) -> list[Any]:
        """The series of a range query: ``{"metric": labels, "values": [[time, text], ...]}``."""
        form = {"query": query, "start": f"{start_s:.3f}", "end": f"{end_s:.3f}", "step": f"{step_s:g}"}
        url = f"{self._url}/api/v1/query_range"
        try:
            answer = self._http(
                "POST", url, body=urlencode(form).encode(), headers=self._headers, timeout_s=self._timeout_s
            )
        except HttpError as error:
            raise TraceError(f"{error}; check --prometheus") from None
        try:
            said: Any = json.loads(answer.body)
            reason = "" if answer.status == 200 else str(said["error"])
            result: list[Any] = [] if reason else said["data"]["result"]
        except (ValueError, KeyError, TypeError):
            raise TraceError(f"{url}: status {answer.status}, not the answer of a Prometheus server") from None
        if reason:
            raise TraceError(f"{url}: status {answer.status}: {reason}")
        return result


class _Asked:
    """Range queries over one window, cut into pieces that the server answers."""

    def __init__(
        self,
        ask: Callable[[str, float, float, float], list[Any]],
        window: Window,
        progress: Progress | None,
        num_queries: int,
    ) -> None:
        self.window = window
        self._ask = ask
        self._progress = progress
        self._done = 0
        self._total = num_queries * len(list(self._pieces()))

    def total(self, increase: str) -> FloatArray:
        """Sum over all series per bucket; shape (num_buckets,), NaN where the server has nothing."""
        return self._read(f"sum({increase})", None).get("", np.full(self.window.num_buckets, math.nan))

    def by_label(self, label: str, increase: str) -> dict[str, FloatArray]:
        """The same for every value of a label."""
        return self._read(f"sum by ({label}) ({increase})", label)

    def _read(self, query: str, label: str | None) -> dict[str, FloatArray]:
        window = self.window
        query = query.replace("{step}", f"{round(window.step_s * 1000)}ms")
        found: dict[str, FloatArray] = {}
        for begin, end in self._pieces():
            # a point at t covers the bucket that ends at t
            first_s, last_s = window.start_s + (begin + 1) * window.step_s, window.start_s + end * window.step_s
            for series in self._ask(query, first_s, last_s, window.step_s):
                key = series["metric"].get(label, "") if label is not None else ""
                column = found.setdefault(key, np.full(window.num_buckets, math.nan))
                for at_s, text in series["values"]:
                    bucket = round((float(at_s) - window.start_s) / window.step_s) - 1
                    value = float(text)
                    if 0 <= bucket < window.num_buckets and math.isfinite(value) and value >= 0:
                        column[bucket] = value
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, max(self._total, self._done))
        return found

    def _pieces(self) -> Iterator[tuple[int, int]]:
        size = self.window.num_buckets
        for begin in range(0, size, POINTS_PER_QUERY):
            yield begin, min(begin + POINTS_PER_QUERY, size)


def _either(name: str) -> str:
    """Both spellings of a metric's colon."""
    return name.replace(":", "[:_]")


def _histogram_lengths(buckets: dict[str, FloatArray], total: FloatArray, count: FloatArray) -> BucketLengths:
    """Cumulative ``le`` columns made into counts; a bucket that lacks a column says nothing of its lengths."""
    columns = {edge: column for text, column in buckets.items() if math.isfinite(edge := float(text))}
    edges = np.array(sorted(columns))
    cumulative = np.stack([*(columns[edge] for edge in edges), count], axis=1)
    known: BoolArray = np.asarray(np.isfinite(cumulative).all(axis=1))
    # increase() extrapolates each column on its own, so that cumulative counts may fall by a last bit
    rising = np.maximum.accumulate(np.where(known[:, None], cumulative, 0.0), axis=1)
    return BucketLengths(mean_per_request(total, count), edges, np.diff(rising, axis=1, prepend=0.0))
