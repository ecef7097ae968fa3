"""Counters of a pool and of a service class; they only rise, and telemetry is their difference over a window."""

from __future__ import annotations

from dataclasses import dataclass, field

from rl_autoscale.fleet.admission import MEAN_OVER, UNKNOWN_ANSWER_TOKENS, moved_mean


@dataclass(slots=True)
class PoolBooks:
    """What a pool has done so far."""

    replica_s: float = 0.0  # starting, ready and draining replicas, integrated over time
    ready_s: float = 0.0
    sleep_s: float = 0.0
    itl_sum_s: float = 0.0  # seconds between consecutive tokens of decoding sequences
    itl_count: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    evictions: int = 0
    migrations: int = 0  # from replicas that drain, or are rebalanced
    forwarded: int = 0  # declined by one replica, sent to another
    starts: int = 0  # wake-ups included
    wakes: int = 0
    crashes: int = 0
    notices: int = 0  # spot replicas that are to be taken away
    taken_away: int = 0  # before they were empty
    cancelled_starts: int = 0
    reclaimed: int = 0
    preemptions: int = 0
    released_tokens: int = 0  # in the KV cache of requests when they finished
    released_blocks: int = 0  # that those held
    moved_blocks: int = 0  # between GPU and host
    prefix_queried_tokens: int = 0  # looked up in prefix caches
    prefix_hit_tokens: int = 0  # and found
    cached_blocks_evicted: int = 0  # that other requests could have found


@dataclass(slots=True)
class ClassBooks:
    """What has become of a class's requests so far."""

    arrived: int = 0
    arrived_tokens: int = 0
    mean_prompt_tokens: float = 0.0  # of late
    mean_answer_tokens: float = UNKNOWN_ANSWER_TOKENS  # likewise
    finished: int = 0
    output_tokens: int = 0  # of finished requests
    met: int = 0
    late_first_tokens: int = 0
    slow_answers: int = 0  # late by their pace alone, see ClassTelemetry
    missed: int = 0  # known to miss
    refused: int = 0
    dropped: int = 0  # queue full, timed out or failed
    ttft_s: list[float] = field(default_factory=list)  # of every first token, in the order of the tokens
    tpot_s: list[float] = field(default_factory=list)  # of every finished request with more than one token

    def arrive(self, prompt_tokens: int) -> None:
        """A request has reached the gateway."""
        self.arrived += 1
        self.arrived_tokens += prompt_tokens
        self.mean_prompt_tokens = float(moved_mean(self.mean_prompt_tokens, self.arrived, prompt_tokens))

    def finish(self, output_tokens: int) -> None:
        """A request has got all that it asked for."""
        self.finished += 1
        self.output_tokens += output_tokens
        self.mean_answer_tokens = float(moved_mean(self.mean_answer_tokens, MEAN_OVER, output_tokens))
