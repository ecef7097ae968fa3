"""Kernel: replicas that come and go: started, woken, reclaimed, drained, put to sleep, crashed, taken away."""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import njit
from rl_autoscale.sim.bridge import lose_held
from rl_autoscale.sim.class_queue import requeue
from rl_autoscale.sim.drafts import fraction_units
from rl_autoscale.sim.endings import drop
from rl_autoscale.sim.estimate import leave_replica
from rl_autoscale.sim.kv_cache import empty_cache
from rl_autoscale.sim.layout import (
    COLD,
    DRAINING,
    FAILED,
    LIFE,
    NO_SLOT,
    NONE,
    OFF,
    READY,
    SLEEPING,
    SPOT,
    STARTING,
    WAKE,
)
from rl_autoscale.sim.postprocess import lose_parked
from rl_autoscale.sim.replica import book_until, clear_replica, cut_leap, schedule_event
from rl_autoscale.sim.router import update_route


@njit
def accrue(w, p, now_s):
    """Integrate replica-seconds up to now; call before any change of the counts."""
    pool = w.pool[p]
    elapsed_s = now_s - pool.accrued_to_s
    pool.replica_s += elapsed_s * (pool.ready + pool.starting + pool.draining)
    pool.ready_s += elapsed_s * pool.ready
    pool.sleep_s += elapsed_s * pool.sleeping
    pool.accrued_to_s = now_s


@njit
def leave(w, r, may_sleep):
    """An empty replica goes to sleep where the pool lets it, else it is gone; call `accrue` before."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    pool.doomed -= rep.doomed
    sleeps = may_sleep and rep.doomed == 0 and pool.sleeping < pool.max_sleeping
    clear_replica(w, r)
    if sleeps:
        rep.state = SLEEPING
        pool.sleeping += 1


@njit
def retire(w, r, now_s):
    """A draining replica has nothing left to do and leaves."""
    p = w.rep[r].pool
    accrue(w, p, now_s)
    w.pool[p].draining -= 1
    leave(w, r, True)


@njit
def become_ready(w, r, now_s):
    """A starting replica takes requests from now on."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    accrue(w, rep.pool, now_s)
    rep.state = READY
    rep.generation += 1
    rep.event_s = math.inf
    pool.starting -= 1
    pool.waking -= rep.waking
    rep.waking = 0
    pool.ready += 1
    if pool.prefix_caching:
        empty_cache(w, r)
    schedule_event(w, r)
    update_route(w, r)


@njit
def start_replica(w, p, now_s, at_once):
    """Wake a sleeping replica, or start one in a free slot; returns False when all slots are taken.

    Args:
        w: the fleet.
        p: the pool.
        now_s: the time.
        at_once: whether it is ready now, as at time 0.
    """
    pool = w.pool[p]
    waking = pool.sleeping > 0
    wanted = SLEEPING if waking else OFF
    for r in range(pool.base, pool.base + pool.num_slots):
        rep = w.rep[r]
        if rep.state == wanted:
            draw = pool.num_starts % w.draws.shape[2]
            duration_s = 0.0 if at_once else w.draws[p, COLD, draw]
            if waking:
                duration_s = w.draws[p, WAKE, pool.num_wakes % w.draws.shape[2]]
                rep.waking = 1
                pool.num_wakes += 1
                pool.waking += 1
                pool.sleeping -= 1
            pool.num_starts += 1
            pool.starting += 1
            rep.state = STARTING
            rep.asked_s = now_s
            rep.event_s = now_s + duration_s
            rep.death_s = rep.event_s + w.draws[p, LIFE, draw]
            rep.notice_s = rep.event_s + w.draws[p, SPOT, draw]
            rep.crash_s = min(rep.death_s, rep.notice_s)
            if at_once:
                become_ready(w, r, now_s)
            else:
                schedule_event(w, r)
            return True
    return False


@njit
def reclaim_replica(w, p):
    """Return a draining replica to service: the cheapest capacity there is."""
    pool = w.pool[p]
    for r in range(pool.base, pool.base + pool.num_slots):
        if w.rep[r].state == DRAINING and w.rep[r].doomed == 0:
            w.rep[r].state = READY
            pool.draining -= 1
            pool.ready += 1
            pool.reclaimed += 1
            update_route(w, r)
            return


@njit
def cancel_start(w, p):
    """Give up the newest start; a replica that was waking goes back to sleep."""
    pool = w.pool[p]
    newest = NONE
    for r in range(pool.base, pool.base + pool.num_slots):
        if w.rep[r].state == STARTING and (newest < 0 or w.rep[r].asked_s >= w.rep[newest].asked_s):
            newest = r
    pool.starting -= 1
    pool.cancelled_starts += 1
    waking = w.rep[newest].waking == 1
    pool.waking -= w.rep[newest].waking
    leave(w, newest, waking)


@njit
def begin_to_migrate(w, r, now_s, slot):
    """A replica drains: where requests migrate, they leave from the end of its iteration on; see `migrate`."""
    if w.fleet[0].migrates and w.rep[r].cuttable:
        cut_leap(w, r, now_s, slot)


@njit
def drain_replica(w, p, now_s):
    """Take the ready replica with the least interactive work, then the least work, out of service."""
    pool = w.pool[p]
    best = NONE
    for r in range(pool.base, pool.base + pool.num_slots):
        rep = w.rep[r]
        if rep.state == READY and (
            best < 0
            or rep.in_flight_interactive < w.rep[best].in_flight_interactive
            or (
                rep.in_flight_interactive == w.rep[best].in_flight_interactive
                and rep.in_flight <= w.rep[best].in_flight
            )
        ):
            best = r
    pool.ready -= 1
    w.rep[best].state = DRAINING
    update_route(w, best)
    if w.rep[best].in_flight == 0:
        leave(w, best, True)
    else:
        pool.draining += 1
        begin_to_migrate(w, best, now_s, NO_SLOT)


@njit
def reconcile(w, p, now_s):
    """Bring ready + starting to the target: reclaim before waking before starting, cancel before draining."""
    pool = w.pool[p]
    accrue(w, p, now_s)
    while pool.ready + pool.starting < pool.target:
        if pool.draining > pool.doomed:
            reclaim_replica(w, p)
        elif not start_replica(w, p, now_s, False):
            break
    while pool.ready + pool.starting > pool.target:
        if pool.starting > 0:
            cancel_start(w, p)
        else:
            drain_replica(w, p, now_s)


@njit
def lose_request(w, r, q, now_s):
    """What becomes of a request whose replica crashed."""
    request = w.req[q]
    request.in_batch = 0
    request.evict = 0
    request.computed_tokens = 0
    request.on_host = 0
    request.chunk_tokens = 0
    request.finish_iteration = 0
    w.fleet[0].bridge_used -= request.kv_in_bridge
    request.kv_in_bridge = 0
    leave_replica(w, r, q, now_s)
    if request.first_token_s >= 0.0:
        drop(w, q, FAILED, now_s)
    else:
        requeue(w, q, now_s)


@njit
def crash(w, r, now_s):
    """A replica dies or is taken away: streams that have begun fail, the rest are held again; it is replaced."""
    rep = w.rep[r]
    p = rep.pool
    pool = w.pool[p]
    book_until(w, r, now_s)
    if pool.token_shift > 0:
        pool.generation_units -= fraction_units(w.residue[r], rep.iteration, pool.phase_mask, pool.token_shift)
    accrue(w, p, now_s)
    if rep.state == READY:
        pool.ready -= 1
    else:
        pool.draining -= 1
    if rep.doomed:
        pool.doomed -= 1
        pool.taken_away += 1
    else:
        pool.crashes += 1
    rep.state = OFF
    for waiting in (True, False):
        # Youngest first, so that each goes in front of the younger ones.
        q = rep.wait_tail if waiting else rep.batch_tail
        while q >= 0:
            before = w.req[q].prev
            lose_request(w, r, q, now_s)
            q = before
    lose_held(w, r, now_s)
    if rep.num_parked > 0:
        lose_parked(w, r, now_s)
    clear_replica(w, r)
    update_route(w, r)
    reconcile(w, p, now_s)


@njit
def give_notice(w, r, now_s):
    """A spot replica will be taken away soon: it gets no more requests, and another one is started."""
    rep = w.rep[r]
    pool = w.pool[rep.pool]
    accrue(w, rep.pool, now_s)
    rep.doomed = 1
    pool.doomed += 1
    pool.notices += 1
    rep.death_s = min(rep.death_s, now_s + pool.notice_length_s)
    rep.crash_s = rep.death_s
    rep.notice_s = math.inf
    schedule_event(w, r)
    if rep.state == READY:
        pool.ready -= 1
        rep.state = DRAINING
        update_route(w, r)
        if rep.in_flight == 0:
            leave(w, r, False)
        else:
            pool.draining += 1
            begin_to_migrate(w, r, now_s, r - 1)  # its own iteration that ends now is still running
    reconcile(w, rep.pool, now_s)


@njit
def change_replica(w, r, now_s):
    """A replica becomes ready, gets its notice or dies."""
    if w.rep[r].state == STARTING:
        become_ready(w, r, now_s)
    elif w.rep[r].notice_s < w.rep[r].death_s:
        give_notice(w, r, now_s)
    else:
        crash(w, r, now_s)
