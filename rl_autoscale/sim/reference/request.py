"""One request on its way through the fleet."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.fleet.spec import ServiceClass
from rl_autoscale.fleet.state import SHORT_ANSWER_TOKENS
from rl_autoscale.sim.layout import Outcome
from rl_autoscale.sim.reading import read_on

if TYPE_CHECKING:
    from rl_autoscale.sim.reference.kv_blocks import Block


def blocks_for(tokens: int) -> int:
    """KV blocks that hold so many tokens."""
    return math.ceil(tokens / BLOCK_SIZE_TOKENS)


@dataclass(slots=True, eq=False)
class Request:
    """A request, the tokens it has and what happened to it.

    vLLM knows no phases: a request has ``num_tokens`` (prompt and output so far) and ``computed_tokens`` of them in the
    KV cache, and every iteration lets the second chase the first. An iteration in which it catches up yields a token.

    Times are seconds since the episode's start, NaN before they are known.
    """

    index: int
    class_index: int
    service_class: ServiceClass
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()  # of the prompt, as the gateway sees it
    shared_keys: tuple[int, ...] = ()  # of the prompt's full KV blocks that others may have too, see prefix.py

    dispatched_s: float = math.nan  # last dispatch
    scheduled_s: float = math.nan  # first time in an engine batch
    first_token_s: float = math.nan
    latest_token_s: float = math.nan
    last_token_s: float = math.nan
    end_s: float = math.nan  # last token, or the end of post-processing
    outcome: Outcome = Outcome.PENDING
    slo_met: bool = False
    slot: int = -1  # replica slot of the last dispatch
    generated_tokens: int = 0
    token_fraction: float = 0.0  # of its next token, that accepted drafts have earned on average
    computed_tokens: int = 0
    block_table: list[Block] = field(default_factory=list)
    decoding: bool = False  # its prompt (and what it had generated before it lost its KV) is computed
    awaited: bool = False  # dispatched, and no token has come since
    kv_in_bridge: bool = False  # from the end of its transfer until a decode replica has blocks for it
    marked_for_eviction: bool = False
    num_preemptions: int = 0
    num_evictions: int = 0
    num_declined: int = 0  # slos-serve: times, since the gateway last took it from its queue
    rank: int = 0  # where the waiting queue is sorted: lower is served first,
    rank_s: float = 0.0  # then since when it has that rank, then arrival
    level_s: float = 0.0  # fastserve: time served at its level
    idle_since_s: float = 0.0  # fastserve: when it was last seen in the batch, or came
    on_host: bool = False  # its KV cache is in host memory
    read_s: float = 0.0  # when its client has read the first `read_tokens` tokens, see sim/reading.py
    late_s: float = 0.0  # how long after its due time each of these is read, summed
    read_from_s: float = 0.0  # the tokens after these come evenly from then on
    read_tokens: int = 0  # 0 until one has looked

    @property
    def order(self) -> tuple[int, float, int]:
        """Sort key of a sorted waiting queue."""
        return self.rank, self.rank_s, self.index

    @property
    def num_tokens(self) -> int:
        """Tokens that exist: the prompt and the output so far."""
        return self.prompt_tokens + self.generated_tokens

    def tokens_after(self, tokens: float) -> int:
        """Whole tokens that it gets when it earns so many, on average."""
        return math.floor(self.token_fraction + tokens)

    def block_key(self, j: int) -> object:
        """Key of the content of its KV block j, once that is full; equal keys are equal prefixes."""
        return self.shared_keys[j] if j < len(self.shared_keys) else (self.index, j)

    @property
    def interactive(self) -> bool:
        """Whether a person waits for it."""
        return self.service_class.kind == "interactive"

    @property
    def has_begun(self) -> bool:
        """Whether its first token is out."""
        return not math.isnan(self.first_token_s)

    @property
    def first_token_late(self) -> bool:
        """Whether the first token came after its SLO; False while there is none."""
        return self.first_token_s - self.arrival_s > self.service_class.ttft_slo_s

    def lost_patience(self, now_s: float) -> bool:
        """Whether it has waited in the gateway longer than its class allows; a stream that has begun waits for ever."""
        timeout_s = self.service_class.timeout_s
        return not self.has_begun and timeout_s is not None and self.arrival_s + timeout_s <= now_s

    @property
    def expected_s(self) -> float:
        """When its first token is due."""
        return self.arrival_s + self.service_class.ttft_slo_s

    def read_until(self, tokens: int, now_s: float) -> None:
        """It has so many tokens by now: book how those that are new to us are read."""
        token_s, first_s = self.service_class.tpot_slo_s, self.first_token_s
        if self.read_tokens == 0:
            due_s = self.expected_s - token_s
            self.read_s, self.late_s = read_on(due_s, 0, first_s, first_s, 1, self.expected_s, token_s)
            self.read_from_s, self.read_tokens = first_s, 1
        new_tokens = tokens - self.read_tokens
        self.read_s, late_s = read_on(
            self.read_s, self.read_tokens, self.read_from_s, now_s, new_tokens, self.expected_s, token_s
        )
        self.late_s += late_s
        self.read_from_s, self.read_tokens = now_s, tokens

    @property
    def tpot_s(self) -> float:
        """Seconds per output token after the first, once it has them all; 0 for a single token."""
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def slow(self) -> bool:
        """Whether its pace alone made it late, and it has tokens enough for that to be a pace."""
        late = self.tpot_s > self.service_class.tpot_slo_s
        return late and not self.first_token_late and self.output_tokens > SHORT_ANSWER_TOKENS

    def meets_slos(self, now_s: float) -> bool:
        """Whether all its SLOs hold when it ends now, its last token out."""
        promise = self.service_class
        in_time = promise.deadline_s is None or now_s - self.arrival_s <= promise.deadline_s
        return not self.first_token_late and self.tpot_s <= promise.tpot_slo_s and in_time
