"""One look at one replica: series of a scrape (or of a PromQL answer) turned into our fields.

A field that is absent, not a number, infinite or negative is *missing*: it is left out, never zero.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from rl_autoscale.fleet.state import FloatArray
from rl_autoscale.serving.metric_names import EngineNames, normalise

SeriesValue = tuple[str, Mapping[str, str], float]
"""Series name, labels, value."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram as fleet/histogram.py wants it.

    Attributes:
        edges: shape (n,), increasing upper bounds, seconds (or tokens).
        counts: shape (n + 1,), values per bucket, not cumulative; the last entry is beyond all edges.
        total: sum of all values.
    """

    edges: FloatArray
    counts: FloatArray
    total: float

    @property
    def count(self) -> float:
        """How many values."""
        return float(self.counts.sum())

    @property
    def mean(self) -> float:
        """NaN without values."""
        return self.total / self.count if self.count > 0 else math.nan

    def share_up_to(self, bound: float) -> float:
        """Share of the values at most ``bound``, linear inside its bucket; NaN without values."""
        if self.count == 0:
            return math.nan
        knots = np.concatenate(([0.0], self.edges))
        cumulative = np.concatenate(([0.0], np.cumsum(self.counts[:-1])))
        return float(np.interp(bound, knots, cumulative) / self.count)


@dataclass(frozen=True, slots=True)
class ReplicaSample:
    """What one replica said.

    Attributes:
        taken_s: when, on the controller's monotonic clock.
        gauges: field -> value.
        counters: field -> value since the engine began.
        histograms: field -> values since the engine began.
    """

    taken_s: float
    gauges: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing we know was in it."""
        return not (self.gauges or self.counters or self.histograms)


@dataclass(slots=True)
class _Parts:
    """The series of one field under one of its names, summed over data-parallel ranks."""

    value: float = 0.0
    num_values: int = 0
    total: float | None = None
    count: float | None = None
    buckets: defaultdict[float, float] = field(default_factory=lambda: defaultdict(float))


def parse_exposition(text: str, names: EngineNames, taken_s: float) -> ReplicaSample:
    """Read the text format of ``/metrics``.

    Raises:
        ValueError: a line of ours cannot be parsed.
    """
    return build_sample(_read_lines(text, names), names, taken_s)


def _read_lines(text: str, names: EngineNames) -> Iterator[SeriesValue]:
    """The lines that are ours; what stands before a value is read once and then known (it is the same every time)."""
    for line in text.splitlines():
        if _series_name(line) not in names.index:
            continue
        series, _, value = line.rstrip().rpartition(" ")
        name, labels = _read_series(series)
        yield name, labels, float(value)


@lru_cache(maxsize=65536)
def _read_series(series: str) -> tuple[str, Mapping[str, str]]:
    """Name and labels, by Prometheus' own parser."""
    (family,) = text_string_to_metric_families(f"{series} 1\n")
    (sample,) = family.samples
    if sample.timestamp is not None:
        raise ValueError(f"'{series} ...' carries a timestamp; engines do not")
    return sample.name, sample.labels


def build_sample(series: Iterable[SeriesValue], names: EngineNames, taken_s: float) -> ReplicaSample:
    """Sort series into fields; of a field's names the first that is present counts."""
    parts: dict[tuple[str, int], _Parts] = {}
    broken: set[tuple[str, int]] = set()
    for name, labels, value in series:
        meaning = names.index.get(normalise(name))
        if meaning is None or not _label_allowed(names, meaning.field, labels):
            continue
        key = (meaning.field, meaning.rank)
        if not math.isfinite(value) or value < 0:
            broken.add(key)
            continue
        found = parts.setdefault(key, _Parts())
        if meaning.part == "value":
            found.value += value
            found.num_values += 1
        elif meaning.part == "sum":
            found.total = (found.total or 0.0) + value
        elif meaning.part == "count":
            found.count = (found.count or 0.0) + value
        else:
            found.buckets[float(labels.get("le", "nan"))] += value
    sample = ReplicaSample(taken_s)
    for name in names.fields:
        for rank in range(len(names.fields[name].names)):
            if (name, rank) in parts and (name, rank) not in broken and _store(sample, names, name, parts[name, rank]):
                break
    return sample


def _store(sample: ReplicaSample, names: EngineNames, name: str, parts: _Parts) -> bool:
    """Put one field into the sample; False when it is incomplete."""
    spec = names.fields[name]
    if spec.kind == "histogram":
        histogram = make_histogram(parts.buckets.items(), parts.total, parts.count)
        if histogram is not None:
            sample.histograms[name] = histogram
        return histogram is not None
    if parts.num_values == 0:
        return False
    target = sample.gauges if spec.kind == "gauge" else sample.counters
    target[name] = parts.value / parts.num_values if spec.combine == "mean" else parts.value
    return True


def make_histogram(
    buckets: Iterable[tuple[float, float]], total: float | None, count: float | None
) -> Histogram | None:
    """A histogram from cumulative buckets, or None when a scrape was cut off inside it or it contradicts itself."""
    finite = sorted((edge, value) for edge, value in buckets if math.isfinite(edge))
    if total is None or count is None or not finite:
        return None
    cumulative = np.array([value for _, value in finite] + [count])
    counts = np.diff(cumulative, prepend=0.0)
    if (counts < 0).any():
        return None
    return Histogram(np.array([edge for edge, _ in finite]), counts, total)


def _label_allowed(names: EngineNames, name: str, labels: Mapping[str, str]) -> bool:
    wanted = names.fields[name].labels
    return all(labels.get(label, values[0]) in values for label, values in wanted.items())


def _series_name(line: str) -> str:
    """The normalised name at the start of a line; empty for comments, so that they are skipped."""
    if line.startswith("#"):
        return ""
    end = min((position for position in (line.find("{"), line.find(" ")) if position > 0), default=len(line))
    return normalise(line[:end])
