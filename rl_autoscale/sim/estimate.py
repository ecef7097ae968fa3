"""Kernel: what the gateway believes about its replicas: pending prompts, streams, and the wait for a first token.

The formulas are those of fleet/admission.py; the reference's twin is sim/reference/estimate.py.
"""

from __future__ import annotations

import numpy as np

from rl_autoscale.fleet.admission import (
    corrected_clearing_s,
    estimate_queue_wait_s,
    known_residence_s,
    prefill_time_s,
    residual_iteration_s,
    selective_ttft_s,
    wait_ahead_s,
)
from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.class_queue import purge_timeouts
from rl_autoscale.sim.router import count_in_flight


@hot
def pending_time_s(w, r, more_tokens):
    """How long the replica's pending prompts take from their beginning, with one more prompt of so many tokens."""
    rep = w.rep[r]
    return prefill_time_s(
        rep.pending_tokens + more_tokens,
        rep.pending_squares + more_tokens * more_tokens,
        rep.num_seen,
        rep.seen_tokens,
        w.pool[rep.pool].token_budget,
        w.token_time[rep.pool],
        w.coefficients[rep.pool],
    )


@hot
def expected_first_token_s(w, r, prompt_tokens, now_s):
    """When a prompt sent to the replica now should have its first token."""
    rep = w.rep[r]
    residual_s = residual_iteration_s(
        rep.num_seen,
        rep.seen_tokens,
        w.pool[rep.pool].token_budget,
        w.token_time[rep.pool],
        w.coefficients[rep.pool],
    )
    ahead_s = pending_time_s(w, r, 0)
    own_s = pending_time_s(w, r, prompt_tokens) - ahead_s
    return now_s + wait_ahead_s(now_s, rep.clearing_s, ahead_s, residual_s) + own_s


@hot
def no_longer_pending(w, r, tokens, now_s):
    """A prompt that was awaited has its first token, or has left: correct the replica's clearing time."""
    rep = w.rep[r]
    rep.pending_tokens -= tokens
    rep.pending_squares -= tokens * tokens
    rep.clearing_s = corrected_clearing_s(now_s, rep.clearing_s, pending_time_s(w, r, 0))


@hot
def count_seen(w, r, q, now_s):
    """The stream's first token since its dispatch was seen: its prompt is no longer pending."""
    rep = w.rep[r]
    request = w.req[q]
    if request.awaited:
        request.awaited = 0
        rep.seen_tokens += request.prompt_tokens
        rep.num_seen += 1
        no_longer_pending(w, r, np.int64(request.prompt_tokens), now_s)


@hot
def leave_replica(w, r, q, now_s):
    """Undo what dispatch booked: the request is no longer on the replica."""
    rep = w.rep[r]
    request = w.req[q]
    if request.awaited:
        request.awaited = 0
        no_longer_pending(w, r, np.int64(request.prompt_tokens), now_s)
    else:
        rep.seen_tokens -= request.prompt_tokens
        rep.num_seen -= 1
    count_in_flight(w, r, request.class_index, -1)


@njit
def requests_ahead(w, c, now_s):
    """Requests in gateway queues that are served before a new one of this class, by the same model."""
    ahead = 0
    for other in range(w.cls.shape[0]):
        if w.cls[other].priority <= w.cls[c].priority and w.cls[other].model == w.cls[c].model:
            purge_timeouts(w, other, now_s)
            ahead += w.cls[other].queue_length
    return ahead


@hot
def refusal_ttft_s(w, c, q, r, now_s):
    """What the gateway expects the time to first token to be, as refusal counts it; see fleet/admission.py.

    Args:
        w: the fleet.
        c: class of the request.
        q: the request.
        r: replica to which it would be dispatched now, or NONE.
        now_s: the time.
    """
    cls = w.cls[c]
    tokens = np.int64(w.req[q].prompt_tokens)
    if r >= 0:
        expected_s = expected_first_token_s(w, r, tokens, now_s) - now_s
        if cls.selectivity == 0.0:
            return expected_s
        alone_s = alone_time_s(w, w.rep[r].pool, tokens)
    else:
        alone_s = alone_time_s(w, w.class_pools[c, 0], tokens)
        expected_s = gateway_wait_s(w, c, now_s) + alone_s
    answer = cls.mean_answer_tokens * cls.answer_token_work
    return selective_ttft_s(expected_s, alone_s, tokens, cls.mean_prompt_tokens, answer, cls.selectivity)


@hot
def alone_time_s(w, p, tokens):
    """Prefill of a prompt alone on a replica of the pool."""
    return prefill_time_s(tokens, tokens * tokens, 0, 0, w.pool[p].token_budget, w.token_time[p], w.coefficients[p])


@hot
def gateway_wait_s(w, c, now_s):
    """Wait for a place: by Little's law while replicas are ready, else the start-up time that the spec promises."""
    in_flight = 0
    residence_s = 0.0
    ready = 0
    for position in range(w.class_pools.shape[1]):
        candidate = w.class_pools[c, position]
        if candidate >= 0:
            pool = w.pool[candidate]
            in_flight += pool.in_flight
            ready += pool.ready
            if pool.ready > 0:
                known_s = known_residence_s(
                    pool.residence_s, pool.residence_count, pool.in_flight, pool.busy_since_s, now_s
                )
                residence_s = max(residence_s, known_s)
    if ready > 0:
        return estimate_queue_wait_s(requests_ahead(w, c, now_s), in_flight, residence_s)
    pool = w.pool[w.class_pools[c, 0]]
    return pool.wake_mean_s if pool.sleeping + pool.waking > 0 else pool.startup_mean_s


@hot
def book_residence(w, r, q, now_s):
    """A request leaves a replica served: move the pool's mean residence, which forgets over 64 requests."""
    pool = w.pool[w.rep[r].pool]
    pool.residence_count += 1
    pool.residence_s += (now_s - w.req[q].dispatched_s - pool.residence_s) / min(pool.residence_count, 64)
