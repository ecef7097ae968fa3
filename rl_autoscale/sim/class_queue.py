"""Kernel: the gateway's bounded queue of each class, and patience that ends in it."""

from __future__ import annotations

from rl_autoscale.fleet.jit import hot, njit
from rl_autoscale.sim.endings import drop
from rl_autoscale.sim.layout import NONE, TIMED_OUT


@njit
def enqueue(w, q, front):
    """Hold a request in its class's gateway queue."""
    request = w.req[q]
    cls = w.cls[request.class_index]
    request.prev = NONE
    request.next = NONE
    if cls.queue_length == 0:
        cls.queue_head = q
        cls.queue_tail = q
    elif front:
        request.next = cls.queue_head
        cls.queue_head = q
    else:
        w.req[cls.queue_tail].next = q
        cls.queue_tail = q
    cls.queue_length += 1
    cls.queue_tokens += request.prompt_tokens
    w.fleet[0].queued += 1


@hot
def dequeue(w, c):
    """Take the head of a class's gateway queue."""
    cls = w.cls[c]
    q = cls.queue_head
    cls.queue_head = w.req[q].next
    cls.queue_length -= 1
    if cls.queue_length == 0:
        cls.queue_head = NONE
        cls.queue_tail = NONE
    cls.queue_tokens -= w.req[q].prompt_tokens
    w.fleet[0].queued -= 1
    return q


@njit
def purge_timeouts(w, c, now_s):
    """Drop the requests at the head of the queue whose patience has ended; booked at the moment it ended.

    Only requests without a first token time out, and only once they reach the head: within a class the oldest is first.
    """
    cls = w.cls[c]
    while cls.queue_length > 0:
        request = w.req[cls.queue_head]
        if request.first_token_s >= 0.0 or request.arrival_s + cls.timeout_s > now_s:
            return
        q = dequeue(w, c)
        drop(w, q, TIMED_OUT, w.req[q].arrival_s + cls.timeout_s)


@njit
def requeue(w, q, now_s):
    """Put a request that lost its replica in front of its class's queue, if its patience lasts.

    Those whose patience has ended go first, so that nobody hides behind a stream that has begun and cannot time out.
    """
    c = w.req[q].class_index
    purge_timeouts(w, c, now_s)
    if not w.req[q].first_token_s >= 0.0 and w.req[q].arrival_s + w.cls[c].timeout_s <= now_s:
        drop(w, q, TIMED_OUT, now_s)
    else:
        w.req[q].num_declined = 0
        enqueue(w, q, True)
