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
from rl_autoscale.fleet.errors import did_you_mean
from rl_autoscale.fleet.pool import STAGED_SCHEDULERS, PoolSpec, Role
from rl_autoscale.fleet.profile import (
    BLOCK_SIZE_TOKENS,
)
from rl_autoscale.fleet.stages import KvTransferSpec, PostprocessSpec

IntArray = npt.NDArray[np.int64]
ClassKind = Literal["interactive", "batch"]
Router = Literal["round_robin", "least_loaded", "power_of_two", "packing", "prefix_affinity", "freeness"]

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
    model: str | None = Field(default=None, description="it is served by pools of this model, where pools name models")
    ttft_slo_s: PositiveFloat = Field(description="arrival to first token, queueing included")
    tpot_slo_s: PositiveFloat = Field(description="(last token - first token) / (output tokens - 1)")
    deadline_s: PositiveFloat | None = Field(default=None, description="arrival to last token")
    priority: int = Field(default=0, description="lower is served first, as in vLLM")
    queue_limit: NonNegativeInt = Field(default=2000, description="bound of the gateway's queue for this class")
    timeout_s: PositiveFloat | None = Field(default=None, description="longest wait in the gateway's queue")
    max_output_tokens: PositiveInt | None = Field(
        default=None, description="the max_tokens that its requests ask for; pools that reserve output need it"
    )


class SharedGpus(Config):
    """GPUs on which the replicas of several pools take turns: a model is swapped out before another is swapped in.

    What a swap takes is the start-up time of the pool that comes; what it gives up drains first.
    """

    pools: tuple[str, ...] = Field(min_length=2, description="names; no pool is in two such groups")
    gpus: PositiveInt = Field(description="of all of them together; draining replicas hold theirs until they are gone")


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
        "prefix_affinity first looks where the prompt's prefix was last sent; "
        "freeness: the most free KV blocks per request (Llumnix)",
    )
    control_interval_s: PositiveFloat = 10.0
    telemetry_age_s: NonNegativeFloat = Field(default=1.0, description="age of every signal when a decision reads it")
    gpu_budget: PositiveInt | None = None
    shared_gpus: tuple[SharedGpus, ...] = Field(
        default=(), description="pools whose models take turns on the same GPUs"
    )
    evict_batch: bool = Field(default=True, description="interactive requests may evict batch work from mixed replicas")
    eviction: Literal["recompute", "host"] = Field(
        default="recompute",
        description="what becomes of an evicted sequence's KV cache: it is lost, or moved to host memory and back",
    )
    drain: Literal["wait", "migrate"] = Field(
        default="wait", description="what a draining replica has ends there, or goes on where there is a place"
    )
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
        self._check_moving_streams()
        self._check_shared_gpus()
        self._check_urgent_headroom()
        for c, service_class in enumerate(self.classes):
            if not self.pools_serving(c):
                of_model = "" if service_class.model is None else f" and model {service_class.model}"
                raise ValueError(
                    f"no pool may serve class '{service_class.name}' ({service_class.kind}); "
                    f"add a pool with role {' or '.join(ROLES_SERVING[service_class.kind])}{of_model}"
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
        sleepy = [pool.name for pool in self.pools if pool.sleep is not None]
        if self.gpu_budget is not None and sleepy and len(self.pools) > 1:
            raise ValueError(
                f"pool '{sleepy[0]}' sleeps, and gpu_budget={self.gpu_budget} is for several pools; "
                "sleepers keep their GPUs, and telemetry does not tell them: drop sleep or gpu_budget"
            )
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

    def _check_shared_gpus(self) -> None:
        shared = [name for group in self.shared_gpus for name in group.pools]
        for name in shared:
            if name not in self.pool_names:
                raise ValueError(
                    f"shared_gpus names pool '{name}'{did_you_mean(name, self.pool_names)}; "
                    f"pools: {', '.join(self.pool_names)}"
                )
            if shared.count(name) > 1:
                raise ValueError(f"shared_gpus names pool '{name}' twice; a pool shares its GPUs with one group")
            if self.pools[self.pool_names.index(name)].spot is not None:
                raise ValueError(
                    f"pool '{name}' shares its GPUs and is spot; a replica under notice is replaced elsewhere: drop one"
                )
            if self.pools[self.pool_names.index(name)].sleep is not None:
                raise ValueError(
                    f"pool '{name}' shares its GPUs and sleeps; a sleeper would keep them from others: drop one"
                )
        for pools, gpus in self.gpu_groups:
            taken = int((self.gpus_per_replica * self.initial_replicas)[list(pools)].sum())
            if taken > gpus:
                raise ValueError(f"shared_gpus: the initial replicas of its pools take {taken} of {gpus} GPUs")

    def _check_moving_streams(self) -> None:
        """A sequence that takes its KV cache along must find schedulers that know it, and its model."""
        option = "eviction: host" if self.eviction == "host" else "drain: migrate"
        if option == "drain: migrate" and self.drain == "wait":
            return
        for pool in self.pools:
            if pool.role in ("prefill", "decode"):
                raise ValueError(f"{option} is not for prefill and decode pools; drop it")
            if pool.scheduler not in STAGED_SCHEDULERS or pool.reserves_output:
                raise ValueError(
                    f"{option} goes with scheduler {' or '.join(STAGED_SCHEDULERS)} and paged KV allocation only; "
                    f"change pool '{pool.name}' or drop {option}"
                )
        for c, service_class in enumerate(self.classes):
            models = sorted({self.pools[p].hardware.model for p in self.pools_serving(c)})
            if len(models) > 1:
                raise ValueError(
                    f"{option}: class '{service_class.name}' may be served by {', '.join(models)}, and a KV cache "
                    "belongs to one model; give each model a class of its own or drop it"
                )

    def _check_urgent_headroom(self) -> None:
        for p, pool in enumerate(self.pools):
            if not pool.urgent_headroom_blocks:
                continue
            if self.router != "freeness" and pool.rebalance is None:
                raise ValueError(
                    f"pool '{pool.name}': urgent_headroom_blocks is used by router: freeness and by rebalance only; "
                    "add one of them or drop it"
                )
            passing = [item for c, item in enumerate(self.classes) if p in self.pools_passed(c)]
            if self.urgent_priority not in [item.priority for item in passing]:
                raise ValueError(
                    f"pool '{pool.name}': urgent_headroom_blocks is for requests of a more urgent priority than "
                    "others, and none of its classes has it; give one a lower priority than the rest or drop it"
                )

    @property
    def urgent_priority(self) -> int | None:
        """The most urgent priority (the lowest number); None where all classes have the same."""
        priorities = {item.priority for item in self.classes}
        return min(priorities) if len(priorities) > 1 else None

    @property
    def pool_names(self) -> tuple[str, ...]:
        """Pool names in order; every (num_pools,) array follows it."""
        return tuple(pool.name for pool in self.pools)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in order; every (num_classes,) array follows it."""
        return tuple(service_class.name for service_class in self.classes)

    @property
    def is_simple(self) -> bool:
        """Whether one pool serves one class, so that nothing that becomes of a request is due to another."""
        return len(self.pools) == 1 and len(self.classes) == 1

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
    def gpu_groups(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """``shared_gpus`` as (indices of the pools, GPUs)."""
        return tuple((tuple(map(self.pool_names.index, group.pools)), group.gpus) for group in self.shared_gpus)

    @cached_property
    def batch_limits(self) -> IntArray:
        """Shape (num_pools,): each pool's ``max_num_seqs``."""
        return np.array([pool.batch_limit for pool in self.pools], dtype=np.int64)

    @cached_property
    def cheapest_first(self) -> tuple[tuple[int, ...], ...]:
        """For each role and model, its pools, which stand beside each other, by the price of a typical request."""

        def request_usd(p: int) -> float:
            pool = self.pools[p]
            return pool.price_usd_per_gpu_hour * pool.hardware.gpus_per_replica * pool.typical_request_s / 3600.0

        tiers = dict.fromkeys(pool.tier for pool in self.pools)
        beside = ([p for p, pool in enumerate(self.pools) if pool.tier == tier] for tier in tiers)
        return tuple(tuple(sorted(pools, key=request_usd)) for pools in beside)

    @cached_property
    def first_choice(self) -> IntArray:
        """Shape (num_classes,): the pool a class's demand is planned on, the cheapest of its preferred role."""
        cheapest = {pool: pools[0] for pools in self.cheapest_first for pool in pools}
        preferred = [self.pools_serving(c)[0] for c in range(len(self.classes))]
        return np.array([cheapest[p] for p in preferred], dtype=np.int64)

    @cached_property
    def tpot_tiers_s(self) -> tuple[float, ...]:
        """TPOT SLOs of the classes in ascending order, then inf."""
        return (*sorted({item.tpot_slo_s for item in self.classes}), float("inf"))

    def pools_serving(self, class_index: int) -> tuple[int, ...]:
        """Indices of the pools that the gateway may send a class to, preferred first."""
        roles = (*ROLES_SERVING[self.classes[class_index].kind], "prefill")
        model = self.classes[class_index].model
        return tuple(p for role in roles for p, pool in enumerate(self.pools) if pool.tier == (role, model))

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
