"""A fleet's spec as the records that kernels read."""

from __future__ import annotations

import numpy as np

from rl_autoscale.fleet.admission import UNKNOWN_ANSWER_TOKENS
from rl_autoscale.fleet.pool import RANKED_SCHEDULERS, PoolSpec
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NEVER_REFUSE, NO_LIMIT
from rl_autoscale.sim.layout import (
    ADMISSION_CODES,
    CLASS,
    FLEET,
    NONE,
    POOL,
    ROLE_CODES,
    ROUTER_CODES,
    SCHEDULER_CODES,
    FloatArray,
    IntArray,
    RecordArray,
)


def token_times(spec: FleetSpec) -> FloatArray:
    """Seconds of an iteration by its number of tokens, shape (num_pools, widest token budget + 1)."""
    widest = max(pool.token_budget for pool in spec.pools)
    return np.stack([pool.hardware.token_time_table_s(widest) for pool in spec.pools])


def kept_tokens(spec: FleetSpec) -> FloatArray:
    """Tokens that a decode sequence gets from an iteration by its drafts, shape (num_pools, most drafts + 1)."""
    table = np.ones((len(spec.pools), max(pool.verified_tokens for pool in spec.pools)))
    for row, pool in zip(table, spec.pools, strict=True):
        row[: pool.verified_tokens] = pool.kept_tokens
    return table


def units_per_block(pool: PoolSpec) -> int:
    """Fractions of tokens (SpeculationSpec) that fill a KV block."""
    return BLOCK_SIZE_TOKENS * pool.units_per_token


def most_candidates(spec: FleetSpec) -> int:
    """Requests among which one replica's scheduler may have to choose; 1 where none of them needs the room."""
    return max((pool.batch_limit for pool in spec.pools if pool.scheduler == "andes"), default=1)


def rebalance_every_s(pool: PoolSpec) -> float:
    """Time between two looks for sequences that should move; inf where nobody looks."""
    return np.inf if pool.rebalance is None else pool.rebalance.every_s


def fleet_record(spec: FleetSpec, event_tree_size: int) -> RecordArray:
    """The FLEET record, shape (1,)."""
    record = np.zeros(1, dtype=FLEET)
    record["event_tree_size"] = event_tree_size
    record["evict_batch"] = spec.evict_batch
    record["balance_s"] = min(rebalance_every_s(pool) for pool in spec.pools)
    record["evicts_to_host"], record["migrates"] = spec.eviction == "host", spec.drain == "migrate"
    for name in ("bridge_head", "bridge_tail", "blocked_head", "blocked_tail", "post_head", "post_tail",
                 "parked_head", "parked_tail"):  # fmt: skip
        record[name] = NONE
    if (transfer := spec.kv_transfer) is not None:
        record["transfer_latency_s"], record["bridge_limit"] = transfer.latency_s, transfer.bridge_limit
    if (stage := spec.postprocess) is not None:
        record["num_workers"], record["post_limit"] = stage.num_workers, stage.queue_limit
        record["post_request_s"], record["post_token_s"] = stage.request_s, stage.token_s
    return record


def pool_records(spec: FleetSpec, bases: IntArray, slots: list[int], tree_size: int) -> RecordArray:
    """The POOL records; each pool's replicas begin at its base and have so many slots."""
    records = np.zeros(len(spec.pools), dtype=POOL)
    for p, pool in enumerate(spec.pools):
        record = records[p]
        record["base"], record["num_slots"], record["tree_size"] = bases[p], slots[p], tree_size
        record["router"] = ROUTER_CODES[spec.router]
        record["scheduler"] = SCHEDULER_CODES[pool.scheduler]
        record["ranked"] = pool.scheduler in RANKED_SCHEDULERS
        record["slos_admission"] = ADMISSION_CODES[pool.slos_serve.admission]
        record["tries"] = pool.slos_serve.tries
        record["slack_batches"] = pool.slos_serve.slack_batches
        record["fewest_drafts"] = pool.fewest_drafts
        record["block_move_s"] = pool.block_move_s
        record["balance_s"] = record["balance_every_s"] = rebalance_every_s(pool)
        if (rebalance := pool.rebalance) is not None:
            record["source_below"], record["destination_above"] = rebalance.source_below, rebalance.destination_above
        record["urgent_headroom"] = pool.urgent_headroom_blocks
        record["reserves"] = pool.reserves_output
        record["contiguous"] = pool.kv_allocation == "contiguous"
        record["serves_batch"] = pool.role in ("batch", "mixed", "prefill")
        record["batch_limit"] = record["cap"] = pool.batch_limit
        record["token_budget"] = pool.token_budget
        record["kv_blocks"] = pool.num_kv_blocks
        record["prefix_caching"] = pool.prefix_caching
        record["gpus"] = pool.hardware.gpus_per_replica
        record["role"] = ROLE_CODES[pool.role]
        record["transfer_block_s"] = spec.transfer_block_s(p)
        record["token_shift"] = pool.units_per_token.bit_length() - 1
        record["step_units"] = round(pool.tokens_per_iteration * pool.units_per_token)
        record["phase_mask"] = units_per_block(pool) - 1
        record["verified_tokens"] = pool.verified_tokens
        record["unit_tokens"] = 1.0 / pool.units_per_token
        record["step_tokens"] = pool.tokens_per_iteration
        record["lost_tokens"] = pool.verified_tokens - pool.tokens_per_iteration
        record["draft_s"] = pool.draft_s
        record["request_s"] = pool.typical_request_s
        record["startup_mean_s"], record["wake_mean_s"] = pool.startup_mean_s, pool.wake_mean_s
        record["max_sleeping"] = 0 if pool.sleep is None else pool.sleep.max_sleeping
        record["sleep_price"] = pool.sleep_price_fraction
        record["notice_length_s"] = 0.0 if pool.spot is None else pool.spot.notice_s
        record["target"] = pool.initial
    return records


def class_records(spec: FleetSpec) -> RecordArray:
    """The CLASS records."""
    records = np.zeros(len(spec.classes), dtype=CLASS)
    models = [item.model for item in spec.classes]
    for c, item in enumerate(spec.classes):
        record = records[c]
        record["interactive"] = item.kind == "interactive"
        record["urgent"] = item.priority == spec.urgent_priority
        record["model"] = models.index(item.model)
        record["priority"] = item.priority
        record["max_output_tokens"] = item.max_output_tokens or 0
        record["tier"] = spec.tpot_tiers_s.index(item.tpot_slo_s)
        record["queue_limit"] = item.queue_limit
        record["ttft_slo_s"], record["tpot_slo_s"] = item.ttft_slo_s, item.tpot_slo_s
        record["deadline_s"] = np.inf if item.deadline_s is None else item.deadline_s
        record["timeout_s"] = np.inf if item.timeout_s is None else item.timeout_s
        record["admission"], record["max_in_flight"] = NEVER_REFUSE, NO_LIMIT
        record["mean_answer_tokens"] = UNKNOWN_ANSWER_TOKENS
        record["answer_token_work"] = spec.pools[spec.pools_serving(c)[0]].answer_token_work
        record["queue_head"] = record["queue_tail"] = NONE
    return records
