"""Memory layout of the compiled engine: record dtypes, codes, and the bundle of arrays (`World`) that kernels work on.

Everything a fleet is at one moment lives in these arrays, so a fleet is copied by copying them and two runs are the
same when their bytes are. One page, long as it is: whoever adds a field sees what there is and what it weighs.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.latency_edges import TPOT_BOUNDS_S, TTFT_BOUNDS_S

RecordArray = npt.NDArray[np.void]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class Outcome(IntEnum):
    """How a request ended; each request ends in exactly one of these."""

    PENDING = 0  # not ended yet
    FINISHED = 1  # all tokens delivered (SLOs met or not)
    REFUSED = 2  # refused at arrival: predicted to miss its TTFT SLO
    QUEUE_FULL = 3  # the gateway's queue was full
    TIMED_OUT = 4  # waited in the gateway's queue longer than the class allows
    FAILED = 5  # its replica crashed after the stream had begun, with the stream's KV cache
    UNFINISHED = 6  # still in the system when the episode was cut off


# The kernels use plain ints; these are the same numbers.
PENDING, FINISHED, REFUSED, QUEUE_FULL, TIMED_OUT, FAILED, UNFINISHED = (int(o) for o in Outcome)

OFF, STARTING, READY, DRAINING, SLEEPING = 0, 1, 2, 3, 4
COLD, WAKE, LIFE, SPOT = 0, 1, 2, 3
"""Rows of a pool's draws, see `episode.draw_replica_times`."""

ROUND_ROBIN, POWER_OF_TWO, FREENESS, LEAST_LOADED, PACKING, PREFIX_AFFINITY = range(6)  # the last three: by a tree
ROUTER_CODES = {
    "round_robin": ROUND_ROBIN,
    "least_loaded": LEAST_LOADED,
    "power_of_two": POWER_OF_TWO,
    "packing": PACKING,
    "prefix_affinity": PREFIX_AFFINITY,
    "freeness": FREENESS,
}
VLLM, VLLM_PRIORITY, VLLM_V0, SARATHI, TRTLLM_NO_EVICT, TRTLLM_MAX_UTILIZATION, FASTSERVE, SLOS_SERVE, ANDES = range(9)
SCHEDULER_CODES = {
    "vllm": VLLM,
    "vllm-priority": VLLM_PRIORITY,
    "vllm-v0": VLLM_V0,
    "sarathi": SARATHI,
    "trtllm-no-evict": TRTLLM_NO_EVICT,
    "trtllm-max-utilization": TRTLLM_MAX_UTILIZATION,
    "fastserve": FASTSERVE,
    "slos-serve": SLOS_SERVE,
    "andes": ANDES,
}
ADMIT_ALL, ADMIT_LATE, ADMIT_GREEDY, ADMIT_DP, ADMIT_FIRM = 0, 1, 2, 3, 4
ADMISSION_CODES = {"all": ADMIT_ALL, "late": ADMIT_LATE, "greedy": ADMIT_GREEDY, "dp": ADMIT_DP, "firm": ADMIT_FIRM}
INTERACTIVE, MIXED, BATCH, PREFILL, DECODE = 0, 1, 2, 3, 4
ROLE_CODES = {"interactive": INTERACTIVE, "mixed": MIXED, "batch": BATCH, "prefill": PREFILL, "decode": DECODE}

NONE = -1
NO_ROOM = 1 << 40
"""Routing key of a replica that may not take a request."""

NO_SLOT = 1 << 30
"""Stands for "after every replica" where the order of simultaneous events is asked for."""

BLOCK = 16

_f, _i = np.float64, np.int32

TRACE = np.dtype(
    [("arrival_s", _f), ("prompt_tokens", _i), ("output_tokens", _i), ("class_index", _i)],
    align=True,
)
"""A request as the workload gives it; its REQUEST row is filled when it arrives."""

REQUEST = np.dtype(
    [
        ("arrival_s", _f),
        ("dispatched_s", _f),  # last dispatch; NaN before the first
        ("scheduled_s", _f),  # first time in an engine batch; NaN before
        ("first_token_s", _f),
        ("last_token_s", _f),  # NaN before
        ("end_s", _f),  # last token, end of post-processing, refusal, drop or failure
        ("finish_iteration", np.int64),  # replica's `iteration` with which it has all its tokens; 0 while not decoding
        ("prompt_tokens", _i),
        ("output_tokens", _i),
        ("generated_tokens", _i),  # exact when not decoding; a decoding sequence's follow from finish_iteration
        ("computed_tokens", _i),  # KV tokens while prefilling
        ("chunk_tokens", _i),  # prompt tokens in the iteration in progress
        ("class_index", _i),
        ("replica", _i),  # last replica it was dispatched to
        ("outcome", _i),
        ("slo_met", _i),
        ("next", _i),  # linked list: the queue or batch in which it is
        ("prev", _i),
        ("in_batch", _i),  # 1 while in an engine batch
        ("awaited", _i),  # 1 from dispatch until its prefill is done: the gateway waits for a token
        ("evict", _i),  # 1 when marked for eviction at the end of the iteration
        ("num_preemptions", _i),
        ("num_evictions", _i),
        ("num_declined", _i),  # slos-serve: times, since the gateway last took it from its queue
        ("rank", _i),  # where the waiting queue is sorted: lower is served first,
        ("rank_s", _f),  # then since when it has that rank, then arrival
        ("level_s", _f),  # fastserve: time served at its level
        ("idle_since_s", _f),  # fastserve: when it was last seen in the batch, or came
        ("read_s", _f),  # when its client has read the first `read_tokens` tokens, see reading.py
        ("late_s", _f),  # how long after its due time each of these is read, summed
        ("read_from_s", _f),  # the tokens after these come evenly from then on
        ("read_tokens", _i),  # 0 until one has looked
        ("on_host", _i),  # 1 while its KV cache is in host memory
        ("table_blocks", _i),  # prefix caching: blocks in its table; further ones are anonymous
        ("kv_in_bridge", _i),  # 1 from the end of its transfer until a decode replica has blocks for it
    ],
    align=True,
)

REPLICA = np.dtype(
    [
        ("event_s", _f),  # end of start-up or of the iterations in progress; inf when idle
        ("crash_s", _f),  # the sooner of the next two
        ("death_s", _f),  # it crashes, or is taken away after a notice
        ("notice_s", _f),  # spot: the notice comes; inf when it has come
        ("asked_s", _f),  # when its start was asked for
        ("leap_start_s", _f),
        ("clearing_s", _f),  # when the pending prompts should have their first tokens, see fleet/admission.py
        ("leap_iteration_s", _f),  # constant part of one iteration of the leap
        ("leap_iterations", np.int64),
        ("iteration", np.int64),  # iterations completed since it became ready; with drafts, the units they brought
        # What an iteration does with each decode sequence; the pool's, unless the scheduler chooses, see drafts.py:
        ("verified_tokens", _i),  # that it computes: the next one and the drafts
        ("step_units", np.int64),  # that it adds
        ("step_tokens", _f),  # likewise, in tokens
        ("lost_tokens", _f),  # verified_tokens - step_tokens
        ("draft_s", _f),  # drafting, for all of them together
        ("chunk_tokens", np.int64),  # of the prompt chunks in the iteration in progress: their tokens,
        ("chunk_pairs", _f),  # (query, key) pairs,
        ("chunk_context", np.int64),  # and tokens computed before
        ("decode_units", np.int64),  # KV tokens of all decode sequences, in units of the pool
        ("kv_used", np.int64),
        ("kv_reserved", np.int64),  # for the longest that its running sequences may become, where the pool reserves
        ("pending_tokens", np.int64),  # dispatched prompt tokens without a first token yet
        ("pending_squares", np.int64),  # sum of their prompts' squared lengths
        ("seen_tokens", np.int64),  # prompt tokens of dispatched streams that have begun
        ("state", _i),
        ("pool", _i),
        ("num_decode", _i),
        ("num_prefill", _i),  # sequences with a prompt chunk in the iteration in progress
        ("num_set_aside", _i),  # waiting sequences whose KV cache is on the GPU
        ("moved_blocks", np.int64),  # between GPU and host before the iteration in progress
        ("planned_s", _f),  # when the scheduler was last asked
        ("next_look_s", _f),  # fastserve: when it looks for starved requests again
        ("next_look", np.int64),  # andes: the value of `iteration` from which on it chooses again
        ("stalled", _i),  # 1 while the iteration in progress computes prompts only, and the decode batch stands still
        ("partial", _i),  # the sequence whose prompt is partly computed, or NONE; always the batch's tail
        ("num_waiting", _i),
        ("batch_head", _i),
        ("batch_tail", _i),
        ("wait_head", _i),
        ("wait_tail", _i),
        ("in_flight", _i),
        ("in_flight_interactive", _i),
        ("in_flight_urgent", _i),
        ("num_seen", _i),
        ("heap_size", _i),
        ("num_evict_marked", _i),
        ("waking", _i),  # 1 while it starts from sleep
        ("doomed", _i),  # 1 after the notice
        ("giving_to", _i),  # replica that gets a sequence when the iteration ends, or NONE; see migration.py
        ("freeness", _f),  # scratch of `balance`
        ("cuttable", _i),  # 1 while the leap in progress may be cut at an iteration's end
        ("generation", _i),  # replicas that have been ready in this slot
        # Where gaps between tokens are counted, see gaps.py:
        ("num_joined", _i),  # sequences that have joined the decode batch since it last got tokens
        ("last_tokens_s", _f),  # when that was
        # Prefill replicas, see bridge.py:
        ("num_held", _i),  # computed prompts whose KV is still here
        ("held_head", _i),  # the one that is sent next, or now
        ("held_tail", _i),
        ("sending", _i),  # 1 while a transfer is under way
        ("declined_head", _i),  # slos-serve: linked list of those that another replica is offered
        ("declined_tail", _i),
        ("blocked_next", _i),  # linked list: replicas that wait for a place in the bridge
        # Finished streams that post-processing has no room for, see postprocess.py:
        ("num_parked", _i),
        ("num_parked_batch", _i),
        # Prefix caching, see kv_cache.py:
        ("num_fresh", _i),  # blocks 0..num_fresh-1 have been used
        ("blank_head", _i),  # free blocks without content that could be found
        ("queue_head", _i),  # other free blocks, least recently used first
        ("queue_tail", _i),
        ("anonymous_head", _i),  # blocks in use by decode sequences beyond their tables
        ("reserved", _i),  # of them: taken for an iteration that kv_used does not count yet
    ],
    align=True,
)

CANDIDATE = np.dtype(
    [
        ("request", _i),
        ("runs", _i),
        ("blocks", np.int64),  # of KV cache that it needs until the next choice
        ("gain", _f),  # of QoE if it runs
        ("density", _f),  # gain per block
        ("taken", _i),  # by the choice that is tried
        ("chosen", _i),  # by the best one so far
    ],
    align=True,
)
"""andes: a request that may run in the next iterations."""

KV_BLOCK = np.dtype(
    [
        ("key", np.int64),  # of its content while cached
        ("next", _i),  # linked list: free queue, blank or anonymous blocks
        ("prev", _i),
        ("refs", _i),  # requests that use it
        ("chain", _i),  # next cached block of the same bucket
        ("bucket", _i),  # not the block's own: first cached block whose key hashes to this number
    ],
    align=True,
)

PROMPT = np.dtype(
    [
        ("hash_start", np.int64),  # its first hash
        ("table_start", np.int64),  # its block table
        ("num_hashes", _i),
        ("num_shared", _i),  # full blocks of the prompt that hashes cover
    ],
    align=True,
)
"""What prefix caching knows of a request beyond its TRACE row."""

POOL = np.dtype(
    [
        ("base", _i),  # first replica slot
        ("num_slots", _i),
        ("tree_size", _i),
        ("router", _i),
        ("scheduler", _i),
        ("reserves", _i),  # 1 where a sequence is admitted only if all that it may become fits
        ("ranked", _i),  # 1 where the waiting queue is sorted
        ("slos_admission", _i),  # SlosServeSpec.admission
        ("tries", _i),  # SlosServeSpec.tries
        ("slack_batches", _i),  # 1 where an iteration lasts as long as the SLOs allow
        ("fewest_drafts", _i),  # among which the scheduler chooses, up to all
        ("block_move_s", _f),  # a KV block from GPU to host, or back
        ("balance_s", _f),  # the next time it is rebalanced; inf where it is not
        ("balance_every_s", _f),
        ("source_below", _f),  # RebalanceSpec's
        ("destination_above", _f),
        ("urgent_headroom", np.int64),  # PoolSpec.urgent_headroom_blocks
        ("contiguous", _i),  # 1 where that is also what it takes
        ("serves_batch", _i),
        ("batch_limit", _i),
        ("token_budget", _i),
        ("kv_blocks", np.int64),
        ("prefix_caching", _i),
        ("token_shift", np.int64),  # a token is 2 ** token_shift units; 0 without speculative decoding
        ("step_units", np.int64),  # that an iteration adds to a decode sequence
        ("phase_mask", np.int64),  # units in a KV block - 1; columns of residue are numbers modulo that + 1
        ("verified_tokens", _i),  # that an iteration computes for a decode sequence: its next one and the drafts
        ("unit_tokens", _f),  # 2 ** -token_shift
        ("step_tokens", _f),  # step_units in tokens
        ("lost_tokens", _f),  # verified_tokens - step_tokens
        ("draft_s", _f),
        ("gpus", _i),
        ("role", _i),
        ("transfer_block_s", _f),  # a KV block on the link
        ("request_s", _f),  # PoolSpec.typical_request_s
        ("startup_mean_s", _f),  # as the spec promises, not as drawn
        ("wake_mean_s", _f),
        ("max_sleeping", _i),
        ("sleep_price", _f),  # of a sleeping replica over a serving one's
        ("notice_length_s", _f),
        ("cap", _i),
        ("target", _i),
        ("ready", _i),
        ("starting", _i),
        ("draining", _i),
        ("sleeping", _i),
        ("waking", _i),  # of those starting
        ("doomed", _i),  # of those draining: may not be reclaimed
        ("round_robin_next", _i),
        ("num_starts", np.int64),  # wake-ups included
        ("num_wakes", np.int64),
        ("in_flight", np.int64),
        ("in_flight_interactive", np.int64),
        ("busy_interactive", np.int64),
        ("busy_since_s", _f),  # since when any has been in flight, while any is
        ("residence_s", _f),
        ("residence_count", np.int64),
        ("accrued_to_s", _f),
        ("replica_s", _f),  # starting + ready + draining, integrated
        ("ready_s", _f),
        ("sleep_s", _f),
        ("itl_sum_s", _f),
        ("itl_count", np.int64),
        ("prompt_tokens", np.int64),
        ("generation_units", np.int64),  # fractions of the next token included
        ("generation_tokens", np.int64),  # as of the last snapshot
        ("released_tokens", np.int64),  # in the KV cache of requests when they finished
        ("released_blocks", np.int64),  # that those held
        ("moved_blocks", np.int64),  # between GPU and host
        ("preemptions", np.int64),
        ("evictions", np.int64),
        ("migrations", np.int64),  # from its replicas that drain, or are rebalanced
        ("forwarded", np.int64),  # declined here, sent to another replica
        ("crashes", np.int64),
        ("notices", np.int64),
        ("taken_away", np.int64),  # before they were empty
        ("cancelled_starts", np.int64),
        ("reclaimed", np.int64),
        ("iterations", np.int64),
        ("prefix_queried_tokens", np.int64),
        ("prefix_hit_tokens", np.int64),
        ("cached_blocks_evicted", np.int64),  # blocks that other requests could have found
    ],
    align=True,
)

CLASS = np.dtype(
    [
        ("interactive", _i),
        ("urgent", _i),  # 1 where FleetSpec.urgent_priority is its priority
        ("model", _i),  # a number for each model that classes name
        ("priority", _i),
        ("max_output_tokens", _i),  # that a request may ask for; 0 where nobody reserves it
        ("tier", _i),  # its TPOT's place in World.periods_s
        ("queue_limit", _i),
        ("ttft_slo_s", _f),
        ("tpot_slo_s", _f),
        ("deadline_s", _f),  # inf when none
        ("timeout_s", _f),  # inf when none
        ("admission", _f),
        ("selectivity", _f),
        ("max_in_flight", np.int64),
        ("queue_head", _i),
        ("queue_tail", _i),
        ("queue_length", _i),
        ("queue_tokens", np.int64),
        ("in_flight", np.int64),
        ("arrived", np.int64),
        ("arrived_tokens", np.int64),
        ("mean_prompt_tokens", _f),  # of late, see fleet/admission.py
        ("mean_answer_tokens", _f),
        ("answer_token_work", _f),  # PoolSpec.answer_token_work of its first pool
        ("first_tokens", np.int64),
        ("late_first_tokens", np.int64),  # after the TTFT SLO
        ("finished", np.int64),
        ("met", np.int64),
        ("slow_answers", np.int64),  # TPOT beyond its SLO, of more than SHORT_ANSWER_TOKENS; first token in time
        ("missed", np.int64),  # known to miss: late first token, late finish, refused, dropped, failed
        ("refused", np.int64),
        ("queue_full", np.int64),
        ("timed_out", np.int64),
        ("failed", np.int64),
        ("output_tokens", np.int64),  # of finished requests
        ("ttft_sum_s", _f),
        ("tpot_sum_s", _f),
        ("tpot_count", np.int64),
    ],
    align=True,
)

FLEET = np.dtype(
    [
        ("now_s", _f),
        ("snapshot_s", _f),
        ("speed", _f),  # true iteration time / profile's: capacity error, 1 when the profile is right
        ("num_requests", np.int64),
        ("next_arrival", np.int64),
        ("queued", np.int64),
        ("unresolved", np.int64),  # arrived and not ended
        ("event_tree_size", np.int64),
        ("evict_batch", _i),
        ("evicts_to_host", _i),  # 1 where an evicted sequence keeps its KV cache in host memory
        ("migrates", _i),  # 1 where what a draining replica has goes on elsewhere
        ("balance_s", _f),  # the first of the pools'
        ("blocks_per_hash", np.int64),
        ("num_events", np.int64),
        ("counts_gaps", _i),  # 1 where gaps between tokens are counted
        ("num_planned", np.int64),  # rows of plan_prompt in use
        # The bridge between prefill and decode, see bridge.py:
        ("transfer_latency_s", _f),
        ("bridge_limit", _i),
        ("bridge_used", _i),  # places: transfers, bridge_length, and those waiting in decode engines
        ("bridge_length", _i),  # of the queue of those that have been sent to no decode replica yet
        ("bridge_head", _i),
        ("bridge_tail", _i),
        ("num_transfers", _i),  # under way
        ("num_blocked", _i),  # replicas
        ("blocked_head", _i),
        ("blocked_tail", _i),
        ("num_blockings", np.int64),  # so far
        # Post-processing, see postprocess.py:
        ("post_request_s", _f),
        ("post_token_s", _f),
        ("num_workers", _i),  # 0 without the stage
        ("num_working", _i),
        ("post_limit", _i),
        ("post_length", _i),
        ("post_head", _i),
        ("post_tail", _i),
        ("num_parked", _i),
        ("parked_head", _i),
        ("parked_tail", _i),
        ("num_parkings", np.int64),  # so far
    ],
    align=True,
)

# p95 is interpolated in these buckets as Prometheus' histogram_quantile does.
TTFT_EDGES_S = np.array(TTFT_BOUNDS_S)
TPOT_EDGES_S = np.array(TPOT_BOUNDS_S)


ROUTE_U = TOKEN_S = np.dtype(np.float64)
HASH_ID = SENT_TO = np.dtype(np.int64)
TABLE = np.dtype(np.int32)
PER_REQUEST = {
    "trace": TRACE,
    "req": REQUEST,
    "route_u": ROUTE_U,
    "token_s": TOKEN_S,
    "prompt": PROMPT,
    "hash_ids": HASH_ID,
    "table": TABLE,
    "sent_to": SENT_TO,
}
"""Element types of a World's arrays that are as long as the traffic."""


class World(NamedTuple):
    """All arrays of one fleet; with a leading dimension, of a batch of fleets.

    What is as long as the traffic (`PER_REQUEST`) each fleet of a batch has in an array of its own: of these, a batch
    holds address and number of elements, shape (num_fleets, 2) int64.
    """

    trace: Any  # (num_requests,) TRACE, sorted by arrival
    req: Any  # (num_requests,) REQUEST; rows of requests that have not arrived hold anything
    rep: Any  # (num_slots,) REPLICA
    pool: Any  # (num_pools,) POOL
    cls: Any  # (num_classes,) CLASS
    fleet: Any  # (1,) FLEET
    heap: Any  # (num_slots, max_num_seqs) int64: finish_iteration << 32 | request, a binary heap per replica
    residue: Any  # (num_slots, units in a KV block) int32: decode sequences per replica.phase_column
    event_tree: Any  # (2 * event_tree_size,) float64: minimum of the next events, of replicas, then links and workers
    route_tree: Any  # (num_pools, 2 * tree_size) int64: minimum of the routing keys
    token_time: Any  # (num_pools, max token budget + 1) float64 seconds
    coefficients: Any  # (num_pools, 7) float64, LatencyProfile.attention_coefficients_s
    class_pools: (
        Any  # (num_classes + 1, num_pools) int64: pools that may serve, preferred first, then NONE; decode pools
    )
    class_order: Any  # (num_classes,) int64: by priority
    draws: Any  # (num_pools, 4, num_draws) float64, see episode.draw_replica_times; the j-th start takes column j
    route_u: Any  # (num_requests or 1,) float64 in [0, 1): the router's random numbers
    ttft_hist: Any  # (num_classes, len(TTFT_EDGES_S) + 1) int64, since the last snapshot
    tpot_hist: Any  # (num_classes, len(TPOT_EDGES_S) + 1) int64
    last_pool: Any  # (num_pools,) POOL as of the last snapshot
    last_cls: Any  # (num_classes,) CLASS as of the last snapshot
    pool_state: Any  # (num_pools, PoolTelemetry fields) float64: the last snapshot
    class_state: Any  # (num_classes, ClassTelemetry fields) float64
    stage_state: Any  # (StageTelemetry fields,) float64
    worker: Any  # (num_workers or 1,) int32: the request that each has
    # Gaps between tokens, see gaps.py; one element each where nobody asked for them.
    gap_edges: Any  # (num_edges,) float64 seconds, shared by a batch
    gap_hist: Any  # (num_pools, num_edges + 1) int64
    token_s: Any  # (num_requests,) float64
    joined: Any  # (num_slots, max_num_seqs) int32
    candidates: Any  # (max_num_seqs,) CANDIDATE: scratch of schedulers/andes.py; one element where no pool has it
    # Prefix caching and prefix_affinity; one element each where a fleet has neither.
    kv: Any  # (num_slots, most kv_blocks) KV_BLOCK
    prompt: Any  # (num_requests,) PROMPT
    hash_ids: Any  # (num_hashes,) int64, see prefix.py
    table: Any  # (blocks of all requests,) int32: block tables
    sent_to: Any  # (num_hashes,) int64: generation << 32 | slot to which a hash was last sent, NONE before
    # slos-serve's dynamic programme, see schedulers/slos_plan.py; one element each where no pool has it.
    periods_s: Any  # (num_tiers,) float64: TPOT SLOs in ascending order, then inf
    kept_tokens: Any  # (num_pools, most drafts + 1) float64: tokens that a decode sequence gets, by its drafts
    plan_prompt: Any  # (most that wait + 1,) PLAN_PROMPT
    plan_count: Any  # these four as in PlanLabels
    plan_time: Any
    plan_context: Any
    plan_chosen: Any


def next_power_of_two(number: int) -> int:
    """Smallest power of two >= number (>= 1)."""
    return 1 << max(number - 1, 0).bit_length()
