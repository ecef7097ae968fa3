"""A service class inside the gateway: its queue, its counters, its histograms."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque

from rl_autoscale.fleet.admission import MEAN_OVER, UNKNOWN_ANSWER_TOKENS, moved_mean
from rl_autoscale.fleet.latency_edges import TPOT_BOUNDS_S, TTFT_BOUNDS_S
from rl_autoscale.fleet.spec import ServiceClass
from rl_autoscale.fleet.state import NEVER_REFUSE, NO_LIMIT, SHORT_ANSWER_TOKENS
from rl_autoscale.serving.gateway.tickets import State, Ticket
from rl_autoscale.serving.gateway_api import ClassSnapshot, HistogramSnapshot


class Histogram:
    """Counts of durations by bucket, growing for ever.

    Args:
        bounds_s: upper bounds of the buckets, increasing.
    """

    def __init__(self, bounds_s: tuple[float, ...]) -> None:
        self.bounds_s = bounds_s
        self.sum_s = 0.0
        self._buckets = [0] * (len(bounds_s) + 1)

    def add(self, duration_s: float) -> None:
        """Count one duration, >= 0."""
        self._buckets[bisect_left(self.bounds_s, duration_s)] += 1
        self.sum_s += duration_s

    def snapshot(self) -> HistogramSnapshot:
        """Cumulative counts."""
        total = 0
        counts = []
        for count in self._buckets:
            total += count
            counts.append(total)
        return HistogramSnapshot(bounds_s=self.bounds_s, counts=tuple(counts[:-1]), count=total, sum_s=self.sum_s)


class ClassBook:
    """Queue and books of one class.

    Args:
        promise: the class.
    """

    def __init__(self, promise: ServiceClass) -> None:
        self.promise = promise
        self.interactive = promise.kind == "interactive"
        self.queue: deque[Ticket] = deque()  # in the order of arrival
        self.queued_tokens = 0
        self.in_flight = 0
        self.admission = float(NEVER_REFUSE)
        self.selectivity = 0.0
        self.max_in_flight = NO_LIMIT
        self.arrivals = 0
        self.arrived_tokens = 0
        self.mean_prompt_tokens = 0.0  # of late
        self.mean_answer_tokens = UNKNOWN_ANSWER_TOKENS  # likewise
        self.first_tokens = 0
        self.late_first_tokens = 0
        self.met = 0
        self.slow_answers = 0
        self.output_tokens = 0  # of finished requests
        self.ended = dict.fromkeys(State, 0)  # the states of INSIDE stay 0
        self.ttft = Histogram(TTFT_BOUNDS_S)
        self.tpot = Histogram(TPOT_BOUNDS_S)

    @property
    def at_limit(self) -> bool:
        """Whether as many of it are in flight as may be."""
        return self.in_flight >= self.max_in_flight

    def book_arrival(self, prompt_tokens: int) -> None:
        """A request has reached the gateway."""
        self.arrivals += 1
        self.arrived_tokens += prompt_tokens
        self.mean_prompt_tokens = moved_mean(self.mean_prompt_tokens, self.arrivals, prompt_tokens)

    def enqueue(self, ticket: Ticket) -> None:
        """Hold a request at its place by arrival: one that lost its replica stands before the younger ones."""
        ticket.state = State.QUEUED
        place = len(self.queue)
        while place > 0 and self.queue[place - 1].sequence > ticket.sequence:
            place -= 1
        self.queue.insert(place, ticket)
        self.queued_tokens += ticket.prompt_tokens

    def dequeue(self) -> Ticket:
        """Take the oldest."""
        ticket = self.queue.popleft()
        self.queued_tokens -= ticket.prompt_tokens
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Take one out of the middle."""
        self.queue.remove(ticket)
        self.queued_tokens -= ticket.prompt_tokens

    def lost_patience(self, ticket: Ticket, now_s: float) -> bool:
        """Whether a request has waited longer than the class allows."""
        timeout_s = self.promise.timeout_s
        return timeout_s is not None and ticket.arrival_s + timeout_s <= now_s

    def book_first_token(self, ticket: Ticket, now_s: float) -> None:
        """The client has its first token."""
        ticket.first_token_s = now_s
        ttft_s = now_s - ticket.arrival_s
        self.first_tokens += 1
        self.late_first_tokens += ttft_s > self.promise.ttft_slo_s
        self.ttft.add(ttft_s)

    def book_finish(self, ticket: Ticket, output_tokens: int, now_s: float) -> None:
        """The client has its last token; judge the SLOs."""
        self.output_tokens += output_tokens
        self.mean_answer_tokens = moved_mean(self.mean_answer_tokens, MEAN_OVER, output_tokens)
        if ticket.streams:
            met = self._stream_meets_slos(ticket, output_tokens, now_s)
        else:
            met = self._answer_meets_slos(ticket, output_tokens, now_s)
        self.met += met

    def snapshot(self, now_s: float) -> ClassSnapshot:
        """Counters and gauges."""
        return ClassSnapshot(
            arrivals=self.arrivals,
            arrived_prompt_tokens=self.arrived_tokens,
            first_tokens=self.first_tokens,
            late_first_tokens=self.late_first_tokens,
            finished=self.ended[State.FINISHED],
            met=self.met,
            slow_answers=self.slow_answers,
            finished_output_tokens=self.output_tokens,
            refused=self.ended[State.REFUSED],
            dropped=self.ended[State.DROPPED],
            cancelled=self.ended[State.CANCELLED],
            failed=self.ended[State.FAILED],
            queue_length=len(self.queue),
            queued_prompt_tokens=self.queued_tokens,
            oldest_wait_s=max(now_s - self.queue[0].arrival_s, 0.0) if self.queue else 0.0,
            in_flight=self.in_flight,
            admission=None if math.isinf(self.admission) else self.admission,
            selectivity=self.selectivity,
            ttft=self.ttft.snapshot(),
            tpot=self.tpot.snapshot(),
        )

    def _stream_meets_slos(self, ticket: Ticket, output_tokens: int, now_s: float) -> bool:
        tpot_s = 0.0
        if output_tokens > 1:
            tpot_s = (now_s - ticket.first_token_s) / (output_tokens - 1)
            self.tpot.add(tpot_s)
        in_time = ticket.first_token_s - ticket.arrival_s <= self.promise.ttft_slo_s
        slow = tpot_s > self.promise.tpot_slo_s
        self.slow_answers += in_time and slow and output_tokens > SHORT_ANSWER_TOKENS
        return in_time and not slow and self._meets_deadline(ticket, now_s)

    def _answer_meets_slos(self, ticket: Ticket, output_tokens: int, now_s: float) -> bool:
        """An answer in one piece keeps its promises when it takes no longer than a stream that just keeps them."""
        allowed_s = self.promise.ttft_slo_s + self.promise.tpot_slo_s * max(output_tokens - 1, 0)
        late = now_s - ticket.arrival_s > allowed_s
        self.late_first_tokens += late  # whether it waited or was slow nobody knows
        return not late and self._meets_deadline(ticket, now_s)

    def _meets_deadline(self, ticket: Ticket, now_s: float) -> bool:
        deadline_s = self.promise.deadline_s
        return deadline_s is None or now_s - ticket.arrival_s <= deadline_s
