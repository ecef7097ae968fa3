"""Kernel: a request's first token, its last, and how it ends; each request ends exactly once."""

from __future__ import annotations

from rl_autoscale.fleet.admission import MEAN_OVER, moved_mean
from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.fleet.state import SHORT_ANSWER_TOKENS
from rl_autoscale.sim.layout import (
    FAILED,
    FINISHED,
    QUEUE_FULL,
    REFUSED,
    TIMED_OUT,
    TPOT_EDGES_S,
    TTFT_EDGES_S,
)
from rl_autoscale.sim.ordered import bucket


@hot
def end_request(w, q, outcome, now_s):
    """Record how a request ended; from here on nothing touches it."""
    request = w.req[q]
    request.outcome = outcome
    request.end_s = now_s
    w.fleet[0].unresolved -= 1


@hot
def late_first_token(w, q):
    """Whether the request's first token came too late (and was booked as a miss then)."""
    request = w.req[q]
    return request.first_token_s - request.arrival_s > w.cls[request.class_index].ttft_slo_s


@njit
def drop(w, q, outcome, now_s):
    """End a request without service: refused, queue full, timed out or failed. Always a miss."""
    cls = w.cls[w.req[q].class_index]
    if outcome == REFUSED:
        cls.refused += 1
    elif outcome == QUEUE_FULL:
        cls.queue_full += 1
    elif outcome == TIMED_OUT:
        cls.timed_out += 1
    elif outcome == FAILED:
        cls.failed += 1
    if not late_first_token(w, q):
        cls.missed += 1
    end_request(w, q, outcome, now_s)


@hot
def histogram_add(histogram, edges, value):
    """Add to a histogram whose last column counts what lies beyond the last edge."""
    histogram[bucket(edges, value)] += 1


@hot
def first_token(w, r, q, now_s):
    """Book a request's first token: TTFT, and a miss as soon as it is one."""
    request = w.req[q]
    cls = w.cls[request.class_index]
    request.first_token_s = now_s
    ttft_s = now_s - request.arrival_s
    w.pool[w.rep[r].pool].prompt_tokens += request.prompt_tokens
    cls.first_tokens += 1
    cls.ttft_sum_s += ttft_s
    histogram_add(w.ttft_hist[request.class_index], TTFT_EDGES_S, ttft_s)
    if ttft_s > cls.ttft_slo_s:
        cls.late_first_tokens += 1
        cls.missed += 1


@hot
def last_token(w, q, now_s):
    """Book a request's last token: TPOT."""
    request = w.req[q]
    request.last_token_s = now_s
    request.generated_tokens = request.output_tokens
    if request.output_tokens > 1:
        cls = w.cls[request.class_index]
        tpot_s = (now_s - request.first_token_s) / (request.output_tokens - 1)
        cls.tpot_sum_s += tpot_s
        cls.tpot_count += 1
        histogram_add(w.tpot_hist[request.class_index], TPOT_EDGES_S, tpot_s)


@hot
def complete(w, q, now_s):
    """A request has got all that it asked for, post-processing included: judge its SLOs."""
    request = w.req[q]
    cls = w.cls[request.class_index]
    cls.finished += 1
    cls.output_tokens += request.output_tokens
    cls.mean_answer_tokens = moved_mean(cls.mean_answer_tokens, MEAN_OVER, request.output_tokens)
    if not late_first_token(w, q):
        tpot_s = 0.0
        if request.output_tokens > 1:
            tpot_s = (request.last_token_s - request.first_token_s) / (request.output_tokens - 1)
        if tpot_s <= cls.tpot_slo_s and now_s - request.arrival_s <= cls.deadline_s:
            request.slo_met = 1
            cls.met += 1
        else:
            cls.missed += 1
            if tpot_s > cls.tpot_slo_s and request.output_tokens > SHORT_ANSWER_TOKENS:
                cls.slow_answers += 1
    end_request(w, q, FINISHED, now_s)
