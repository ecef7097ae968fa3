"""What the gateway knows of a replica and of a pool: what it sent there and which streams have begun.

The arithmetic of the estimate is fleet/admission.py's; here are the sums it wants, kept as requests come and go.
"""

from __future__ import annotations

from rl_autoscale.fleet.admission import (
    corrected_clearing_s,
    known_residence_s,
    prefill_time_s,
    residual_iteration_s,
    wait_ahead_s,
)
from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.serving.gateway.tickets import Ticket
from rl_autoscale.serving.gateway_api import PoolSnapshot
from rl_autoscale.serving.protocols import Phase

_RESIDENCE_MEMORY = 64
"""Finished requests over which the mean residence forgets; as in the simulator."""


class PoolBook:
    """A pool's settings, cap and running sums.

    Args:
        spec: the pool.
    """

    def __init__(self, spec: PoolSpec) -> None:
        self.spec = spec
        self.cap = spec.batch_limit
        self.replicas: list[ReplicaBook] = []  # in the order in which they joined
        self.next_place = 0  # round robin: where to look first
        self.in_flight = 0
        self.in_flight_interactive = 0
        self.pending_tokens = 0
        self.evictions = 0
        self.busy_since_s = 0.0  # since when any has been in flight, while any is
        self.token_time_table_s = spec.hardware.token_time_table_s(spec.token_budget)
        self._coefficients_s = spec.hardware.attention_coefficients_s
        self._mean_residence_s = 0.0  # dispatch to last token
        self._num_residences = 0

    def book_residence(self, residence_s: float) -> None:
        """Move the mean residence by one finished request."""
        self._num_residences += 1
        step_s = (residence_s - self._mean_residence_s) / min(self._num_residences, _RESIDENCE_MEMORY)
        self._mean_residence_s += step_s

    def residence_s(self, now_s: float) -> float:
        """How long requests are taken to stay on a replica."""
        known = self._mean_residence_s, self._num_residences, self.in_flight, self.busy_since_s
        return float(known_residence_s(*known, now_s))

    def snapshot(self) -> PoolSnapshot:
        """Gauges and the counter of evictions."""
        return PoolSnapshot(
            in_flight=self.in_flight,
            in_flight_interactive=self.in_flight_interactive,
            busy_interactive=sum(replica.num_interactive > 0 for replica in self.replicas),
            pending_prompt_tokens=self.pending_tokens,
            batch_cap=self.cap,
            evictions=self.evictions,
        )

    def prefill_time_s(self, tokens: int, squared_tokens: int, num_decoding: int, decoding_tokens: int) -> float:
        """Time in which one of its replicas computes prompts beside running decodes."""
        return float(
            prefill_time_s(
                tokens,
                squared_tokens,
                num_decoding,
                decoding_tokens,
                self.spec.token_budget,
                self.token_time_table_s,
                self._coefficients_s,
            )
        )

    def residual_iteration_s(self, num_decoding: int, decoding_tokens: int) -> float:
        """What is left, on average, of the iteration in progress."""
        return float(
            residual_iteration_s(
                num_decoding, decoding_tokens, self.spec.token_budget, self.token_time_table_s, self._coefficients_s
            )
        )


class ReplicaBook:
    """One replica: its address, its phase and the requests on it.

    Args:
        replica_id: unique over the fleet's life.
        pool: who owns it.
        url: base address.
        phase: as the controller says.
        place: its number in the pool; never used again.
    """

    def __init__(self, replica_id: str, pool: PoolBook, url: str, phase: Phase, place: int) -> None:
        self.replica_id = replica_id
        self.pool = pool
        self.url = url
        self.phase = phase
        self.place = place
        self.listed = True  # False: no longer in the controller's list, and kept while requests are on it
        self.suspended_until_s = 0.0  # it failed a request before its first token: left alone for a while
        self.num_failures = 0  # since the last success
        self.tickets: set[Ticket] = set()
        self.evictable: dict[Ticket, None] = {}  # those that may be taken off it, in the order in which they came
        self.num_interactive = 0
        self.clearing_s = 0.0  # when the prompts sent here should have their first tokens
        self.pending_tokens = 0
        self._pending_squares = 0
        self._num_seen = 0  # streams that have begun
        self._seen_tokens = 0

    @property
    def load(self) -> int:
        """Requests in flight."""
        return len(self.tickets)

    def listens(self, now_s: float) -> bool:
        """Whether requests are sent to it at all."""
        return self.phase == "ready" and self.suspended_until_s <= now_s

    def has_room(self, now_s: float) -> bool:
        """Whether one more request may be sent to it."""
        return len(self.tickets) < self.pool.cap and self.listens(now_s)

    def expected_first_token_s(self, prompt_tokens: int, now_s: float) -> float:
        """When a prompt sent to it now should have its first token."""
        residual_s = self.pool.residual_iteration_s(self._num_seen, self._seen_tokens)
        ahead_s = self._pending_time_s(0)
        own_s = self._pending_time_s(prompt_tokens) - ahead_s
        return now_s + float(wait_ahead_s(now_s, self.clearing_s, ahead_s, residual_s)) + own_s

    def add(self, ticket: Ticket, *, interactive: bool, evictable: bool, now_s: float) -> None:
        """A request is sent to it; ``evictable`` until its client gets something."""
        self.clearing_s = ticket.expected_s = self.expected_first_token_s(ticket.prompt_tokens, now_s)
        ticket.awaited = True
        self.tickets.add(ticket)
        if evictable:
            self.evictable[ticket] = None
        self._count_pending(ticket.prompt_tokens, 1)
        if self.pool.in_flight == 0:
            self.pool.busy_since_s = now_s
        self.pool.in_flight += 1
        self.num_interactive += interactive
        self.pool.in_flight_interactive += interactive

    def see_token(self, ticket: Ticket, now_s: float) -> None:
        """A stream has sent its first token since it was sent here: its prompt is no longer pending."""
        ticket.awaited = False
        self._num_seen += 1
        self._seen_tokens += ticket.prompt_tokens
        self._no_longer_pending(ticket, now_s)

    def remove(self, ticket: Ticket, *, interactive: bool, now_s: float) -> None:
        """A request has left it, finished or not."""
        self.tickets.remove(ticket)
        self.evictable.pop(ticket, None)
        if ticket.awaited:
            ticket.awaited = False
            self._no_longer_pending(ticket, now_s)
        else:
            self._num_seen -= 1
            self._seen_tokens -= ticket.prompt_tokens
        self.pool.in_flight -= 1
        self.num_interactive -= interactive
        self.pool.in_flight_interactive -= interactive

    def _count_pending(self, tokens: int, sign: int) -> None:
        self.pending_tokens += sign * tokens
        self.pool.pending_tokens += sign * tokens
        self._pending_squares += sign * tokens * tokens

    def _no_longer_pending(self, ticket: Ticket, now_s: float) -> None:
        self._count_pending(ticket.prompt_tokens, -1)
        self.clearing_s = float(corrected_clearing_s(now_s, self.clearing_s, self._pending_time_s(0)))

    def _pending_time_s(self, more_tokens: int) -> float:
        """How long its pending prompts take from their beginning, with one more prompt of so many tokens."""
        return self.pool.prefill_time_s(
            self.pending_tokens + more_tokens,
            self._pending_squares + more_tokens * more_tokens,
            self._num_seen,
            self._seen_tokens,
        )
