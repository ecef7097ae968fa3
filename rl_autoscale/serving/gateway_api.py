"""What gateway and controller say to each other, over HTTP with JSON bodies.

    GET  /control/snapshot   -> GatewaySnapshot     counters since the gateway began, and gauges
    PUT  /control/replicas   <- ReplicaList         where to send requests; absolute
    PUT  /control/decision   <- GatewayDecision     batch caps and admission; absolute

Counters only grow while ``started_at_s`` stays the same, so that whoever reads them takes differences over its own
windows, and a restart or a missed read costs one window and never a wrong rate.
"""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from rl_autoscale.fleet.config import Config
from rl_autoscale.serving.protocols import Phase

METRIC_PREFIX = "rl_autoscale_gateway"
"""What the gateway's Prometheus series begin with."""


class HistogramSnapshot(Config):
    """A cumulative histogram, as Prometheus keeps it: ``counts[i]`` values were at most ``bounds_s[i]``.

    The last bound is left out (infinity); its count is ``count``.
    """

    bounds_s: tuple[float, ...]
    counts: tuple[NonNegativeInt, ...]
    count: NonNegativeInt
    sum_s: NonNegativeFloat


class ClassSnapshot(Config):
    """One service class; counters unless said otherwise. ``arrivals`` is the sum of all outcomes and of what is inside.

    arrivals = finished + refused + dropped + cancelled + failed + queue_length + in_flight
    """

    arrivals: NonNegativeInt
    arrived_prompt_tokens: NonNegativeInt
    first_tokens: NonNegativeInt
    late_first_tokens: NonNegativeInt = Field(description="after the TTFT SLO; or late answers that do not stream")
    finished: NonNegativeInt
    met: NonNegativeInt = Field(description="finished with every SLO met")
    slow_answers: NonNegativeInt = Field(description="finished, late by their pace alone; not those of a few tokens")
    finished_output_tokens: NonNegativeInt
    refused: NonNegativeInt = Field(description="refused early: predicted to miss")
    dropped: NonNegativeInt = Field(description="queue full, or waited longer than the class's timeout")
    cancelled: NonNegativeInt = Field(description="the client went away")
    failed: NonNegativeInt = Field(description="the replica failed and the request could not be retried")
    queue_length: NonNegativeInt = Field(description="gauge")
    queued_prompt_tokens: NonNegativeInt = Field(description="gauge")
    oldest_wait_s: NonNegativeFloat = Field(description="gauge; 0 if the queue is empty")
    in_flight: NonNegativeInt = Field(description="gauge: dispatched and unfinished")
    admission: NonNegativeFloat | None = Field(description="gauge: strictness in force; null never refuses")
    selectivity: NonNegativeFloat = Field(default=0.0, description="gauge: in force; gateways of before have none")
    ttft: HistogramSnapshot
    tpot: HistogramSnapshot


class PoolSnapshot(Config):
    """One pool; gauges unless said otherwise."""

    in_flight: NonNegativeInt
    in_flight_interactive: NonNegativeInt
    busy_interactive: NonNegativeInt = Field(description="replicas with interactive work")
    pending_prompt_tokens: NonNegativeInt = Field(description="dispatched, first token not seen")
    batch_cap: PositiveInt
    evictions: NonNegativeInt = Field(description="counter")


class GatewaySnapshot(Config):
    """Everything the controller reads from a gateway."""

    started_at_s: float = Field(description="wall clock at start; a change means that all counters began anew")
    uptime_s: NonNegativeFloat = Field(description="monotonic seconds since then, when the snapshot was taken")
    pools: dict[str, PoolSnapshot]
    classes: dict[str, ClassSnapshot]
    in_flight_by_replica: dict[str, NonNegativeInt] = Field(description="replica id -> requests, draining ones too")


class ReplicaAddress(Config):
    """One replica that the gateway may know: it sends requests to ready ones, and lets draining ones finish."""

    replica_id: str
    pool: str
    url: str
    phase: Phase


class ReplicaList(Config):
    """All replicas; what is missing from the list is gone."""

    replicas: tuple[ReplicaAddress, ...]


class GatewayDecision(Config):
    """The gateway's part of a ScalingDecision."""

    max_batch_size: dict[str, PositiveInt] = Field(description="pool -> requests in flight allowed per replica")
    admission: dict[str, NonNegativeFloat | None] = Field(
        description="class -> refuse when the estimated TTFT exceeds this multiple of its SLO; null never refuses"
    )
    max_in_flight: dict[str, NonNegativeInt | None] = Field(
        default_factory=dict, description="class -> requests sent to replicas at once; null sends as many as they take"
    )
    selectivity: dict[str, NonNegativeFloat] = Field(
        default_factory=dict,
        description="class -> the wait in that estimate counts (work / mean work) ** this; 0 treats all alike",
    )
