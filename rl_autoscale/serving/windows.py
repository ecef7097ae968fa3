"""Counters and histograms of one replica turned into what happened since the last look.

Each field remembers its own last reading, so a scrape that lost half its lines costs those fields one look and the
others nothing. A counter that went back began anew (the engine restarted): what it shows now is what happened since.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from rl_autoscale.serving.metric_names import EngineNames
from rl_autoscale.serving.samples import Histogram, ReplicaSample

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Stamped(Generic[Value]):
    """A value and when it was true, on the monotonic clock; ``span_s`` is the length of the window it covers."""

    value: Value
    at_s: float
    span_s: float = 0.0


def counter_difference(before: float, after: float) -> float:
    """Events between two readings of a counter; after a reset, those since the reset."""
    return after - before if after >= before else after


def histogram_difference(before: Histogram, after: Histogram) -> Histogram | None:
    """Values between two readings of a histogram; None when its buckets were changed in between."""
    if before.edges.shape != after.edges.shape or (before.edges != after.edges).any():
        return None
    counts = after.counts - before.counts
    if (counts < 0).any():
        return after
    return Histogram(after.edges, counts, max(after.total - before.total, 0.0))


def merge_histograms(parts: list[Histogram]) -> Histogram | None:
    """Values of several replicas together; of replicas with other buckets than the first, none."""
    if not parts:
        return None
    alike = [part for part in parts if np.array_equal(part.edges, parts[0].edges)]
    return Histogram(parts[0].edges, np.sum([part.counts for part in alike], axis=0), sum(part.total for part in alike))


@dataclass(slots=True)
class ReplicaTrack:
    """What is known of one replica, field by field.

    Attributes:
        since_s: when it was first seen.
        began_at_zero: it was seen before it served, so its counters began at zero then.
        sample: the newest that was accepted.
        gauges, events, values: per field the newest reading; ``events`` are counts within ``span_s``, ``values`` the
            histogram of that span.
    """

    since_s: float
    began_at_zero: bool = False
    sample: ReplicaSample | None = None
    gauges: dict[str, Stamped[float]] = field(default_factory=dict)
    events: dict[str, Stamped[float]] = field(default_factory=dict)
    values: dict[str, Stamped[Histogram]] = field(default_factory=dict)
    _counters: dict[str, Stamped[float]] = field(default_factory=dict)
    _histograms: dict[str, Stamped[Histogram]] = field(default_factory=dict)
    frozen_since_s: float | None = None

    def take(self, sample: ReplicaSample, names: EngineNames, *, in_flight: int | None = None) -> None:
        """Take in a new sample; one no newer than the last changes nothing.

        A replica with work (by its own word or the gateway's) whose step and token counters stand still is frozen:
        its readings are not renewed and so grow old.

        Args:
            sample: from a source.
            names: of the engine; says which counters move with work.
            in_flight: requests the gateway has there; None if unknown.
        """
        if self.sample is not None and sample.taken_s <= self.sample.taken_s:
            return
        if self._stands_still(sample, names, in_flight):
            assert self.sample is not None
            self.frozen_since_s = self.sample.taken_s if self.frozen_since_s is None else self.frozen_since_s
            return
        self.frozen_since_s = None
        self.sample = sample
        for name, value in sample.gauges.items():
            self.gauges[name] = Stamped(value, sample.taken_s)
        for name, value in sample.counters.items():
            self._take_counter(name, value, sample.taken_s)
        for name, histogram in sample.histograms.items():
            self._take_histogram(name, histogram, sample.taken_s)

    def _take_counter(self, name: str, value: float, at_s: float) -> None:
        before = self._counters.get(name) or (Stamped(0.0, self.since_s) if self.began_at_zero else None)
        self._counters[name] = Stamped(value, at_s)
        if before is not None and at_s > before.at_s:
            self.events[name] = Stamped(counter_difference(before.value, value), at_s, at_s - before.at_s)

    def _take_histogram(self, name: str, histogram: Histogram, at_s: float) -> None:
        before = self._histograms.get(name)
        self._histograms[name] = Stamped(histogram, at_s)
        if before is None and self.began_at_zero:
            before = Stamped(Histogram(histogram.edges, np.zeros_like(histogram.counts), 0.0), self.since_s)
        if before is None or at_s <= before.at_s:
            return
        difference = histogram_difference(before.value, histogram)
        if difference is not None:
            self.values[name] = Stamped(difference, at_s, at_s - before.at_s)

    def _stands_still(self, sample: ReplicaSample, names: EngineNames, in_flight: int | None) -> bool:
        if self.sample is None:
            return False
        work = sample.gauges.get("running", 0.0) + sample.gauges.get("waiting", 0.0)
        if work == 0 and not in_flight:
            return False
        now, before = _progress(sample, names), _progress(self.sample, names)
        return bool(now) and now == before


def _progress(sample: ReplicaSample, names: EngineNames) -> tuple[float, ...]:
    """The counters that move whenever the engine works."""
    counts = [sample.counters.get(name) for name in names.busy]
    counts += [sample.histograms[name].count for name in names.busy if name in sample.histograms]
    return tuple(count for count in counts if count is not None)
