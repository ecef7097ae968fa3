"""Kernel: what a draining replica has goes on elsewhere, decode sequences with their KV cache.

Semantics (docs/simulator.md; reference twin: `Gateway.migrate_from`): at the end of each of its iterations a draining
replica gives away what another replica has a place for, as the router says: running decode sequences in the order of
the batch, then the waiting queue. KV cache goes through host memory, as in an eviction to the host; a prompt under way
stays until it is computed. What finds no place stays and is served.
"""

from __future__ import annotations

from rl_autoscale.fleet.jit import njit
from rl_autoscale.sim.batch import waiting_remove
from rl_autoscale.sim.estimate import leave_replica
from rl_autoscale.sim.gateway import send
from rl_autoscale.sim.replica import swap_out
from rl_autoscale.sim.router import route


@njit
def migrate(w, r, now_s):
    """Give away what has a place elsewhere, at the end of an iteration."""
    rep = w.rep[r]
    for waiting in (False, True):
        q = rep.wait_head if waiting else rep.batch_head
        while q >= 0:
            request = w.req[q]
            after = request.next
            if waiting or request.finish_iteration > 0:
                place = route(w, request.class_index, q, now_s, r)
                if place >= 0:
                    if waiting:
                        waiting_remove(w, r, q)
                    else:
                        swap_out(w, r, q)
                    leave_replica(w, r, q, now_s)
                    w.pool[rep.pool].migrations += 1
                    send(w, q, place, now_s, r)
            q = after
