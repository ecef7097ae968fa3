"""Counts per time bucket (what monitoring keeps of last week) turned back into requests.

What a bucket does not say is drawn, by these rules and from one seed:

- *How many*: the bucket's count; a fraction (Prometheus extrapolates) is rounded up with its own probability, so that
  totals are right on average.
- *When*: independently and uniformly inside the bucket, which is a Poisson process given its count. Bursts shorter than
  a bucket are not in the data and so not in the workload.
- *Prompt and output length*: independently of each other, from the bucket's histogram (linear inside a histogram
  bucket, as Prometheus has it, then scaled to the measured mean) or, where there is only a mean, from a lognormal law
  with that mean and a stated coefficient of variation. A bucket with arrivals and no lengths takes its nearest
  neighbour's.

A bucket without data is a gap. It is never read as a bucket without requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rl_autoscale.fleet.errors import TraceError
from rl_autoscale.fleet.rng import stream
from rl_autoscale.workload.lengths import MAX_TOKENS
from rl_autoscale.workload.trace import BoolArray, FloatArray, Int32Array, Int64Array, Workload

Gaps = Literal["cut", "fill", "error"]
"""Gaps are cut out of time, filled by a straight line between their neighbours, or refused."""

OVERFLOW_FACTOR = 2.0
"""Where the last, open bucket of a length histogram is taken to end, over its lower edge."""


@dataclass(frozen=True, slots=True, eq=False)
class BucketLengths:
    """Token lengths of one side (prompt or output) per time bucket.

    Attributes:
        mean_tokens: shape (num_buckets,); NaN where unknown.
        edges: shape (k,), increasing upper bounds of the histogram; empty without one.
        counts: shape (num_buckets, k + 1), requests per length bucket, not cumulative; the last column is beyond all
            edges.
    """

    mean_tokens: FloatArray
    edges: FloatArray
    counts: FloatArray

    @staticmethod
    def of_means(mean_tokens: FloatArray) -> BucketLengths:
        """Means alone."""
        return BucketLengths(mean_tokens, np.zeros(0), np.zeros((len(mean_tokens), 1)))

    @property
    def known(self) -> BoolArray:
        """Buckets that say something about lengths; shape (num_buckets,)."""
        histogram = (self.counts.sum(axis=1) > 0) if self.edges.size else np.zeros(len(self.mean_tokens), np.bool_)
        return np.asarray(histogram | np.isfinite(self.mean_tokens))

    def draw(self, rng: np.random.Generator, bucket: int, size: int, cv: float) -> Int32Array:
        """Lengths of requests of a known bucket; shape (size,), >= 1."""
        mean = float(self.mean_tokens[bucket])
        if self.edges.size and self.counts[bucket].sum() > 0:
            tokens = _histogram_draws(rng, self.edges, self.counts[bucket], mean, size)
        else:
            variance = math.log1p(cv * cv)
            tokens = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), size)
        return np.clip(np.rint(tokens), 1, MAX_TOKENS).astype(np.int32)


def _histogram_draws(
    rng: np.random.Generator, edges: FloatArray, counts: FloatArray, mean: float, size: int
) -> FloatArray:
    ends = np.concatenate(([0.0], edges, [edges[-1] * OVERFLOW_FACTOR]))
    share = counts / counts.sum()
    scale = mean / float(share @ (ends[:-1] + ends[1:]) / 2.0) if math.isfinite(mean) else 1.0
    chosen = rng.choice(len(counts), size=size, p=share)
    return np.asarray((ends[chosen] + rng.random(size) * np.diff(ends)[chosen]) * scale)


@dataclass(frozen=True, slots=True, eq=False)
class BucketSeries:
    """One class's traffic by time bucket.

    Attributes:
        class_name: None where the data know no classes.
        start_s: where the first bucket begins, seconds since 1970 (or on the file's own clock).
        bucket_s: length of every bucket.
        arrivals: shape (num_buckets,), requests; NaN for a bucket without data.
        prompt: their prompt lengths.
        output: their output lengths.
    """

    class_name: str | None
    start_s: float
    bucket_s: float
    arrivals: FloatArray
    prompt: BucketLengths
    output: BucketLengths


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """A workload made of buckets.

    Attributes:
        workload: the requests.
        kept: shape (num_kept,), the bucket behind each stretch of ``bucket_s`` of the workload's time.
        start_s: as in `BucketSeries`.
        bucket_s: as in `BucketSeries`.
        notes: what a reader of results must know: gaps, borrowed lengths.
    """

    workload: Workload
    kept: Int64Array
    start_s: float
    bucket_s: float
    notes: tuple[str, ...]

    def wall_s(self, time_s: float) -> float:
        """The original time of a moment of the workload."""
        place = min(int(time_s // self.bucket_s), len(self.kept) - 1)
        return self.start_s + self.bucket_s * float(self.kept[place]) + (time_s - place * self.bucket_s)


def spread(
    series: Sequence[BucketSeries],
    *,
    seed: int = 0,
    gaps: Gaps = "cut",
    length_cv: float = 1.0,
    describe_time: Callable[[float], str] = "{:g} s".format,
) -> Spread:
    """Draw requests from counts.

    Args:
        series: one per class, all on the same buckets.
        seed: of everything that is drawn.
        gaps: what becomes of buckets without data; a bucket that lacks one class is a gap of all.
        length_cv: coefficient of variation of lengths where only their mean is known, >= 0.
        describe_time: writes a moment for people.

    Raises:
        TraceError: no data, no requests, arrivals whose lengths are nowhere given, or gaps that are refused.
    """
    first = series[0]
    missing = np.any([np.isnan(item.arrivals) for item in series], axis=0)
    notes = [_describe_gaps(missing, first, gaps, describe_time)] if missing.any() else []
    if missing.all():
        raise TraceError("no bucket has data; widen --from/--to, or check the selector and that the engine was scraped")
    if missing.any() and gaps == "error":
        raise TraceError(f"{notes[0]}; say --gaps cut or --gaps fill to go on")
    kept = np.flatnonzero(~missing) if gaps == "cut" else np.arange(len(missing))
    parts = []
    for index, item in enumerate(series):
        counts = _filled(item.arrivals) if gaps == "fill" else item.arrivals
        rng = stream(seed, f"replay/{item.class_name or index}")
        parts.append(_draw_class(rng, item, counts[kept], kept, length_cv, notes))
    return Spread(_merge(series, parts, first.bucket_s * len(kept)), kept, first.start_s, first.bucket_s, tuple(notes))


def _draw_class(
    rng: np.random.Generator, item: BucketSeries, counts: FloatArray, kept: Int64Array, cv: float, notes: list[str]
) -> tuple[FloatArray, Int32Array, Int32Array]:
    whole = np.floor(counts)
    sizes = (whole + (rng.random(len(counts)) < counts - whole)).astype(np.int64)
    place = np.repeat(np.arange(len(kept)), sizes)
    arrival_s = (place + rng.random(place.size)) * item.bucket_s
    order = np.argsort(arrival_s, kind="stable")  # within a bucket; lengths do not depend on the place in it
    lengths = [
        _draw_lengths(rng, side, side_name, item, sizes, kept, cv, notes)
        for side, side_name in ((item.prompt, "prompt"), (item.output, "output"))
    ]
    return arrival_s[order], lengths[0], lengths[1]


def _draw_lengths(
    rng: np.random.Generator, side: BucketLengths, name: str, item: BucketSeries, sizes: Int64Array, kept: Int64Array,
    cv: float, notes: list[str],
) -> Int32Array:  # fmt: skip
    known = np.flatnonzero(side.known)
    asked = kept[sizes > 0]
    if asked.size == 0:
        return np.zeros(0, dtype=np.int32)
    if known.size == 0:
        raise TraceError(f"there are requests but no {name} lengths anywhere; give a histogram or a token counter")
    source = _nearest(known, asked)
    borrowed = int((source != asked).sum())
    if borrowed:
        whose = f" of class {item.class_name}" if item.class_name else ""
        notes.append(f"{borrowed:,} buckets{whose} have requests but no {name} lengths and took their neighbour's")
    draws = [side.draw(rng, int(b), int(n), cv) for b, n in zip(source, sizes[sizes > 0], strict=True)]
    return np.concatenate(draws)


def _nearest(known: Int64Array, asked: Int64Array) -> Int64Array:
    """The known bucket nearest to each asked one; both ascending."""
    right = np.clip(np.searchsorted(known, asked), 0, len(known) - 1)
    left = np.maximum(right - 1, 0)
    nearer_left = np.abs(asked - known[left]) <= np.abs(known[right] - asked)
    return np.where(nearer_left, known[left], known[right])


def _filled(arrivals: FloatArray) -> FloatArray:
    known = np.flatnonzero(~np.isnan(arrivals))
    return np.interp(np.arange(len(arrivals)), known, arrivals[known])


def _merge(
    series: Sequence[BucketSeries], parts: list[tuple[FloatArray, Int32Array, Int32Array]], span_s: float
) -> Workload:
    arrival_s = np.concatenate([part[0] for part in parts])
    if not arrival_s.size:
        raise TraceError("the data hold no requests at all; there is nothing to replay")
    order = np.argsort(arrival_s, kind="stable")
    classes = np.repeat(np.arange(len(parts), dtype=np.int16), [part[0].size for part in parts])
    return Workload(
        arrival_s=np.minimum(arrival_s[order], span_s),
        prompt_tokens=np.concatenate([part[1] for part in parts])[order],
        output_tokens=np.concatenate([part[2] for part in parts])[order],
        class_index=classes[order],
        class_names=tuple(item.class_name or "default" for item in series),
        span_s=span_s,
    )


_SHOWN_GAPS = 4


def _describe_gaps(missing: BoolArray, item: BucketSeries, gaps: Gaps, describe_time: Callable[[float], str]) -> str:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], missing.astype(np.int8), [0]))))
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    shown = "; ".join(
        f"{describe_time(item.start_s + begin * item.bucket_s)} to {describe_time(item.start_s + end * item.bucket_s)}"
        for begin, end in runs[:_SHOWN_GAPS]
    )
    more = f"; and {len(runs) - _SHOWN_GAPS} more" if len(runs) > _SHOWN_GAPS else ""
    fate = {
        "cut": ", cut out of the replay",
        "fill": ", filled by a straight line between their neighbours",
        "error": "",
    }[gaps]
    return (
        f"no data in {int(missing.sum()):,} of {len(missing):,} buckets ({missing.mean():.1%}), "
        f"which is not zero load{fate}: {shown}{more}"
    )
