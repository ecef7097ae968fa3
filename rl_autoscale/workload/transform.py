"""Workload in, workload out: cut, stretch, scale, mix, relabel. Pure; randomness only from the generator passed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.workload.arrivals import MAX_EXPECTED_ARRIVALS
from rl_autoscale.workload.lengths import LengthModel, sample_lengths
from rl_autoscale.workload.trace import NO_SESSION, FloatArray, Int16Array, Int32Array, Int64Array, Workload

DEFAULT_JITTER_S = 2.0
"""Copies come within +-2 s of their original: far below the minute scale that is kept, far above an iteration."""

DEFAULT_NEIGHBOURHOOD = 200
"""A copy takes its lengths from a request at most about this many places away."""


def slice_time(workload: Workload, start_s: float, end_s: float) -> Workload:
    """Requests with ``start_s <= arrival < end_s``, re-zeroed; the new span is ``end_s - start_s``.

    The end of the window itself belongs to the last slice, so that adjacent slices conserve every request.
    """
    if not 0 <= start_s < end_s <= workload.span_s:
        raise SpecError(f"slice_s=[{start_s}, {end_s}] must satisfy 0 <= start < end <= span_s={workload.span_s:.6g}")
    first = int(np.searchsorted(workload.arrival_s, start_s, side="left"))
    last = int(np.searchsorted(workload.arrival_s, end_s, side="right" if end_s == workload.span_s else "left"))
    part = workload.take(np.arange(first, last))
    arrival_s = np.minimum(part.arrival_s - start_s, end_s - start_s)  # rounding may lift the last one past the span
    return replace(part, arrival_s=arrival_s, span_s=end_s - start_s)


def warp_time(workload: Workload, factor: float) -> Workload:
    """Multiply every time by a factor: 2 takes twice as long at half the rate; burst shapes stretch with it."""
    if not (np.isfinite(factor) and factor > 0):
        raise SpecError(f"time_warp={factor} must be a positive finite number")
    span_s = workload.span_s * factor
    return replace(workload, arrival_s=np.minimum(workload.arrival_s * factor, span_s), span_s=span_s)


def scale_rate(
    rng: np.random.Generator,
    workload: Workload,
    factor: float,
    *,
    jitter_s: float = DEFAULT_JITTER_S,
    neighbourhood: int = DEFAULT_NEIGHBOURHOOD,
) -> Workload:
    """Multiply the request rate by any factor.

    Up: the originals stay, and every whole unit above one adds a copy of the whole workload in which the arrivals are
    jittered by a uniform +-`jitter_s` and the requests are locally shuffled, so that no copy is a clone of its
    original; the fraction left adds one thinned copy. Down: each request is kept with probability `factor`.

    Kept: the rate's shape at scales above `jitter_s` (minutes), the marginal and joint law of lengths, their drift over
    time, the class mix. Not kept: burstiness below `jitter_s` (copies are independent there, so the sum is closer to
    Poisson, as a larger user base would be). Sessions and prefix blocks of different copies share nothing: each copy
    is another population.

    Args:
        rng: source of randomness.
        workload: what to scale.
        factor: > 0.
        jitter_s: >= 0; arrivals pushed over an end of the window are reflected back.
        neighbourhood: >= 0, about how many places a request may move in the shuffle of a copy.
    """
    if not (np.isfinite(factor) and factor > 0):
        raise SpecError(f"rate_scale={factor} must be a positive finite number")
    if workload.num_requests * factor > MAX_EXPECTED_ARRIVALS:
        raise SpecError(
            f"rate_scale={factor} makes {workload.num_requests * factor:.3g} requests; "
            f"the limit is {MAX_EXPECTED_ARRIVALS:g}"
        )
    if jitter_s < 0 or neighbourhood < 0:
        raise SpecError(f"jitter_s={jitter_s} and neighbourhood={neighbourhood} must not be negative")
    whole = int(factor)
    copies = [workload] if whole else []
    copies += [_copy(rng, workload, jitter_s, neighbourhood) for _ in range(whole - 1)]
    fraction = factor - whole
    if fraction > 1e-12:
        source = _copy(rng, workload, jitter_s, neighbourhood) if whole else workload
        copies.append(source.take(rng.random(source.num_requests) < fraction))
    return copies[0] if len(copies) == 1 else merge(copies)


def _copy(rng: np.random.Generator, workload: Workload, jitter_s: float, neighbourhood: int) -> Workload:
    """The same requests at jittered times, locally shuffled."""
    size = workload.num_requests
    shuffled = np.argsort(np.arange(size) + rng.uniform(-neighbourhood, neighbourhood, size), kind="stable")
    moved = workload.arrival_s + rng.uniform(-jitter_s, jitter_s, size)
    moved = np.abs(moved)  # reflect at 0, then at the end
    moved = np.clip(np.where(moved > workload.span_s, 2 * workload.span_s - moved, moved), 0.0, workload.span_s)
    return _take_at(workload, shuffled, np.sort(moved))


def _take_at(workload: Workload, index: npt.NDArray[np.intp], arrival_s: FloatArray) -> Workload:
    """The chosen requests, in any order, at the given times; everything but the time moves with a request."""
    timeless = replace(workload, arrival_s=np.zeros(workload.num_requests))
    return replace(timeless.take(index), arrival_s=arrival_s)


def merge(workloads: Sequence[Workload]) -> Workload:
    """Superpose workloads that share one clock.

    The result's span is the longest; classes are joined by name, in order of appearance; sessions and prefix blocks of
    different workloads stay different. Requests that arrive at the same instant keep the order of the arguments.

    Raises:
        SpecError: without workloads, or when prefix blocks have different sizes.
    """
    if not workloads:
        raise SpecError("merge needs at least one workload")
    names = tuple(dict.fromkeys(name for workload in workloads for name in workload.class_names))
    offsets, ids, block_tokens = _join_hashes(workloads)
    joined = Workload(
        arrival_s=np.zeros(sum(workload.num_requests for workload in workloads)),
        prompt_tokens=np.concatenate([workload.prompt_tokens for workload in workloads]),
        output_tokens=np.concatenate([workload.output_tokens for workload in workloads]),
        class_index=np.concatenate([_renumber_classes(workload, names) for workload in workloads]),
        class_names=names,
        span_s=max(workload.span_s for workload in workloads),
        session=_join_sessions(workloads),
        hash_offsets=offsets,
        hash_ids=ids,
        hash_block_tokens=block_tokens,
    )
    arrival_s = np.concatenate([workload.arrival_s for workload in workloads])
    order = np.argsort(arrival_s, kind="stable")
    return _take_at(joined, order, arrival_s[order])


def _renumber_classes(workload: Workload, names: tuple[str, ...]) -> Int16Array:
    new_index = np.array([names.index(name) for name in workload.class_names], dtype=np.int16)
    return new_index[workload.class_index] if workload.num_requests else workload.class_index


def _join_sessions(workloads: Sequence[Workload]) -> Int32Array | None:
    if all(workload.session is None for workload in workloads):
        return None
    parts, base = [], 0
    for workload in workloads:
        session = workload.session
        if session is None:
            parts.append(np.full(workload.num_requests, NO_SESSION, dtype=np.int64))
        else:
            parts.append(np.where(session == NO_SESSION, NO_SESSION, session.astype(np.int64) + base))
            base += int(session.max(initial=NO_SESSION)) + 1
    joined = np.concatenate(parts)
    if base > np.iinfo(np.int32).max:
        raise SpecError(
            f"merge would number {base} sessions, more than int32 holds; lower rate_scale or drop the sessions"
        )
    return joined.astype(np.int32)


def _join_hashes(workloads: Sequence[Workload]) -> tuple[Int64Array | None, Int64Array | None, int]:
    sizes = sorted({workload.hash_block_tokens for workload in workloads} - {0})
    if not sizes:
        return None, None, 0
    if len(sizes) > 1:
        raise SpecError(
            f"merge: prefix blocks of {' and '.join(map(str, sizes))} tokens cannot be mixed; use one block size"
        )
    counts, parts, base = [], [], 0
    for workload in workloads:
        if workload.hash_ids is None or workload.hash_offsets is None:
            counts.append(np.zeros(workload.num_requests, dtype=np.int64))
            continue
        counts.append(np.diff(workload.hash_offsets))
        parts.append(workload.hash_ids + base)
        base += int(workload.hash_ids.max(initial=-1)) + 1
    offsets = np.concatenate(([0], np.cumsum(np.concatenate(counts))))
    return offsets, np.concatenate(parts), sizes[0]


def assign_class(workload: Workload, name: str) -> Workload:
    """Give every request one class; the result knows only that class."""
    return replace(workload, class_index=np.zeros(workload.num_requests, dtype=np.int16), class_names=(name,))


def assign_classes_by_share(rng: np.random.Generator, workload: Workload, shares: Mapping[str, float]) -> Workload:
    """Draw a class for each request, or for each session where there are any.

    Args:
        rng: source of randomness.
        workload: what to relabel.
        shares: class name to a weight >= 0; divided by their sum.
    """
    weights = np.array(list(shares.values()), dtype=np.float64)
    if not weights.size or not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
        raise SpecError(f"shares={dict(shares)} must be weights >= 0 that are not all zero")
    drawn = rng.choice(weights.size, size=workload.num_requests, p=weights / weights.sum()).astype(np.int16)
    if workload.session is not None:
        _, first, inverse = np.unique(workload.session, return_index=True, return_inverse=True)
        drawn = np.where(workload.session == NO_SESSION, drawn, drawn[first][inverse]).astype(np.int16)
    return replace(workload, class_index=drawn, class_names=tuple(shares))


def order_classes(workload: Workload, class_names: Sequence[str]) -> Workload:
    """Renumber classes to a fleet's order; raises UnknownNameError for a class of requests the fleet does not have."""
    present = [workload.class_names[i] for i in np.unique(workload.class_index)]
    for name in present:
        if name not in class_names:
            raise UnknownNameError("class", name, class_names)
    # class names without requests are dropped, so the map below never reaches their placeholder
    new_index = np.array(
        [class_names.index(n) if n in class_names else 0 for n in workload.class_names], dtype=np.int16
    )
    index = new_index[workload.class_index] if workload.num_requests else workload.class_index
    return replace(workload, class_index=index, class_names=tuple(class_names))


def redraw_lengths(rng: np.random.Generator, workload: Workload, model: LengthModel) -> Workload:
    """Keep the arrivals, draw new lengths; prefix blocks no longer describe the prompts and are left out."""
    prompt, output = sample_lengths(rng, model, workload.num_requests)
    return replace(
        workload, prompt_tokens=prompt, output_tokens=output, hash_offsets=None, hash_ids=None, hash_block_tokens=0
    )


def clip_context(workload: Workload, max_context_tokens: int) -> Workload:
    """Make every request fit a model's context: ``prompt + output <= max_context_tokens``.

    Outputs are cut first, to ``max_context_tokens - 1``; then prompts lose what is left over, as chat clients cut old
    turns. Prefix blocks beyond the cut are dropped.
    """
    if max_context_tokens < 2:
        raise SpecError(
            f"max_context_tokens={max_context_tokens} must be at least 2: one prompt token, one output token"
        )
    output = np.minimum(workload.output_tokens, max_context_tokens - 1)
    prompt = np.minimum(workload.prompt_tokens, max_context_tokens - output)
    offsets, ids = workload.hash_offsets, workload.hash_ids
    if offsets is not None and ids is not None:
        counts = np.diff(offsets)
        kept = np.minimum(counts, -(-prompt.astype(np.int64) // workload.hash_block_tokens))
        place = np.arange(ids.size) - np.repeat(offsets[:-1], counts)  # position of each block inside its request
        ids = ids[place < np.repeat(kept, counts)]
        offsets = np.concatenate(([0], np.cumsum(kept)))
    return replace(workload, prompt_tokens=prompt, output_tokens=output, hash_offsets=offsets, hash_ids=ids)
