"""Requests over time: the one value every reader and generator makes and every simulator eats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.errors import SpecError

FloatArray = npt.NDArray[np.float64]
Int16Array = npt.NDArray[np.int16]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

NO_SESSION = -1
"""Value of ``Workload.session`` for a request that belongs to no conversation."""


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """N requests in the order of their arrival, seen through a window of ``span_s`` seconds.

    Output lengths are what the engine will generate; only the simulator may read them, never a policy.

    Attributes:
        arrival_s: shape (N,), float64, seconds from the window's start, >= 0, non-decreasing, <= span_s.
        prompt_tokens: shape (N,), int32, >= 1.
        output_tokens: shape (N,), int32, >= 1, the first token included.
        class_index: shape (N,), int16, index into `class_names`.
        class_names: one name per class, all different.
        span_s: length of the observation window, > 0. Time after the last arrival is traffic of rate zero, not
            missing data.
        session: shape (N,), int32, equal for the requests of one conversation, `NO_SESSION` without one; None if
            unknown.
        hash_offsets: shape (N + 1,), int64; request i owns ``hash_ids[hash_offsets[i]:hash_offsets[i + 1]]``; None if
            unknown.
        hash_ids: shape (hash_offsets[-1],), int64; equal ids are equal prompt blocks (the prefix up to and with that
            block).
        hash_block_tokens: prompt tokens per hashed block; 0 without hashes.

    Raises:
        SpecError: when any of this does not hold.
    """

    arrival_s: FloatArray
    prompt_tokens: Int32Array
    output_tokens: Int32Array
    class_index: Int16Array
    class_names: tuple[str, ...]
    span_s: float
    session: Int32Array | None = None
    hash_offsets: Int64Array | None = None
    hash_ids: Int64Array | None = None
    hash_block_tokens: int = 0

    def __post_init__(self) -> None:
        """Coerce dtypes without changing a value, then check every invariant."""
        arrival_s = np.ascontiguousarray(self.arrival_s, dtype=np.float64)
        object.__setattr__(self, "arrival_s", arrival_s)
        object.__setattr__(self, "prompt_tokens", _exact(self.prompt_tokens, np.int32, "prompt_tokens"))
        object.__setattr__(self, "output_tokens", _exact(self.output_tokens, np.int32, "output_tokens"))
        object.__setattr__(self, "class_index", _exact(self.class_index, np.int16, "class_index"))
        object.__setattr__(self, "span_s", float(self.span_s))
        if self.session is not None:
            object.__setattr__(self, "session", _exact(self.session, np.int32, "session"))
        self._check_sizes()
        self._check_times()
        self._check_tokens_and_classes()
        self._check_hashes()

    def _check_sizes(self) -> None:
        size = self.arrival_s.size
        for name in ("arrival_s", "prompt_tokens", "output_tokens", "class_index", "session"):
            values = getattr(self, name)
            if values is not None and values.shape != (size,):
                raise SpecError(
                    f"workload: {name} has shape {values.shape}, arrival_s has {size} requests; give one of each"
                )

    def _check_times(self) -> None:
        if not (np.isfinite(self.span_s) and self.span_s > 0):
            raise SpecError(f"workload: span_s={self.span_s} must be a positive finite number of seconds")
        if not self.arrival_s.size:
            return
        if not np.isfinite(self.arrival_s).all():
            bad = int(np.flatnonzero(~np.isfinite(self.arrival_s))[0])
            raise SpecError(f"workload: arrival_s[{bad}]={self.arrival_s[bad]} must be finite")
        disorder = np.flatnonzero(self.arrival_s[1:] < self.arrival_s[:-1])
        if disorder.size:
            bad = int(disorder[0]) + 1
            raise SpecError(
                f"workload: arrival_s[{bad}]={self.arrival_s[bad]} precedes {self.arrival_s[bad - 1]}; sort by arrival"
            )
        if self.arrival_s[0] < 0 or self.arrival_s[-1] > self.span_s:
            raise SpecError(
                f"workload: arrivals {self.arrival_s[0]}..{self.arrival_s[-1]} s leave 0..span_s={self.span_s} s"
            )

    def _check_tokens_and_classes(self) -> None:
        for name in ("prompt_tokens", "output_tokens"):
            values = getattr(self, name)
            if values.size and values.min() < 1:
                bad = int(np.argmin(values))
                raise SpecError(f"workload: {name}[{bad}]={values[bad]} must be at least 1")
        if len(set(self.class_names)) != len(self.class_names):
            raise SpecError(f"workload: class names must differ, got {', '.join(self.class_names)}")
        classes = self.class_index
        if classes.size and not (classes.min() >= 0 and classes.max() < len(self.class_names)):
            raise SpecError(
                f"workload: class_index runs {classes.min()}..{classes.max()}, "
                f"but there are {len(self.class_names)} class names"
            )

    def _check_hashes(self) -> None:
        if (self.hash_ids is None) != (self.hash_offsets is None) or (self.hash_ids is None) != (
            self.hash_block_tokens == 0
        ):
            raise SpecError("workload: give hash_ids, hash_offsets and hash_block_tokens together, or none of them")
        if self.hash_ids is None or self.hash_offsets is None:
            return
        offsets = _exact(self.hash_offsets, np.int64, "hash_offsets")
        object.__setattr__(self, "hash_offsets", offsets)
        object.__setattr__(self, "hash_ids", _exact(self.hash_ids, np.int64, "hash_ids"))
        well_formed = (
            offsets.shape == (self.arrival_s.size + 1,) and offsets[0] == 0 and offsets[-1] == self.hash_ids.size
        )
        if not well_formed or (np.diff(offsets) < 0).any() or self.hash_block_tokens < 0:
            raise SpecError("workload: hash_offsets must rise from 0 to len(hash_ids) in num_requests + 1 steps")

    @property
    def num_requests(self) -> int:
        """How many requests arrive."""
        return int(self.arrival_s.size)

    @property
    def mean_rate_per_s(self) -> float:
        """Requests per second over the window."""
        return self.num_requests / self.span_s

    @property
    def total_tokens(self) -> int:
        """Prompt and output tokens of all requests."""
        return int(self.prompt_tokens.sum(dtype=np.int64) + self.output_tokens.sum(dtype=np.int64))

    def take(self, index: npt.NDArray[Any]) -> Workload:
        """The chosen requests in the given order, with everything they own.

        Args:
            index: positions (non-decreasing in arrival time) or a mask of shape (N,).
        """
        positions: npt.NDArray[np.intp] = np.flatnonzero(index) if index.dtype == np.bool_ else index.astype(np.intp)
        offsets, ids = self._take_hashes(positions)
        return Workload(
            arrival_s=self.arrival_s[positions],
            prompt_tokens=self.prompt_tokens[positions],
            output_tokens=self.output_tokens[positions],
            class_index=self.class_index[positions],
            class_names=self.class_names,
            span_s=self.span_s,
            session=None if self.session is None else self.session[positions],
            hash_offsets=offsets,
            hash_ids=ids,
            hash_block_tokens=self.hash_block_tokens,
        )

    def _take_hashes(self, positions: npt.NDArray[np.intp]) -> tuple[Int64Array | None, Int64Array | None]:
        if self.hash_offsets is None or self.hash_ids is None:
            return None, None
        starts = self.hash_offsets[positions]
        offsets = np.concatenate(([0], np.cumsum(self.hash_offsets[positions + 1] - starts)))
        # position of each output element inside the source: a ramp per request, shifted to that request's start
        source = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], np.diff(offsets))
        return offsets, self.hash_ids[source]


def _exact(values: npt.ArrayLike, dtype: type[np.integer[Any]], name: str) -> npt.NDArray[Any]:
    """Cast whole numbers to a narrower dtype; raises SpecError instead of truncating or wrapping around."""
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros(array.shape, dtype=dtype)
    if array.dtype.kind not in "iu":
        raise SpecError(f"workload: {name} must hold whole numbers, got dtype {array.dtype}")
    limits = np.iinfo(dtype)
    if array.min() < limits.min or array.max() > limits.max:
        raise SpecError(f"workload: {name} has a value outside {limits.min}..{limits.max}")
    return np.ascontiguousarray(array, dtype=dtype)
