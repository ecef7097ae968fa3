"""What a pool of replicas is: hardware, role, engine settings, and how replicas start, sleep and are taken away."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.profile import (
    BLOCK_SIZE_TOKENS,
    TYPICAL_OUTPUT_TOKENS,
    TYPICAL_PROMPT_TOKENS,
    LatencyProfile,
    load_profile,
)
from rl_autoscale.fleet.slos_serve import SlosServeSpec

Role = Literal["interactive", "mixed", "batch", "prefill", "decode"]
SchedulerName = Literal[
    "vllm", "vllm-priority", "vllm-v0", "sarathi", "trtllm-no-evict", "trtllm-max-utilization", "fastserve",
    "slos-serve", "andes",
]  # fmt: skip
RANKED_SCHEDULERS: tuple[SchedulerName, ...] = ("vllm-priority", "fastserve", "slos-serve", "andes")
"""Those that sort their waiting queue."""
STAGED_SCHEDULERS: tuple[SchedulerName, ...] = ("vllm", "vllm-priority")
"""Those that know of other stages: KV that comes over the bridge, places that post-processing keeps."""


class StartupPhase(Config):
    """One phase of a replica's start (node, image, weights, warm-up), Gamma distributed; cv 0 is a constant."""

    name: str = "start"
    mean_s: NonNegativeFloat
    cv: NonNegativeFloat = 0.25


class SleepSpec(Config):
    """Replicas that keep their process and weights beside the GPU (vLLM's sleep mode) and wake in seconds.

    A replica that has nothing left to do goes to sleep instead of leaving while fewer than ``max_sleeping`` do, and
    sleepers are woken before a replica is started from scratch. The GPUs stay rented.
    """

    max_sleeping: PositiveInt
    wake: tuple[StartupPhase, ...] = (StartupPhase(name="wake", mean_s=3.0),)
    price_fraction: float = Field(default=1.0, ge=0, le=1, description="of the pool's price, while asleep")


class SpotSpec(Config):
    """Replicas that the provider takes away: after the notice they get no requests and drain while they can."""

    mean_life_s: PositiveFloat = Field(description="exponential; from ready to the notice")
    notice_s: NonNegativeFloat = Field(default=30.0, description="from the notice to the end; streams left then fail")


class RebalanceSpec(Config):
    """Running sequences move from replicas whose KV cache is short to others of the pool that have plenty.

    Every so often the replicas with the least freeness (`fleet/routing.freeness`) are paired with those with the most.
    Each first one of a pair gives one sequence, with its KV cache, to the second: of the least urgent class, and of
    those the shortest. It keeps it if the second would then be below the first bound, too.

    Source: Llumnix (OSDI 2024, arXiv 2406.03243), section 4.4; the first bound is the artifact's
    (``llumnix/config/default.py``, migrate-out threshold), the others did best in ``benchmarks/kv_balance.py``.
    """

    every_s: PositiveFloat = 0.25
    source_below: NonNegativeFloat = Field(default=3.0, description="free KV blocks per request; less: it gives")
    destination_above: NonNegativeFloat = Field(default=10.0, description="free KV blocks per request; more: it takes")

    @model_validator(mode="after")
    def _check(self) -> RebalanceSpec:
        if self.source_below > self.destination_above:
            raise ValueError(
                f"source_below={self.source_below} exceeds destination_above={self.destination_above}; "
                "a replica would give and take at once: lower it or raise destination_above"
            )
        return self


class SpeculationSpec(Config):
    """Speculative decoding: a drafter proposes tokens, and one iteration verifies all of them and keeps a prefix.

    The scheduler slos-serve may ask for fewer (SlosServeSpec.adaptive_drafts); drafting then takes their share of the
    time.

    Drafts are accepted independently of each other and of the request, up to the first that is not (Leviathan et al.,
    ICML 2023, section 3.1). Every decode sequence keeps the average of it, in whole tokens as they fill up.
    """

    draft_tokens: int = Field(ge=1, le=15, description="proposed per sequence and iteration")
    acceptance: float = Field(ge=0, le=1, description="chance of a draft whose predecessors were accepted")
    draft_s: NonNegativeFloat = Field(default=0.0, description="drafting, per iteration with decode sequences")

    @property
    def tokens_per_iteration(self) -> float:
        """Tokens that a decode sequence keeps on average, the verifier's own included; rounded to 1/32."""
        return self.kept_tokens[-1]

    @property
    def kept_tokens(self) -> tuple[float, ...]:
        """The same by the number of drafts that an iteration verifies, from 0 to all."""
        kept, each = [], 0.0
        for accepted in range(self.draft_tokens + 1):
            each += self.acceptance**accepted
            kept.append(round(each * SPECULATION_UNITS_PER_TOKEN) / SPECULATION_UNITS_PER_TOKEN)
        return tuple(kept)


SPECULATION_UNITS_PER_TOKEN = 32
"""Fractions of tokens are multiples of one over this power of two, so that their sums are exact."""


class PoolSpec(Config):
    """Replicas that share hardware, role and engine settings."""

    name: str = Field(min_length=1)
    role: Role = "mixed"
    model: str | None = Field(default=None, description="it serves the classes that ask for this model, and no others")
    profile: str = Field(description="a shipped profile's name, or a path ending in .yaml")
    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt = 50
    initial_replicas: NonNegativeInt | None = Field(default=None, description="ready at time 0; default min_replicas")
    startup: tuple[StartupPhase, ...] = (StartupPhase(name="start", mean_s=60.0),)
    max_num_seqs: PositiveInt | None = Field(default=None, description="engine's batch limit; default the profile's")
    max_num_batched_tokens: PositiveInt | None = Field(default=None, description="token budget; default the profile's")
    kv_blocks: PositiveInt | None = Field(default=None, description="KV blocks of 16 tokens; default the profile's")
    scheduler: SchedulerName = Field(default="vllm", description="docs/systems.md; vllm is V1, first come first served")
    slos_serve: SlosServeSpec = Field(default=SlosServeSpec(), description="options of the scheduler slos-serve")
    kv_allocation: Literal["paged", "contiguous"] = Field(
        default="paged",
        description="contiguous: each request takes its longest possible length at once, as before vLLM",
    )
    block_move_s: NonNegativeFloat = Field(
        default=1e-4, description="a KV block from GPU to host or back, for schedulers that swap"
    )
    rebalance: RebalanceSpec | None = Field(default=None, description="running sequences move to freer replicas")
    urgent_headroom_blocks: NonNegativeInt = Field(
        default=0,
        description="KV blocks that count as used in the freeness of a replica with requests of the most urgent "
        "priority (Llumnix)",
    )
    prefix_caching: bool = Field(default=False, description="automatic prefix caching, for traces that hash prompts")
    mean_time_to_crash_s: PositiveFloat | None = Field(default=None, description="exponential life of a ready replica")
    sleep: SleepSpec | None = Field(default=None, description="surplus replicas sleep instead of leaving")
    spot: SpotSpec | None = Field(default=None, description="replicas may be taken away")
    speculation: SpeculationSpec | None = Field(default=None, description="several tokens per decode iteration")
    price_usd_per_gpu_hour: NonNegativeFloat = 2.0

    @model_validator(mode="after")
    def _check(self) -> PoolSpec:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas} exceeds max_replicas={self.max_replicas}; "
                "lower it or raise max_replicas"
            )
        if self.initial_replicas is not None and not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError(
                f"initial_replicas={self.initial_replicas} is outside min_replicas={self.min_replicas}.."
                f"max_replicas={self.max_replicas}"
            )
        if self.sleep is not None and self.spot is not None:
            raise ValueError("sleep and spot exclude each other: a sleeper would not survive its notice; drop one")
        if self.role == "decode" and self.prefix_caching:
            raise ValueError(
                "prefix_caching is for pools that compute prompts; a decode pool is sent their KV: drop it"
            )
        if self.role == "prefill" and self.speculation is not None:
            raise ValueError("speculation is for pools that decode; drop it from the prefill pool")
        if self.kv_allocation == "contiguous" and self.prefix_caching:
            raise ValueError("contiguous KV caches share no blocks; drop prefix_caching or kv_allocation: contiguous")
        if self.scheduler in ("fastserve", "slos-serve", "andes"):
            for option in ("prefix_caching", "speculation", "reserves_output"):
                if getattr(self, option) and (self.scheduler, option) != ("slos-serve", "speculation"):
                    raise ValueError(f"scheduler {self.scheduler} does not go with {option}; drop one")
        staged = self.scheduler in STAGED_SCHEDULERS and not self.reserves_output
        if self.rebalance is not None and (self.role in ("prefill", "decode") or not staged):
            raise ValueError(
                f"pool '{self.name}': rebalance goes with scheduler {' or '.join(STAGED_SCHEDULERS)}, paged KV "
                "allocation and roles interactive, mixed and batch only; change that or drop rebalance"
            )
        if self.role in ("prefill", "decode") and not staged:
            raise ValueError(
                f"role {self.role} goes with scheduler {' or '.join(STAGED_SCHEDULERS)} and paged KV allocation only"
            )
        hardware = self.hardware  # an unknown profile is refused here, not at the first iteration
        if self.batch_limit > self.token_budget:
            raise ValueError(
                f"max_num_seqs={self.batch_limit} exceeds max_num_batched_tokens={self.token_budget}; "
                "a decode batch must fit one iteration, as vLLM demands"
            )
        if self.batch_limit * self.verified_tokens > self.token_budget:
            raise ValueError(
                f"max_num_seqs={self.batch_limit} sequences of {self.verified_tokens} tokens (one and its drafts) "
                f"exceed max_num_batched_tokens={self.token_budget}; lower max_num_seqs or draft_tokens"
            )
        del hardware
        return self

    @property
    def tier(self) -> tuple[Role, str | None]:
        """Pools with the same role and model can stand in for each other."""
        return self.role, self.model

    @cached_property
    def hardware(self) -> LatencyProfile:
        """The resolved latency profile."""
        return load_profile(self.profile)

    @property
    def batch_limit(self) -> int:
        """The engine's ``max_num_seqs``."""
        return self.max_num_seqs or self.hardware.max_num_seqs

    @property
    def token_budget(self) -> int:
        """The engine's ``max_num_batched_tokens``."""
        return self.max_num_batched_tokens or self.hardware.max_num_batched_tokens

    @property
    def num_kv_blocks(self) -> int:
        """KV blocks of one replica."""
        return self.kv_blocks or self.hardware.kv_blocks

    @property
    def longest_request_tokens(self) -> int:
        """KV tokens of the longest request that a replica can hold; a last iteration may compute beyond its output."""
        return self.num_kv_blocks * BLOCK_SIZE_TOKENS - self.verified_tokens + 1

    @property
    def reserves_output(self) -> bool:
        """Whether a request is admitted only if the longest that it may become fits, beside all others."""
        return self.scheduler == "trtllm-no-evict" or self.kv_allocation == "contiguous"

    @property
    def verified_tokens(self) -> int:
        """Tokens that an iteration computes for a decode sequence: its next one and the drafts."""
        return 1 if self.speculation is None else 1 + self.speculation.draft_tokens

    @property
    def tokens_per_iteration(self) -> float:
        """Tokens that a decode sequence gets from an iteration, on average."""
        return 1.0 if self.speculation is None else self.speculation.tokens_per_iteration

    @property
    def kept_tokens(self) -> tuple[float, ...]:
        """The same by the number of drafts that the iteration verifies."""
        return (1.0,) if self.speculation is None else self.speculation.kept_tokens

    @property
    def fewest_drafts(self) -> int:
        """The fewest that an iteration verifies."""
        adaptive = self.scheduler == "slos-serve" and self.slos_serve.adaptive_drafts
        return 0 if adaptive else self.verified_tokens - 1

    @property
    def units_per_token(self) -> int:
        """What ``tokens_per_iteration`` is a multiple of, as parts of a token; a power of two."""
        return 1 if self.speculation is None else SPECULATION_UNITS_PER_TOKEN

    @property
    def draft_s(self) -> float:
        """Drafting time of an iteration with decode sequences."""
        return 0.0 if self.speculation is None else self.speculation.draft_s

    def decode_s_per_token(self, batch_size: int, context_tokens: float) -> float:
        """Seconds of one replica per generated token in a decode-only batch of that size and mean context."""
        kept_tokens = self.tokens_per_iteration
        verified_s = self.hardware.decode_s_per_token(
            batch_size, context_tokens, verified_tokens=self.verified_tokens, kept_tokens=kept_tokens
        )
        return verified_s + self.draft_s / (batch_size * kept_tokens)

    def full_batch_decode_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Seconds of one replica per generated token of such requests, in full batches.

        Batches compute prompts as well, and then weights are read for them anyway; but not those of a decode pool.
        """
        if self.role == "decode":
            context_tokens = prompt_tokens + output_tokens / 2.0
            batch_size = min(self.batch_limit, int(self.num_kv_blocks * BLOCK_SIZE_TOKENS // context_tokens))
            return self.decode_s_per_token(max(batch_size, 1), context_tokens)
        return self.hardware.full_batch_decode_s(
            prompt_tokens, output_tokens, verified_tokens=self.verified_tokens, kept_tokens=self.tokens_per_iteration
        )

    @cached_property
    def typical_request_s(self) -> float:
        """Seconds of one replica for its part of a typical request; what a router weighs different hardware by."""
        prefill_s = TYPICAL_PROMPT_TOKENS * self.hardware.prefill_s_per_token(TYPICAL_PROMPT_TOKENS)
        if self.role == "prefill":
            return prefill_s
        decode_s = TYPICAL_OUTPUT_TOKENS * self.full_batch_decode_s(TYPICAL_PROMPT_TOKENS, TYPICAL_OUTPUT_TOKENS)
        return decode_s if self.role == "decode" else prefill_s + decode_s

    @cached_property
    def answer_token_work(self) -> float:
        """Prompt tokens that are as much work for this hardware as one token of an answer."""
        decode_s = self.hardware.full_batch_decode_s(TYPICAL_PROMPT_TOKENS, TYPICAL_OUTPUT_TOKENS)
        return decode_s / self.hardware.prefill_s_per_token(TYPICAL_PROMPT_TOKENS)

    @property
    def initial(self) -> int:
        """Replicas ready at time 0."""
        return self.min_replicas if self.initial_replicas is None else self.initial_replicas

    @property
    def startup_mean_s(self) -> float:
        """Mean start-up time over all phases."""
        return sum(phase.mean_s for phase in self.startup)

    @property
    def wake_mean_s(self) -> float:
        """Mean time to wake over all phases; the start-up time where nobody sleeps."""
        return self.startup_mean_s if self.sleep is None else sum(phase.mean_s for phase in self.sleep.wake)

    @property
    def sleep_price_fraction(self) -> float:
        """Price of a sleeping replica over that of a serving one."""
        return 0.0 if self.sleep is None else self.sleep.price_fraction
