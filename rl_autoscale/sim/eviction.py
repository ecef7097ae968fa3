"""Kernel: interactive requests that take the places of batch requests on mixed replicas."""

from __future__ import annotations

from rl_autoscale.fleet.jit import njit
from rl_autoscale.sim.batch import waiting_remove
from rl_autoscale.sim.class_queue import requeue
from rl_autoscale.sim.estimate import leave_replica
from rl_autoscale.sim.layout import NONE, PREFILL, READY
from rl_autoscale.sim.replica import swap_out, unload
from rl_autoscale.sim.schedulers.steps import abandon


@njit
def evictable_replica(w, c):
    """Replica that may serve the class and holds the most unmarked batch requests; NONE if none has any."""
    best = NONE
    most = 0
    for position in range(w.class_pools.shape[1]):
        p = w.class_pools[c, position]
        if p < 0:
            break
        pool = w.pool[p]
        if pool.role == PREFILL or pool.serves_batch == 0 or pool.in_flight == pool.in_flight_interactive:
            continue
        for r in range(pool.base, pool.base + pool.num_slots):
            rep = w.rep[r]
            batch = rep.in_flight - rep.in_flight_interactive - rep.num_evict_marked - rep.num_parked_batch
            if rep.state == READY and batch > most:
                best = r
                most = batch
    return best


@njit
def evict_for(w, r, now_s):
    """Free one place on a replica by sending a batch request back to the gateway's queue.

    A request still waiting in the engine leaves at once; else the youngest running one leaves when the iteration ends.
    """
    rep = w.rep[r]
    q = rep.wait_tail
    while q >= 0:
        if not w.cls[w.req[q].class_index].interactive:
            waiting_remove(w, r, q)
            if not w.fleet[0].evicts_to_host:  # else it waits without KV cache, or with one on the host
                abandon(w, r, q)
            return_to_queue(w, r, q, now_s)
            return
        q = w.req[q].prev
    q = rep.batch_tail
    while q >= 0:
        request = w.req[q]
        if not w.cls[request.class_index].interactive and not request.evict:
            request.evict = 1
            rep.num_evict_marked += 1
            return
        q = request.prev


@njit
def return_to_queue(w, r, q, now_s):
    """An evicted request, already off the engine, goes back to its class's queue; it keeps its tokens so far."""
    leave_replica(w, r, q, now_s)
    w.req[q].num_evictions += 1
    w.pool[w.rep[r].pool].evictions += 1
    requeue(w, q, now_s)


@njit
def complete_evictions(w, r, now_s):
    """At an iteration's end, take the marked batch requests off the engine, youngest first.

    Where eviction is to the host a decode sequence keeps its KV cache; a prompt under way is computed again.
    All of them are still in the batch: they were marked during the iteration that ends; preemption is at the next.
    """
    rep = w.rep[r]
    q = rep.batch_tail
    while q >= 0 and rep.num_evict_marked > 0:
        before = w.req[q].prev
        if w.req[q].evict:
            w.req[q].evict = 0
            rep.num_evict_marked -= 1
            if w.fleet[0].evicts_to_host and w.req[q].finish_iteration > 0:
                swap_out(w, r, q)
            else:
                unload(w, r, q)
            return_to_queue(w, r, q, now_s)
        q = before
