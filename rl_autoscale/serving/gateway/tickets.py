"""One request inside the gateway."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rl_autoscale.serving.gateway.books import ReplicaBook


class State(Enum):
    """Where a request is; it ends in exactly one of those after ``SENT`` and is counted there once."""

    QUEUED = "queued"
    SENT = "sent"
    FINISHED = "finished"
    REFUSED = "refused"  # early: predicted to miss its SLO
    DROPPED = "dropped"  # queue full, or waited longer than its class's timeout
    CANCELLED = "cancelled"  # the client went away, or a replica found its request invalid
    FAILED = "failed"  # replicas failed it


INSIDE = (State.QUEUED, State.SENT)
"""States of a request that has not ended."""


def _nobody_waits() -> None:
    pass


@dataclass(slots=True, eq=False)
class Ticket:
    """A request and what happened to it.

    Attributes:
        class_index: index into ``FleetSpec.classes``.
        prompt_tokens: estimated; see tokens.py.
        arrival_s: when it came.
        sequence: arrivals are numbered; among requests of a class the lower number is served first.
        streams: False for a request whose answer comes in one piece, so that its first token is not seen.
        routing_u: its number in [0, 1) for routers that draw.
        on_change: called when it leaves the queue, sent or dropped.
        on_evict: called when it has to give its place on a replica to another; it is held again then, or dropped.
        state: where it is.
        replica: where it was sent last.
        sent_s: last time it was sent.
        first_token_s: NaN while there is none.
        expected_s: when its first token was expected as it was sent.
        awaited: sent, and no token has come since.
        num_sent: how often it was sent.
        num_evictions: how often it was taken off a replica for an interactive request.
        retry_after_s: for refused and dropped ones: when to come again.
        reason: why it ended, for logs and the client.
    """

    class_index: int
    prompt_tokens: int
    arrival_s: float
    sequence: int
    streams: bool
    routing_u: float
    on_change: Callable[[], None] = field(default=_nobody_waits, repr=False)
    on_evict: Callable[[], None] = field(default=_nobody_waits, repr=False)
    state: State = State.QUEUED
    replica: ReplicaBook | None = None
    sent_s: float = math.nan
    first_token_s: float = math.nan
    expected_s: float = math.inf
    awaited: bool = False
    num_sent: int = 0
    num_evictions: int = 0
    retry_after_s: float = 1.0
    reason: str = ""

    @property
    def has_begun(self) -> bool:
        """Whether its first token was seen."""
        return not math.isnan(self.first_token_s)
