"""A workload as a user writes it: streams of requests that are superposed.

    streams:
      - class: chat
        trace: azure2023_conv          # a public trace's name, or a file
        slice_s: [0, 1800]
        rate_scale: 20
      - shares: {chat: 1, batch: 3}
        generator: {kind: gamma, rate_per_s: {low: 1, high: 10, log: true}, cv: 2, span_s: 1800}
        lengths: arxiv_summarization


Each stream is built in one fixed order: slice (or draw), time warp, rate scaling, new lengths, context limit, classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

import numpy as np
from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, model_validator

from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import SilenceError, SpecError
from rl_autoscale.workload import transform
from rl_autoscale.workload.fitted import fitted_lengths
from rl_autoscale.workload.generators import FittedSpec, GeneratorSpec
from rl_autoscale.workload.length_spec import NamedOrInlineLengths, resolve_lengths
from rl_autoscale.workload.lengths import LengthModel, sample_lengths
from rl_autoscale.workload.ranges import Positive, fixed
from rl_autoscale.workload.readers import DEFAULT_CLASS
from rl_autoscale.workload.store import LoadedTrace
from rl_autoscale.workload.trace import Workload


class TraceSource(Protocol):
    """Where a stream's trace comes from; `store.TraceStore` is one."""

    def load_or_stand_in(self, name: str) -> LoadedTrace:
        """The named trace or file, or its fitted stand-in with a note that says so."""
        ...


@dataclass(frozen=True, slots=True)
class BuiltWorkload:
    """A workload and what a reader of the results must know about it."""

    workload: Workload
    notes: tuple[str, ...]


class StreamSpec(Config):
    """One source of requests, from a trace or from a generator."""

    model_config = ConfigDict(populate_by_name=True)

    class_name: str | None = Field(
        default=None, alias="class", description="class of every request; default the trace's own"
    )
    shares: dict[str, NonNegativeFloat] | None = Field(
        default=None, description="weights of several classes, drawn per request"
    )
    trace: str | None = Field(default=None, description="a known trace's name, or the path of a file")
    generator: GeneratorSpec | None = None
    lengths: NamedOrInlineLengths | None = Field(default=None, description="a named length model or an inline one")
    slice_s: tuple[NonNegativeFloat, NonNegativeFloat] | None = Field(
        default=None, description="[start, end) of the trace's own time"
    )
    random_window: bool = Field(
        default=False,
        description="where a shorter span is asked for, take it at a random place of the slice, not at its start",
    )
    time_warp: Positive = Field(
        default=fixed(1.0), description="multiplies every time of the trace; 2 is half the rate"
    )
    rate_scale: Positive = Field(
        default=fixed(1.0), description="multiplies the number of requests; see transform.scale_rate"
    )
    jitter_s: NonNegativeFloat = Field(
        default=transform.DEFAULT_JITTER_S, description="of the copies that rate_scale adds"
    )
    neighbourhood: NonNegativeInt = Field(
        default=transform.DEFAULT_NEIGHBOURHOOD, description="reach of the copies' shuffle"
    )
    max_context_tokens: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="clip prompt + output to this"
    )

    @model_validator(mode="after")
    def _check(self) -> StreamSpec:
        if (self.trace is None) == (self.generator is None):
            raise ValueError("a stream has either a trace or a generator; give exactly one")
        if self.class_name is not None and self.shares is not None:
            raise ValueError("a stream has either a class or shares; give one of them")
        if self.shares is not None and not sum(self.shares.values()) > 0:
            raise ValueError("shares must not all be zero")
        if self.generator is not None:
            self._check_generator_stream(self.generator)
        if self.slice_s is not None and self.slice_s[0] >= self.slice_s[1]:
            raise ValueError(f"slice_s=[{self.slice_s[0]:g}, {self.slice_s[1]:g}] must have start < end")
        return self

    def _check_generator_stream(self, generator: GeneratorSpec) -> None:
        for name in ("slice_s", "time_warp", "rate_scale", "random_window"):
            if name in self.model_fields_set:
                raise ValueError(f"{name} belongs to a trace; set the generator's own rate and span instead")
        if self.lengths is None and not isinstance(generator, FittedSpec):
            raise ValueError("a generator needs lengths: a named model (for example azure_conv) or an inline one")


class WorkloadSpec(Config):
    """Streams that share one clock and are superposed."""

    streams: tuple[StreamSpec, ...]
    span_s: Positive | None = Field(
        default=None, description="span of generators that name none, and the longest span of traces"
    )

    @model_validator(mode="after")
    def _check(self) -> WorkloadSpec:
        if not self.streams:
            raise ValueError("streams is empty; a workload needs at least one stream")
        return self

    def build(
        self, rng: np.random.Generator, store: TraceSource, class_names: Sequence[str], *, span_s: float | None = None
    ) -> BuiltWorkload:
        """Draw the workload.

        Args:
            rng: source of all randomness: ranges, arrivals, lengths, copies, classes.
            store: where traces come from.
            class_names: the fleet's classes, in its order; the result has exactly these.
            span_s: overrides every generator's span and cuts every trace (an episode's length).

        Raises:
            SpecError: for a slice outside a trace, a missing span, or no requests at all.
            UnknownNameError: for a class the fleet does not have.
            TraceError: for a trace that cannot be read or found and has no stand-in.
        """
        if span_s is not None and not (np.isfinite(span_s) and span_s > 0):
            raise SpecError(f"workload: span_s={span_s} must be a positive finite number of seconds")
        if span_s is None and self.span_s is not None:
            span_s_all: float | None = self.span_s.draw(rng)
        else:
            span_s_all = span_s
        parts, notes = [], []
        for place, stream in enumerate(self.streams):
            part, part_notes = _build_stream(
                stream, rng, store, span_s_all, forced=span_s is not None, where=f"streams[{place}]"
            )
            parts.append(_put_classes(stream, part, rng, class_names))
            notes += part_notes
        merged = transform.merge(parts)
        if merged.num_requests == 0:
            raise SilenceError(f"workload: no requests arrive within {merged.span_s:.6g} s; raise the rate or the span")
        return BuiltWorkload(merged, tuple(dict.fromkeys(notes)))


def _build_stream(
    stream: StreamSpec, rng: np.random.Generator, store: TraceSource, span_s: float | None, *, forced: bool, where: str
) -> tuple[Workload, list[str]]:
    """One stream, classes aside; `forced` says that span_s is the caller's and wins over the generator's own."""
    notes: list[str] = []
    if stream.generator is not None:
        part = _from_generator(stream, stream.generator, rng, span_s, forced=forced, where=where)
    else:
        assert stream.trace is not None  # StreamSpec checks it
        loaded = store.load_or_stand_in(stream.trace)
        notes += loaded.notes
        part = _from_trace(stream, loaded.workload, rng, span_s)
        if span_s is not None and part.span_s < span_s:
            notes.append(f"{stream.trace}: its {part.span_s:.6g} s end before the {span_s:.6g} s asked for")
        if stream.lengths is not None:
            part = transform.redraw_lengths(rng, part, resolve_lengths(stream.lengths))
    if stream.max_context_tokens is not None:
        part = transform.clip_context(part, stream.max_context_tokens)
    return part, notes


def _from_trace(stream: StreamSpec, workload: Workload, rng: np.random.Generator, span_s: float | None) -> Workload:
    warp, scale = stream.time_warp.draw(rng), stream.rate_scale.draw(rng)
    start_s, end_s = stream.slice_s or (0.0, workload.span_s)
    is_cut = span_s is not None and span_s < (end_s - start_s) * warp
    if span_s is not None and is_cut:
        room_s = (end_s - start_s) - span_s / warp
        start_s += rng.uniform(0.0, room_s) if stream.random_window else 0.0
        end_s = min(end_s, start_s + span_s / warp)
    part = transform.warp_time(transform.slice_time(workload, start_s, end_s), warp)
    if span_s is not None and is_cut:  # exactly as asked, whatever the rounding of the cut
        part = replace(part, arrival_s=np.minimum(part.arrival_s, span_s), span_s=span_s)
    return transform.scale_rate(rng, part, scale, jitter_s=stream.jitter_s, neighbourhood=stream.neighbourhood)


def _from_generator(
    stream: StreamSpec,
    generator: GeneratorSpec,
    rng: np.random.Generator,
    span_s: float | None,
    *,
    forced: bool,
    where: str,
) -> Workload:
    if generator.span_s is not None and not forced:
        span_s = generator.span_s.draw(rng)
    if span_s is None:
        raise SpecError(f"workload: {where}: the generator has no span_s; give it one, or give the workload one")
    arrival_s = generator.arrivals(rng, span_s)
    if stream.lengths is None and isinstance(generator, FittedSpec):
        model: LengthModel = resolve_lengths(fitted_lengths(generator.name))
    else:
        assert stream.lengths is not None  # StreamSpec checks it
        model = resolve_lengths(stream.lengths)
    prompt, output = sample_lengths(rng, model, arrival_s.size)
    classes = np.zeros(arrival_s.size, dtype=np.int16)
    return Workload(arrival_s, prompt, output, classes, (DEFAULT_CLASS,), span_s)


def _put_classes(stream: StreamSpec, part: Workload, rng: np.random.Generator, class_names: Sequence[str]) -> Workload:
    if stream.class_name is not None:
        part = transform.assign_class(part, stream.class_name)
    elif stream.shares is not None:
        part = transform.assign_classes_by_share(rng, part, stream.shares)
    elif len(class_names) == 1:
        part = transform.assign_class(part, class_names[0])
    elif part.class_names == (DEFAULT_CLASS,) and DEFAULT_CLASS not in class_names:
        raise SpecError(f"workload: a stream names no class; add class: or shares: with {', '.join(class_names)}")
    return transform.order_classes(part, class_names)
