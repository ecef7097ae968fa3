"""What a fleet is.

Service classes with their SLOs, pools of replicas, the shield's limits. All of it is YAML a user writes.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.profile import (
    BLOCK_SIZE_TOKENS,
    TYPICAL_OUTPUT_TOKENS,
    TYPICAL_PROMPT_TOKENS,
    LatencyProfile,
    load_profile,
)
from rl_autoscale.fleet.stages import KvTransferSpec, PostprocessSpec

IntArray = npt.NDArray[np.int64]
ClassKind = Literal["interactive", "batch"]
Role = Literal["interactive", "mixed", "batch", "prefill", "decode"]
SchedulerName = Literal[
    "vllm", "vllm-priority", "vllm-v0", "sarathi", "trtllm-no-evict", "trtllm-max-utilization", "fastserve",
    "slos-serve",
]  # fmt: skip
RANKED_SCHEDULERS: tuple[SchedulerName, ...] = ("vllm-priority", "fastserve", "slos-serve")
"""Those that sort their waiting queue."""
STAGED_SCHEDULERS: tuple[SchedulerName, ...] = ("vllm", "vllm-priority")
"""Those that know of other stages: KV that comes over the bridge, places that post-processing keeps."""
Router = Literal["round_robin", "least_loaded", "power_of_two", "packing", "prefix_affinity"]

ROLES_SERVING: dict[ClassKind, tuple[Role, ...]] = {
    "interactive": ("interactive", "mixed"),
    "batch": ("batch", "mixed"),
}
"""Roles that may serve a class kind, in the order in which the router tries them (Chiron's preferential routing).

A fleet of prefill and decode pools has no others: every class goes to the prefill pools.
"""


class ServiceClass(Config):
    """One kind of traffic and what it was promised.

    A request *attains* its SLOs when its time to first token, its time per output token and, where given, its
    deadline all hold. A request that was refused, timed out or failed is a miss.
    """

    name: str = Field(min_length=1)
    kind: ClassKind = "interactive"
    ttft_slo_s: PositiveFloat = Field(description="arrival to first token, queueing included")
    tpot_slo_s: PositiveFloat = Field(description="(last token - first token) / (output tokens - 1)")
    deadline_s: PositiveFloat | None = Field(default=None, description="arrival to last token")
    priority: int = Field(default=0, description="lower is served first, as in vLLM")
    queue_limit: NonNegativeInt = Field(default=2000, description="bound of the gateway's queue for this class")
    timeout_s: PositiveFloat | None = Field(default=None, description="longest wait in the gateway's queue")
    max_output_tokens: PositiveInt | None = Field(
        default=None, description="the max_tokens that its requests ask for; pools that reserve output need it"
    )


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


class SpeculationSpec(Config):
    """Speculative decoding: a drafter proposes tokens, and one iteration verifies all of them and keeps a prefix.

    Drafts are accepted independently of each other and of the request, up to the first that is not (Leviathan et al.,
    ICML 2023, section 3.1). Every decode sequence keeps the average of it, in whole tokens as they fill up.
    """

    draft_tokens: int = Field(ge=1, le=15, description="proposed per sequence and iteration")
    acceptance: float = Field(ge=0, le=1, description="chance of a draft whose predecessors were accepted")
    draft_s: NonNegativeFloat = Field(default=0.0, description="drafting, per iteration with decode sequences")

    @property
    def tokens_per_iteration(self) -> float:
        """Tokens that a decode sequence keeps on average, the verifier's own included; rounded to 1/32."""
        kept = sum(self.acceptance**accepted for accepted in range(self.draft_tokens + 1))
        return round(kept * SPECULATION_UNITS_PER_TOKEN) / SPECULATION_UNITS_PER_TOKEN


SPECULATION_UNITS_PER_TOKEN = 32
"""Fractions of tokens are multiples of one over this power of two, so that their sums are exact."""


class PoolSpec(Config):
    """Replicas that share hardware, role and engine settings."""

    name: str = Field(min_length=1)
    role: Role = "mixed"
    profile: str = Field(description="a shipped profile's name, or a path ending in .yaml")
    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt = 50
    initial_replicas: NonNegativeInt | None = Field(default=None, description="ready at time 0; default min_replicas")
    startup: tuple[StartupPhase, ...] = (StartupPhase(name="start", mean_s=60.0),)
    max_num_seqs: PositiveInt | None = Field(default=None, description="engine's batch limit; default the profile's")
    max_num_batched_tokens: PositiveInt | None = Field(default=None, description="token budget; default the profile's")
    kv_blocks: PositiveInt | None = Field(default=None, description="KV blocks of 16 tokens; default the profile's")
    scheduler: SchedulerName = Field(default="vllm", description="docs/systems.md; vllm is V1, first come first served")
    kv_allocation: Literal["paged", "contiguous"] = Field(
        default="paged",
        description="contiguous: each request takes its longest possible length at once, as before vLLM",
    )
    block_move_s: NonNegativeFloat = Field(
        default=1e-4, description="a KV block from GPU to host or back, for schedulers that swap"
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
        if self.scheduler in ("fastserve", "slos-serve"):
            for option in ("prefix_caching", "speculation", "reserves_output"):
                if getattr(self, option):
                    raise ValueError(f"scheduler {self.scheduler} does not go with {option}; drop one")
        if self.role in ("prefill", "decode") and (self.scheduler not in STAGED_SCHEDULERS or self.reserves_output):
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


class ShieldSpec(Config):
    """Limits that hold whatever a policy says; see fleet/shield.py."""

    max_step_up: PositiveInt | None = Field(
        default=None, description="replicas added per control step and pool; none: no limit"
    )
    max_step_down: PositiveInt | None = Field(default=None, description="replicas removed per control step and pool")
    down_stabilisation_s: NonNegativeFloat = Field(
        default=0.0, description="scale-down uses the maximum recommendation of this window (Kubernetes HPA v2)"
    )
    max_pending_starts: PositiveInt | None = Field(
        default=None, description="replicas of a pool starting at the same time"
    )


class FleetSpec(Config):
    """A whole fleet."""

    pools: tuple[PoolSpec, ...]
    classes: tuple[ServiceClass, ...]
    router: Router = Field(
        default="least_loaded",
        description="pools are tried by role, then as listed, until one has room; "
        "least_loaded weighs pools of one role by their speed; "
        "prefix_affinity first looks where the prompt's prefix was last sent",
    )
    control_interval_s: PositiveFloat = 10.0
    telemetry_age_s: NonNegativeFloat = Field(default=1.0, description="age of every signal when a decision reads it")
    gpu_budget: PositiveInt | None = None
    evict_batch: bool = Field(default=True, description="interactive requests may evict batch work from mixed replicas")
    kv_transfer: KvTransferSpec | None = Field(default=None, description="between prefill and decode pools")
    postprocess: PostprocessSpec | None = Field(default=None, description="CPU work after the last token")

    @model_validator(mode="after")
    def _check(self) -> FleetSpec:
        for kind, names in (("pool", self.pool_names), ("class", self.class_names)):
            if not names:
                raise ValueError(f"a fleet needs at least one {kind}")
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"{kind} names must differ; repeated: {', '.join(repeated)}")
        if self.telemetry_age_s > self.control_interval_s:
            raise ValueError(
                f"telemetry_age_s={self.telemetry_age_s} exceeds control_interval_s={self.control_interval_s}"
            )
        self._check_disaggregation()
        for c, service_class in enumerate(self.classes):
            if not self.pools_serving(c):
                raise ValueError(
                    f"no pool may serve class '{service_class.name}' ({service_class.kind}); "
                    f"add a pool with role {' or '.join(ROLES_SERVING[service_class.kind])}"
                )
            unstaged = [p.name for p in self.pools if p.scheduler not in STAGED_SCHEDULERS or p.reserves_output]
            if unstaged and self.postprocess is not None:
                raise ValueError(
                    f"postprocess goes with scheduler {' or '.join(STAGED_SCHEDULERS)} and paged KV allocation only; "
                    f"change pool '{unstaged[0]}' or drop postprocess"
                )
            reserving = [pool.name for pool in self.pools if pool.reserves_output]
            if reserving and service_class.max_output_tokens is None:
                raise ValueError(
                    f"pool '{reserving[0]}' reserves KV blocks for the longest possible output; "
                    f"give class '{service_class.name}' its max_output_tokens"
                )
        if self.gpu_budget is not None and self.gpu_budget < int(self.gpus_per_replica @ self.min_replicas):
            raise ValueError(f"gpu_budget={self.gpu_budget} cannot hold min_replicas of every pool")
        if self.gpu_budget is not None and self.gpu_budget < int(self.gpus_per_replica @ self.initial_replicas):
            raise ValueError(f"gpu_budget={self.gpu_budget} cannot hold initial_replicas of every pool")
        return self

    def _check_disaggregation(self) -> None:
        roles = {pool.role for pool in self.pools}
        if not roles & {"prefill", "decode"}:
            if self.kv_transfer is not None:
                raise ValueError("kv_transfer is for fleets of prefill and decode pools; drop it or set the roles")
            return
        if roles != {"prefill", "decode"}:
            raise ValueError(
                f"roles {', '.join(sorted(roles))}: prefill and decode pools come together and without other roles; "
                "add what is missing, or give the other pools a fleet of their own"
            )
        if self.kv_transfer is None:
            raise ValueError("prefill and decode pools need kv_transfer: {link_bytes_per_s: ..., bridge_limit: ...}")
        for pool in self.pools:
            if pool.hardware.kv_bytes_per_token is None:
                raise ValueError(
                    f"profile '{pool.hardware.name}' of pool '{pool.name}' lacks kv_bytes_per_token; add it: "
                    "2 x layers x KV heads x head size x bytes per value"
                )
        models = {(pool.hardware.model, pool.hardware.kv_bytes_per_token) for pool in self.pools}
        if len(models) > 1:
            raise ValueError(
                f"prefill and decode pools must run one model with one KV format; got {sorted(map(str, models))}"
            )

    @property
    def pool_names(self) -> tuple[str, ...]:
        """Pool names in order; every (num_pools,) array follows it."""
        return tuple(pool.name for pool in self.pools)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in order; every (num_classes,) array follows it."""
        return tuple(service_class.name for service_class in self.classes)

    @cached_property
    def gpus_per_replica(self) -> IntArray:
        """Shape (num_pools,)."""
        return np.array([pool.hardware.gpus_per_replica for pool in self.pools], dtype=np.int64)

    @cached_property
    def min_replicas(self) -> IntArray:
        """Shape (num_pools,)."""
        return np.array([pool.min_replicas for pool in self.pools], dtype=np.int64)

    @cached_property
    def max_replicas(self) -> IntArray:
        """Shape (num_pools,)."""
        return np.array([pool.max_replicas for pool in self.pools], dtype=np.int64)

    @cached_property
    def initial_replicas(self) -> IntArray:
        """Shape (num_pools,)."""
        return np.array([pool.initial for pool in self.pools], dtype=np.int64)

    @cached_property
    def batch_limits(self) -> IntArray:
        """Shape (num_pools,): each pool's ``max_num_seqs``."""
        return np.array([pool.batch_limit for pool in self.pools], dtype=np.int64)

    @cached_property
    def cheapest_first(self) -> tuple[tuple[int, ...], ...]:
        """Pools of one role stand beside each other: for each role, its pools by the price of a typical request."""

        def request_usd(p: int) -> float:
            pool = self.pools[p]
            return pool.price_usd_per_gpu_hour * pool.hardware.gpus_per_replica * pool.typical_request_s / 3600.0

        roles = dict.fromkeys(pool.role for pool in self.pools)
        beside = ([p for p, pool in enumerate(self.pools) if pool.role == role] for role in roles)
        return tuple(tuple(sorted(pools, key=request_usd)) for pools in beside)

    @cached_property
    def first_choice(self) -> IntArray:
        """Shape (num_classes,): the pool a class's demand is planned on, the cheapest of its preferred role."""
        cheapest = {pool: pools[0] for pools in self.cheapest_first for pool in pools}
        preferred = [self.pools_serving(c)[0] for c in range(len(self.classes))]
        return np.array([cheapest[p] for p in preferred], dtype=np.int64)

    def pools_serving(self, class_index: int) -> tuple[int, ...]:
        """Indices of the pools that the gateway may send a class to, preferred first."""
        roles = (*ROLES_SERVING[self.classes[class_index].kind], "prefill")
        return tuple(p for role in roles for p, pool in enumerate(self.pools) if pool.role == role)

    def pools_passed(self, class_index: int) -> tuple[int, ...]:
        """Indices of all pools that requests of a class may be on: those that serve it, and the decode pools."""
        return self.pools_serving(class_index) + self.decode_pools

    @cached_property
    def decode_pools(self) -> tuple[int, ...]:
        """Indices of the pools that go on with what prefill pools began; none in a fleet that is not disaggregated."""
        return tuple(p for p, pool in enumerate(self.pools) if pool.role == "decode")

    @property
    def has_stages(self) -> bool:
        """Whether requests pass a bridge or post-processing."""
        return self.kv_transfer is not None or self.postprocess is not None

    def transfer_s(self, pool_index: int, num_blocks: int) -> float:
        """Seconds in which a prefill replica of a pool sends so many KV blocks to the bridge, the link being free."""
        assert self.kv_transfer is not None  # validated
        return self.kv_transfer.latency_s + num_blocks * self.transfer_block_s(pool_index)

    def transfer_block_s(self, pool_index: int) -> float:
        """Seconds that one KV block takes on the link of a pool's replica; 0 where nothing is transferred."""
        bytes_per_token = self.pools[pool_index].hardware.kv_bytes_per_token
        if self.kv_transfer is None or bytes_per_token is None:
            return 0.0
        return BLOCK_SIZE_TOKENS * bytes_per_token / self.kv_transfer.link_bytes_per_s
