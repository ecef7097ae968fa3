"""What a decision reads (`FleetState`) and what it says (`ScalingDecision`).

Both hold one NumPy array per field, in the order of ``FleetSpec.pools`` and ``FleetSpec.classes``. Leading dimensions
are allowed everywhere: a batch of E fleets has shape (E, num_pools), and the same encoder, shield and reward serve
one live fleet and a thousand simulated ones.

Missing is NaN, stale is a large age, zero is zero: three different things. Every field has a live source, named in
its line (G = the gateway, B = the backend, vllm:... = a vLLM metric); none needs a request's final output length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.spec import IntArray

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Telemetry:
    """Fields are float64 arrays of one shape; the order of the fields is the column order of the engine's snapshot."""

    @classmethod
    def from_matrix(cls, matrix: FloatArray) -> Self:
        """Split the last axis of shape (..., num_items, num_fields) into fields of shape (..., num_items)."""
        return cls(*(matrix[..., column] for column in range(matrix.shape[-1])))

    def to_matrix(self) -> FloatArray:
        """Inverse of `from_matrix`."""
        return np.stack([getattr(self, field.name) for field in fields(self)], axis=-1)

    def __getitem__(self, index: int | npt.NDArray[np.bool_]) -> Self:
        """One fleet of a batch, or those selected by a boolean array."""
        names: tuple[str, ...] = tuple(self.__slots__)
        return type(self)(*(getattr(self, name)[index] for name in names))


@dataclass(frozen=True, slots=True)
class PoolTelemetry(_Telemetry):
    """Per pool; "window" is the time since the previous control step."""

    ready: FloatArray  # replicas that take requests                                       B
    starting: FloatArray  # replicas asked for that do not serve yet                       B
    draining: FloatArray  # replicas that finish their work and leave                      B
    asked_for: FloatArray  # the target last applied                                       B
    oldest_start_age_s: FloatArray  # since the oldest pending start was asked for; 0 if none    B
    newest_start_age_s: FloatArray  # since the newest pending start was asked for; 0 if none    B
    running: FloatArray  # sequences in engine batches                                     vllm:num_requests_running
    waiting: FloatArray  # sequences queued inside engines                                 vllm:num_requests_waiting
    in_flight: FloatArray  # dispatched and unfinished                                     G
    in_flight_interactive: FloatArray  # the interactive part                              G
    busy_interactive: FloatArray  # replicas with interactive work                         G
    pending_prompt_tokens: FloatArray  # dispatched, first token not seen                  G
    kv_usage: FloatArray  # fraction of KV blocks in use, mean over ready replicas         vllm:kv_cache_usage_perc
    batch_cap: FloatArray  # requests the gateway allows per replica                       G
    itl_s: (
        FloatArray  # mean inter-token latency in the window; NaN without tokens        vllm:inter_token_latency_seconds
    )
    preemptions: FloatArray  # in the window                                               vllm:num_preemptions_total
    evictions: FloatArray  # batch requests evicted in the window                          G
    prompt_tokens_per_s: FloatArray  # computed in the window                              vllm:prompt_tokens_total
    generation_tokens_per_s: FloatArray  # in the window                                   vllm:generation_tokens_total
    age_s: FloatArray  # age of this row


@dataclass(frozen=True, slots=True)
class ClassTelemetry(_Telemetry):
    """Per service class.

    Everything is the gateway's own bookkeeping, or vLLM's histograms where there is no gateway.
    """

    arrivals_per_s: FloatArray  # in the window, refused ones included
    arrived_prompt_tokens_per_s: FloatArray
    queue_length: FloatArray  # held at the gateway
    queued_prompt_tokens: FloatArray
    oldest_wait_s: FloatArray  # of the queue's head; 0 if empty
    in_flight: FloatArray  # dispatched and unfinished
    first_tokens_per_s: FloatArray
    late_first_tokens_per_s: FloatArray  # of those, how many after their TTFT SLO
    ttft_mean_s: FloatArray  # of first tokens in the window; NaN without any
    ttft_p95_s: FloatArray  # interpolated in vLLM's buckets, as Prometheus does; NaN without any
    tpot_mean_s: FloatArray  # of requests finished in the window; NaN without any
    tpot_p95_s: FloatArray
    finished_per_s: FloatArray
    met_per_s: FloatArray  # finished with every SLO met
    slow_answers_per_s: FloatArray  # finished, first token in time, TPOT late, more than SHORT_ANSWER_TOKENS
    mean_output_tokens: FloatArray  # of requests finished in the window; NaN without any
    refused_per_s: FloatArray  # refused early: predicted to miss
    dropped_per_s: FloatArray  # queue full, timed out or failed
    admission: FloatArray  # strictness in force, see ScalingDecision
    age_s: FloatArray


@dataclass(frozen=True, slots=True)
class StageTelemetry(_Telemetry):
    """What waits between and behind the engines, of a fleet with prefill and decode pools or with post-processing."""

    held_prompts: FloatArray  # computed, KV still on a prefill replica                    G
    transfers: FloatArray  # of KV, under way                                              G
    bridge_queue: FloatArray  # KV in the bridge, sent to no decode replica yet            G
    bridge_used: FloatArray  # places: transfers, queue, and those waiting for KV blocks   G
    postprocess_running: FloatArray  # requests on workers                                 the stage itself
    postprocess_queue: FloatArray  # requests that wait for a worker                       the stage itself
    held_streams: FloatArray  # finished, but on their replica until post-processing has room
    age_s: FloatArray


@dataclass(frozen=True, slots=True)
class FleetState:
    """One observation of a fleet (or of a batch of fleets).

    Attributes:
        time_s: when the decision is taken; shape () or (num_fleets,).
        window_s: length of the window the rates refer to; same shape.
        pools: arrays of shape (..., num_pools).
        classes: arrays of shape (..., num_classes).
        stages: arrays of the shape of ``time_s``; None for a fleet without such stages, or where they are not measured.
    """

    time_s: FloatArray
    window_s: FloatArray
    pools: PoolTelemetry
    classes: ClassTelemetry
    stages: StageTelemetry | None = None

    def __getitem__(self, index: int | npt.NDArray[np.bool_]) -> FleetState:
        """One fleet of a batch, or those selected by a boolean array."""
        return FleetState(
            self.time_s[index],
            self.window_s[index],
            self.pools[index],
            self.classes[index],
            None if self.stages is None else self.stages[index],
        )


SHORT_ANSWER_TOKENS = 5
"""Answers of no more than so many tokens are not counted as slow: a prompt beside them, which stalls an iteration or
two, is enough to make them late, however few wait and however small the batch."""
NEVER_REFUSE = np.inf
"""Admission level that holds or queues everything and refuses nothing early."""
NO_LIMIT = np.iinfo(np.int64).max
"""Requests of a class in flight: as many as the replicas' batches take."""


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """Absolute targets; applying a decision twice is harmless.

    Attributes:
        target_replicas: shape (..., num_pools), int64, >= 0: replicas that should be ready or starting.
        max_batch_size: shape (..., num_pools), int64, >= 1: requests in flight the gateway allows per replica.
        admission: shape (..., num_classes), float64, >= 0: a request is refused at arrival when its estimated time to
            first token exceeds ``admission * ttft_slo_s``. 1 refuses what would miss, larger is more lenient, inf
            never refuses, 0 refuses everything.
        max_in_flight: shape (..., num_classes), int64, >= 0: requests of a class that the gateway has sent, and that
            have not ended, at once; the others are held. What is in flight already goes on. None says nothing: in a
            simulator that is NO_LIMIT for all; a live gateway keeps what is in force, and the controller says NO_LIMIT
            for a policy in charge that says nothing.
        selectivity: shape (..., num_classes), float64, >= 0: how much more readily requests of much work are refused:
            the wait in that estimate counts ``(work / mean work) ** selectivity`` times (fleet/admission.py). 0 treats
            all alike, 1 counts it in proportion to the work. None says nothing, likewise; in a simulator that is 0.
    """

    target_replicas: IntArray
    max_batch_size: IntArray
    admission: FloatArray
    max_in_flight: IntArray | None = None
    selectivity: FloatArray | None = None

    @property
    def selectivities(self) -> FloatArray:
        """``selectivity``, or 0 for all."""
        return np.zeros(self.admission.shape) if self.selectivity is None else self.selectivity

    @property
    def in_flight_limits(self) -> IntArray:
        """``max_in_flight``, or NO_LIMIT for all."""
        if self.max_in_flight is None:
            return np.full(self.admission.shape, NO_LIMIT, dtype=np.int64)
        return self.max_in_flight
