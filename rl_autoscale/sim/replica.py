"""Kernel, inside a replica: decode batch, KV blocks and iteration times, leaping over unchanged decode batches.

What runs in the next iteration is the scheduler's to say (sim/schedulers); this is what all of them work with.
Reference twin in sim/reference.

- With prefix caching a prompt begins where its longest cached prefix ends; kv_cache.py then keeps every block.
- With speculative decoding a decode sequence computes its drafts too, and the whole batch advances by the tokens that
  an iteration keeps on average, in units of 1 / 2**token_shift token (SpeculationSpec). It has the whole ones of them.
  How many drafts is the replica's to choose for each iteration, so a batch's progress counts units: ``iteration``.
- Prompt chunks take their blocks when scheduled. So do decode sequences, but the books follow when the iteration
  completes: ``kv_used`` plus the current residue count is what vLLM has allocated.

Between events a decode batch of n sequences with S KV tokens that gains m tokens each does not change, and iteration j
of a leap lasts ``A + c (S + n m j)``; k of them last ``k A + c (k S + n m k (k + 1) / 2)``: nothing is simulated per
token.
"""

from __future__ import annotations

import math

import numpy as np

from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.batch import batch_remove
from rl_autoscale.sim.drafts import drafted_blocks, drafted_until_full, verify_all_drafts
from rl_autoscale.sim.gaps import count_gaps, join_gaps, leave_gaps
from rl_autoscale.sim.kv_cache import blocks_of, free_blocks, take_anonymous
from rl_autoscale.sim.layout import BLOCK, NONE, OFF
from rl_autoscale.sim.ordered import heap_push, heap_remove, tree_set
from rl_autoscale.sim.reading import read_until


@hot
def schedule_event(w, r):
    """Publish the replica's next event in the event tree."""
    rep = w.rep[r]
    tree_set(w.event_tree, w.fleet[0].event_tree_size, r, min(rep.event_s, rep.crash_s))


@hot
def phase_column(w, r, units):
    """Column of ``residue`` of a decode sequence with so many units of KV tokens: it stays the same as both advance.

    An iteration adds a block to those in the ``step_units`` columns from ``iteration`` on; see drafts.py.
    """
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    return (rep.iteration + (1 << pool.token_shift) - 1 - units) & pool.phase_mask


@hot
def join_decode(w, r, q):
    """A sequence whose prefill is complete starts to decode; it has at least one token to go."""
    rep = w.rep[r]
    request = w.req[q]
    pool = w.pool[rep.pool]
    if pool.token_shift > 0 and rep.num_decode == 0:  # nobody counts from it: keep it small
        rep.iteration &= pool.phase_mask
    units = np.int64(request.computed_tokens) << pool.token_shift
    finish = rep.iteration + (np.int64(request.output_tokens - request.generated_tokens) << pool.token_shift)
    request.finish_iteration = finish
    heap_push(w.heap[r], rep.heap_size, (finish << 32) | q)
    rep.heap_size += 1
    w.residue[r, phase_column(w, r, units)] += 1
    rep.num_decode += 1
    rep.decode_units += units
    if w.fleet[0].counts_gaps:
        join_gaps(w, r, q)


@hot
def gained_units(w, r, q):
    """What a decode sequence has gained since it joined, in units."""
    request = w.req[q]
    rep = w.rep[r]
    left = np.int64(request.output_tokens - request.generated_tokens)
    return (left << w.pool[rep.pool].token_shift) - (request.finish_iteration - rep.iteration)


@hot
def leave_decode(w, r, q):
    """Take a sequence out of the decode counts; sets its generated and computed tokens as of now. Not the heap.

    The last iteration may have computed more tokens than there are to generate.
    """
    rep = w.rep[r]
    request = w.req[q]
    pool = w.pool[rep.pool]
    gained = gained_units(w, r, q)
    units = (np.int64(request.prompt_tokens + request.generated_tokens - 1) << pool.token_shift) + gained
    new = gained
    if pool.token_shift > 0:
        new = min(gained >> pool.token_shift, np.int64(request.output_tokens - request.generated_tokens))
        pool.generation_units -= gained - (new << pool.token_shift)
    request.generated_tokens += new
    request.computed_tokens = units >> pool.token_shift
    w.residue[r, phase_column(w, r, units)] -= 1
    rep.num_decode -= 1
    rep.decode_units -= units
    request.finish_iteration = 0
    if w.fleet[0].counts_gaps:
        leave_gaps(w, r, q)


@njit
def stop_decode(w, r, q):
    """Take an unfinished sequence out of the decode batch; its blocks stay."""
    rep = w.rep[r]
    key = (w.req[q].finish_iteration << 32) | q
    heap = w.heap[r]
    for position in range(rep.heap_size):
        if heap[position] == key:
            heap_remove(heap, rep.heap_size, position)
            break
    rep.heap_size -= 1
    leave_decode(w, r, q)
    read_until(w, q, w.req[q].generated_tokens, w.fleet[0].now_s)


@njit
def unload(w, r, q):
    """Take an unfinished sequence out of the batch and free its blocks; it will recompute prompt and output so far."""
    rep = w.rep[r]
    request = w.req[q]
    if request.finish_iteration > 0:
        stop_decode(w, r, q)
    elif rep.partial == q:
        rep.partial = NONE
    free_blocks(w, r, q, request.computed_tokens, False)
    request.computed_tokens = 0
    request.chunk_tokens = 0
    batch_remove(w, r, q)


@hot
def count_moves(w, r, blocks):
    """Blocks are moved between GPU and host before the next iteration."""
    w.rep[r].moved_blocks += blocks
    w.pool[w.rep[r].pool].moved_blocks += blocks


@njit
def swap_out(w, r, q):
    """Take a decode sequence out of the batch with its KV cache, which goes to host memory."""
    stop_decode(w, r, q)
    request = w.req[q]
    free_blocks(w, r, q, request.computed_tokens, False)
    count_moves(w, r, blocks_of(request.computed_tokens))
    request.on_host = 1
    batch_remove(w, r, q)


@hot
def leap_blocks(w, r, iterations):
    """KV blocks the decode batch needs over its next iterations."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    if pool.token_shift > 0:
        units = iterations * rep.step_units
        return drafted_blocks(w.residue[r], rep.iteration, units, pool.phase_mask, pool.token_shift, rep.num_decode)
    need = (iterations // BLOCK) * rep.num_decode
    for j in range(iterations % BLOCK):
        need += w.residue[r, (rep.iteration + j) & (BLOCK - 1)]
    return need


@hot
def iteration_blocks(w, r):
    """KV blocks the decode batch needs for its next iteration; none while it stands still."""
    rep = w.rep[r]
    if rep.stalled:
        return np.int64(0)
    if w.pool[rep.pool].token_shift > 0:
        return np.int64(leap_blocks(w, r, 1))
    return np.int64(w.residue[r, rep.iteration & (BLOCK - 1)])


@hot
def iterations_until_full(w, r, free_blocks, limit):
    """Largest number of iterations <= limit whose blocks fit."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    num_decode = rep.num_decode
    if pool.token_shift > 0:
        return drafted_until_full(
            w.residue[r], rep.iteration, rep.step_units, pool.phase_mask, pool.token_shift, num_decode, free_blocks,
            limit,
        )  # fmt: skip
    if (limit // BLOCK + 1) * num_decode <= free_blocks:
        return limit
    cycles = free_blocks // num_decode
    left = free_blocks - cycles * num_decode
    iterations = cycles * BLOCK
    while iterations < limit:
        left -= w.residue[r, (rep.iteration + iterations) & (BLOCK - 1)]
        if left < 0:
            break
        iterations += 1
    return min(iterations, limit)


@hot
def constant_s(w, r):
    """Seconds of an iteration but for attention to what is in the KV cache, at the profile's speed."""
    rep = w.rep[r]
    coefficients = w.coefficients[rep.pool]
    num_decode = 0 if rep.stalled else rep.num_decode
    fixed_s = w.token_time[rep.pool, num_decode * rep.verified_tokens + rep.chunk_tokens] + coefficients[1] * num_decode
    if num_decode > 0:  # drafting, and reading drafts that are not kept
        fixed_s += rep.draft_s + coefficients[0] * (num_decode * rep.lost_tokens)
    return fixed_s


@hot
def leap_duration_s(w, r, iterations):
    """Seconds of the leap's first iterations, in closed form."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    slope = w.coefficients[rep.pool, 0] * w.fleet[0].speed
    k = float(iterations)
    context = rep.decode_units * pool.unit_tokens
    return k * rep.leap_iteration_s + slope * (k * context + rep.num_decode * rep.step_tokens * (k * (k + 1.0) / 2.0))


@hot
def iterations_begun(w, r, elapsed_s):
    """Number of iterations of the leap that have begun after so long: the smallest k with duration(k) > elapsed."""
    rep = w.rep[r]
    slope = w.coefficients[rep.pool, 0] * w.fleet[0].speed
    pool = w.pool[rep.pool]
    a = 0.5 * slope * rep.num_decode * rep.step_tokens
    b = rep.leap_iteration_s + slope * (rep.decode_units * pool.unit_tokens) + a
    k = int(2.0 * elapsed_s / (b + math.sqrt(b * b + 4.0 * a * elapsed_s)))
    k = max(k, 1)
    while k > 1 and leap_duration_s(w, r, k - 1) > elapsed_s:
        k -= 1
    while leap_duration_s(w, r, k) <= elapsed_s:
        k += 1
    return k


@hot
def running_iteration(w, r, now_s, slot):
    """Number of the iteration of the leap in progress that is running now, from 1 on.

    Args:
        w: the fleet.
        r: the leaping replica.
        now_s: the time.
        slot: replica whose event this is, or NO_SLOT. An iteration of a later slot that ends at this very moment still
            counts as running: its turn comes next (lowest slot first).
    """
    elapsed_s = now_s - w.rep[r].leap_start_s
    begun = iterations_begun(w, r, elapsed_s)
    if r > slot and begun > 1 and leap_duration_s(w, r, begun - 1) == elapsed_s:
        begun -= 1
    return begun


@hot
def cut_leap(w, r, now_s, slot):
    """Shorten the leap in progress, which turned out to be too long, to its iteration that is running now.

    Arguments as for `running_iteration`.
    """
    rep = w.rep[r]
    begun = running_iteration(w, r, now_s, slot)
    if begun < rep.leap_iterations:
        rep.leap_iterations = begun
        rep.event_s = rep.leap_start_s + leap_duration_s(w, r, begun)
        schedule_event(w, r)
    rep.cuttable = 0


@hot
def commit_decode(w, r, iterations, duration_s):
    """Book completed iterations of the decode batch."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    num_decode = rep.num_decode
    pool.iterations += iterations
    if rep.stalled:  # the gap between two tokens grows
        pool.itl_sum_s += duration_s * num_decode
        return
    if num_decode > 0:
        if w.fleet[0].counts_gaps:
            growth_s = w.coefficients[rep.pool, 0] * w.fleet[0].speed * num_decode * rep.step_tokens
            first_s = duration_s if iterations == 1 else leap_duration_s(w, r, 1)
            count_gaps(w, r, iterations, first_s, growth_s, duration_s)
        blocks = leap_blocks(w, r, iterations)
        rep.kv_used += blocks
        if pool.prefix_caching:
            take_anonymous(w, r, blocks - rep.reserved)
            rep.reserved = 0
        units = num_decode * iterations * rep.step_units
        rep.decode_units += units
        pool.itl_sum_s += duration_s * num_decode
        pool.itl_count += num_decode * iterations
        pool.generation_units += units
    rep.iteration += iterations * rep.step_units


@njit
def sync(w, r, now_s):
    """Book the whole iterations of a leap that are complete by now, leaving the rest of the leap as it is."""
    rep = w.rep[r]
    if rep.num_prefill > 0 or rep.num_decode == 0 or rep.event_s == math.inf or rep.leap_iterations <= 1:
        return
    elapsed_s = now_s - rep.leap_start_s
    if elapsed_s <= 0.0:
        return
    done = min(iterations_begun(w, r, elapsed_s) - 1, rep.leap_iterations - 1)
    if done > 0:
        duration_s = leap_duration_s(w, r, done)
        commit_decode(w, r, done, duration_s)
        rep.leap_start_s += duration_s
        rep.leap_iterations -= done


@njit
def book_until(w, r, now_s):
    """Book what a replica has done by now for good: whole iterations, and the blocks of the one in progress."""
    sync(w, r, now_s)
    rep = w.rep[r]
    if w.pool[rep.pool].prefix_caching and rep.num_decode > 0:
        missing = iteration_blocks(w, r) - rep.reserved
        take_anonymous(w, r, missing)
        rep.reserved += missing


@hot
def wake(w, r, now_s):
    """An idle replica has work: end its (empty) leap now, so that the event loop plans its next iteration."""
    rep = w.rep[r]
    rep.leap_start_s = now_s
    rep.leap_iterations = 0
    rep.event_s = now_s
    schedule_event(w, r)


@njit
def clear_replica(w, r):
    """Return an empty replica's slot to OFF."""
    rep = w.rep[r]
    rep.state = OFF
    rep.event_s = math.inf
    rep.crash_s = math.inf
    rep.death_s = math.inf
    rep.notice_s = math.inf
    rep.waking = 0
    rep.doomed = 0
    rep.giving_to = NONE
    rep.freeness = 0.0
    rep.asked_s = 0.0
    rep.leap_start_s = 0.0
    rep.leap_iteration_s = 0.0
    rep.leap_iterations = 0
    rep.iteration = 0
    verify_all_drafts(w, r)
    rep.kv_used = 0
    rep.kv_reserved = 0
    rep.decode_units = 0
    rep.chunk_tokens = 0
    rep.chunk_pairs = 0.0
    rep.chunk_context = 0
    rep.clearing_s = 0.0
    rep.pending_tokens = 0
    rep.pending_squares = 0
    rep.seen_tokens = 0
    rep.num_decode = 0
    rep.num_prefill = 0
    rep.num_set_aside = 0
    rep.num_joined = 0
    rep.last_tokens_s = 0.0
    rep.moved_blocks = 0
    rep.planned_s = 0.0
    rep.next_look_s = 0.0
    rep.next_look = 0
    rep.stalled = 0
    rep.partial = NONE
    rep.num_waiting = 0
    rep.batch_head = NONE
    rep.batch_tail = NONE
    rep.wait_head = NONE
    rep.wait_tail = NONE
    rep.in_flight = 0
    rep.in_flight_interactive = 0
    rep.in_flight_urgent = 0
    rep.num_seen = 0
    rep.heap_size = 0
    rep.num_evict_marked = 0
    rep.cuttable = 0
    rep.num_held = 0
    rep.held_head = NONE
    rep.held_tail = NONE
    rep.sending = 0
    rep.declined_head = NONE
    rep.declined_tail = NONE
    rep.blocked_next = NONE
    rep.num_parked = 0
    rep.num_parked_batch = 0
    rep.num_fresh = 0
    rep.blank_head = NONE
    rep.queue_head = NONE
    rep.queue_tail = NONE
    rep.anonymous_head = NONE
    rep.reserved = 0
    for column in range(w.residue.shape[1]):
        w.residue[r, column] = 0
    schedule_event(w, r)
