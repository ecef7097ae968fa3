"""Kernel, the fleet as a whole: events in time order, and the entry point.

`run_until` is the compiled engine's event loop. At equal times replica events come first, the lowest slot before the
others, then transfers and post-processing, then arrivals. `advance` at the bottom is the only function called from
Python.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from rl_autoscale.fleet.array_at import array_at
from rl_autoscale.fleet.by_reference import by_reference
from rl_autoscale.fleet.jit import cached_njit, hot, njit
from rl_autoscale.sim.batch import batch_remove
from rl_autoscale.sim.bridge import end_transfer, hold_prompt, start_transfers
from rl_autoscale.sim.class_queue import purge_timeouts
from rl_autoscale.sim.drafts import next_finished
from rl_autoscale.sim.endings import first_token
from rl_autoscale.sim.estimate import count_seen
from rl_autoscale.sim.eviction import complete_evictions
from rl_autoscale.sim.gaps import prompt_token
from rl_autoscale.sim.gateway import arrive, dispatch_queued, forward_declined
from rl_autoscale.sim.layout import (
    DRAINING,
    HASH_ID,
    NO_SLOT,
    NONE,
    PREFILL,
    PROMPT,
    REQUEST,
    ROUTE_U,
    SENT_TO,
    STARTING,
    TABLE,
    TOKEN_S,
    TRACE,
    UNFINISHED,
    World,
)
from rl_autoscale.sim.lifecycle import accrue, change_replica, reconcile, retire, start_replica
from rl_autoscale.sim.migration import give, look, migrate, next_look
from rl_autoscale.sim.ordered import heap_remove, tree_argmin
from rl_autoscale.sim.postprocess import end_work, finish
from rl_autoscale.sim.reading import read_until
from rl_autoscale.sim.replica import book_until, clear_replica, commit_decode, cut_leap, join_decode, leave_decode, wake
from rl_autoscale.sim.router import update_route
from rl_autoscale.sim.schedulers.plan import plan
from rl_autoscale.sim.snapshot import snapshot


@hot
def complete_prefills(w, r, now_s):
    """Book the prompt chunks of the iteration that just ended, in the order of the batch; they stand near its tail."""
    rep = w.rep[r]
    q = rep.batch_tail
    left = rep.num_prefill - (w.req[q].chunk_tokens > 0)
    while left > 0:
        q = w.req[q].prev
        left -= w.req[q].chunk_tokens > 0
    for _ in range(rep.num_prefill):
        while w.req[q].chunk_tokens == 0:  # its KV cache came over the bridge, or was kept
            q = w.req[q].next
        request = w.req[q]
        after = request.next
        request.computed_tokens += request.chunk_tokens
        request.chunk_tokens = 0
        if request.computed_tokens == request.prompt_tokens + request.generated_tokens:
            if rep.partial == q:
                rep.partial = NONE
            request.generated_tokens += 1
            w.pool[rep.pool].generation_units += 1 << w.pool[rep.pool].token_shift
            if w.fleet[0].counts_gaps:
                prompt_token(w, r, q, now_s)
            if not request.first_token_s >= 0.0:
                first_token(w, r, q, now_s)
            else:
                request.read_from_s = now_s
                read_until(w, q, request.generated_tokens, now_s)
            going_on = request.generated_tokens < request.output_tokens
            if going_on and w.pool[rep.pool].role == PREFILL:
                hold_prompt(w, r, q, now_s)
            else:
                count_seen(w, r, q, now_s)
                if going_on:
                    join_decode(w, r, q)
                else:
                    batch_remove(w, r, q)
                    finish(w, r, q, now_s)
        q = after
    rep.num_prefill = 0


@hot
def complete_decodes(w, r, now_s):
    """Let the sequences go whose last token came with this iteration."""
    rep = w.rep[r]
    heap = w.heap[r]
    while rep.heap_size > 0 and heap[0] >> 32 <= rep.iteration:
        place = next_finished(w, r)
        q = heap[place] & 0xFFFFFFFF
        heap_remove(heap, rep.heap_size, place)
        rep.heap_size -= 1
        leave_decode(w, r, q)
        batch_remove(w, r, q)
        finish(w, r, q, now_s)


@hot
def end_iterations(w, r, now_s, others):
    """The replica's iterations in progress end: book them and let finished, evicted and moving requests go."""
    rep = w.rep[r]
    commit_decode(w, r, rep.leap_iterations, now_s - rep.leap_start_s)
    rep.cuttable = 0
    complete_decodes(w, r, now_s)
    if rep.num_prefill > 0:
        complete_prefills(w, r, now_s)
    if rep.num_evict_marked > 0:
        complete_evictions(w, r, now_s)
    if others is not None:  # noqa: SIM102 -- Numba leaves out what stands behind a test for None alone
        if rep.giving_to >= 0:
            give(w, r, now_s)
    if rep.state == DRAINING and w.fleet[0].migrates and rep.leap_iterations > 0:  # none has ended when it was woken
        migrate(w, r, now_s)


@njit
def end_stage(w, leaf, now_s):
    """A transfer or a post-processing worker's request ends: the replica that it leaves may go on, or may go."""
    r = leaf
    if leaf < w.rep.shape[0]:
        end_transfer(w, r, now_s)
    else:
        r = end_work(w, leaf - w.rep.shape[0], now_s)
    if r < 0:
        return
    rep = w.rep[r]
    if rep.state == DRAINING and rep.in_flight == 0:
        retire(w, r, now_s)
    elif rep.wait_head >= 0:
        if rep.event_s == math.inf:
            wake(w, r, now_s)
        elif rep.cuttable:
            cut_leap(w, r, now_s, NO_SLOT)


@njit
def run_until(w, until_s, others):
    """Handle every event at or before a time.

    Each event: book what happened, refill replicas from the gateway's queues, then let the replica whose iteration
    ended plan its next one.
    """
    fleet = w.fleet[0]
    tree = w.event_tree
    num_slots = w.rep.shape[0]
    size = fleet.event_tree_size
    num_requests = fleet.num_requests
    arrival_s = w.trace[fleet.next_arrival].arrival_s if fleet.next_arrival < num_requests else math.inf
    if others is not None:
        next_look(w, fleet.now_s)
    while True:
        event_s = tree[1]
        if others is not None:
            looks = fleet.balance_s < event_s and fleet.balance_s <= min(arrival_s, until_s)
            if looks and min(event_s, arrival_s) < math.inf:  # else nothing will ever happen again
                fleet.num_events += 1
                fleet.now_s = fleet.balance_s
                look(w, fleet.now_s)
                continue
        if event_s > arrival_s:
            if arrival_s > until_s:
                break
            fleet.num_events += 1
            fleet.now_s = arrival_s
            arrive(w, fleet.next_arrival, arrival_s)
            fleet.next_arrival += 1
            arrival_s = w.trace[fleet.next_arrival].arrival_s if fleet.next_arrival < num_requests else math.inf
            continue
        if event_s > until_s or event_s == math.inf:
            break
        fleet.num_events += 1
        fleet.now_s = event_s
        r = tree_argmin(tree, size)
        if r >= num_slots:
            end_stage(w, r - num_slots, event_s)
            if fleet.queued > 0:
                dispatch_queued(w, event_s, NO_SLOT)
            continue
        rep = w.rep[r]
        iterating = rep.state != STARTING and rep.event_s < rep.crash_s
        if iterating:
            end_iterations(w, r, event_s, others)
        else:
            change_replica(w, r, event_s)
        if fleet.queued > 0:
            dispatch_queued(w, event_s, r)
        if iterating:
            if rep.state == DRAINING and rep.in_flight == 0:
                retire(w, r, event_s)
            else:
                plan(w, r, event_s, others)
                if others is not None:  # noqa: SIM102
                    if rep.declined_head >= 0:
                        forward_declined(w, r, event_s)
        if fleet.num_blocked > 0:
            start_transfers(w, event_s)
    if until_s < math.inf:
        fleet.now_s = until_s


@njit
def apply_decision(w, targets, caps, admission, max_in_flight, selectivity):
    """Set absolute targets now; see ScalingDecision."""
    now_s = w.fleet[0].now_s
    for c in range(w.cls.shape[0]):
        w.cls[c].admission = admission[c]
        w.cls[c].max_in_flight = max_in_flight[c]
        w.cls[c].selectivity = selectivity[c]
    for p in range(w.pool.shape[0]):
        pool = w.pool[p]
        pool.target = targets[p]
        if pool.cap != caps[p]:
            pool.cap = caps[p]
            for r in range(pool.base, pool.base + pool.num_slots):
                update_route(w, r)
        reconcile(w, p, now_s)
    if w.fleet[0].queued > 0:
        dispatch_queued(w, now_s, NO_SLOT)


@njit
def initialise(w):
    """Make the initial replicas ready at time 0 and take the first snapshot."""
    for r in range(w.rep.shape[0]):
        clear_replica(w, r)
        update_route(w, r)
    for p in range(w.pool.shape[0]):
        for _ in range(w.pool[p].target):
            start_replica(w, p, 0.0, True)
    snapshot(w, 0.0, 0.0)


@njit
def cut_off(w, now_s):
    """Close the books: whatever has not ended is UNFINISHED, a miss."""
    for r in range(w.rep.shape[0]):
        book_until(w, r, now_s)
    for q in range(w.fleet[0].next_arrival):
        request = w.req[q]
        if request.outcome == 0:
            if not request.first_token_s - request.arrival_s > w.cls[request.class_index].ttft_slo_s:
                w.cls[request.class_index].missed += 1
            request.outcome = UNFINISHED
            request.end_s = now_s
    w.fleet[0].unresolved = 0


@njit
def world_of(batch, e):
    """One fleet of a batch, as views."""
    return World(
        array_at(batch.trace[e, 0], batch.trace[e, 1], TRACE),
        array_at(batch.req[e, 0], batch.req[e, 1], REQUEST),
        batch.rep[e],
        batch.pool[e],
        batch.cls[e],
        batch.fleet[e],
        batch.heap[e],
        batch.residue[e],
        batch.event_tree[e],
        batch.route_tree[e],
        batch.token_time[e],
        batch.coefficients[e],
        batch.class_pools,
        batch.class_order,
        batch.draws[e],
        array_at(batch.route_u[e, 0], batch.route_u[e, 1], ROUTE_U),
        batch.ttft_hist[e],
        batch.tpot_hist[e],
        batch.last_pool[e],
        batch.last_cls[e],
        batch.pool_state[e],
        batch.class_state[e],
        batch.stage_state[e],
        batch.worker[e],
        batch.gap_edges,
        batch.gap_hist[e],
        array_at(batch.token_s[e, 0], batch.token_s[e, 1], TOKEN_S),
        batch.joined[e],
        batch.candidates[e],
        batch.kv[e],
        array_at(batch.prompt[e, 0], batch.prompt[e, 1], PROMPT),
        array_at(batch.hash_ids[e, 0], batch.hash_ids[e, 1], HASH_ID),
        array_at(batch.table[e, 0], batch.table[e, 1], TABLE),
        array_at(batch.sent_to[e, 0], batch.sent_to[e, 1], SENT_TO),
        batch.periods_s,
        batch.kept_tokens,
        batch.plan_prompt[e],
        batch.plan_count[e],
        batch.plan_time[e],
        batch.plan_context[e],
        batch.plan_chosen[e],
    )


INITIALISE, STEP, CUT_OFF, RUN = 0, 1, 2, 3
"""What `advance` is asked to do; one entry point, because each would compile the whole engine again."""


SCHEDULER_FILES = tuple(
    f"schedulers/{name}.py"
    for name in (
        "steps", "vllm", "vllm_v0", "sarathi", "trtllm", "swap", "fastserve", "slos_plan",
        "slos_admission", "slos_serve", "andes", "ranks", "plan",
    )
)  # fmt: skip
KERNEL_FILES = (
    "layout.py", "ordered.py", "kv_cache.py", "drafts.py", "batch.py", "gaps.py", "reading.py", "replica.py",
    "freeness.py", "router.py", "endings.py", "class_queue.py", "estimate.py", "eviction.py", "bridge.py",
    "postprocess.py", "gateway.py", "migration.py", "lifecycle.py", "snapshot.py", "engine.py", *SCHEDULER_FILES,
)  # fmt: skip
FLEET_FILES = (
    "jit.py", "one_library.py", "by_reference.py", "array_at.py", "admission.py", "histogram.py", "state.py",
    "latency_edges.py",
)  # fmt: skip


def _source_digest() -> str:
    folder = Path(__file__).parent
    files = [folder / name for name in KERNEL_FILES]
    files += [folder.parent / "fleet" / name for name in FLEET_FILES]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _compile_entry(source_digest: str):
    # Numba keys its disk cache on the entry's own file only; a digest of all kernel files in the closure makes an edit
    # of any of them a cache miss.
    @cached_njit
    def advance(batch, which, operation, targets, caps, admission, max_in_flight, selectivity, until_s, age_s, others):
        """Work on the fleets with the indices ``which``, one after the other.

        Args:
            batch: World with a leading fleet dimension; of arrays per request, where each fleet's is.
            which: shape (n,), int64.
            operation: INITIALISE a loaded episode; STEP: apply the decision, run to ``until_s`` and take the snapshot
                ``age_s`` before it; RUN to ``until_s`` without a decision; CUT_OFF: close the books.
            targets: shape (num_fleets, num_pools), int64; read by STEP.
            caps: the same shape; read by STEP.
            admission: shape (num_fleets, num_classes), float64; read by STEP.
            max_in_flight: the same shape, int64; read by STEP.
            selectivity: the same shape, float64; read by STEP.
            until_s: shape (num_fleets,).
            age_s: seconds.
            others: None where every pool has vLLM's scheduler and none is rebalanced, else 1; each is compiled when it
                is first needed.
        """
        digest = source_digest  # noqa: F841
        for position in range(which.shape[0]):
            e = which[position]
            w = by_reference(world_of(batch, e))
            if operation == INITIALISE:
                initialise(w)
                continue
            if operation == CUT_OFF:
                cut_off(w, w.fleet[0].now_s)
                continue
            if operation == STEP:
                apply_decision(w, targets[e], caps[e], admission[e], max_in_flight[e], selectivity[e])
            for leg in range(2):
                run_until(w, until_s[e] - age_s if leg == 0 else until_s[e], others)
                if leg == 0:
                    snapshot(w, until_s[e] - age_s, age_s)
            for p in range(w.pool.shape[0]):
                accrue(w, p, w.fleet[0].now_s)
            for c in range(w.cls.shape[0]):
                purge_timeouts(w, c, w.fleet[0].now_s)

    return advance


advance = _compile_entry(_source_digest())
