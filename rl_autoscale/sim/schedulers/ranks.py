"""Kernel: the rank with which a request comes, where the waiting queue is sorted."""

from __future__ import annotations

from rl_autoscale.fleet.jit import njit
from rl_autoscale.sim.layout import ANDES, FASTSERVE, SLOS_SERVE
from rl_autoscale.sim.schedulers.andes import rank_newcomer
from rl_autoscale.sim.schedulers.fastserve import skip_join
from rl_autoscale.sim.schedulers.slos_admission import rank_by_slo


@njit
def rank_arrival(w, r, q, now_s):
    """Rank a request that joins a replica's waiting queue."""
    request = w.req[q]
    kind = w.pool[w.rep[r].pool].scheduler
    if kind == FASTSERVE:
        skip_join(w, r, q, now_s)
    elif kind == SLOS_SERVE:
        rank_by_slo(w, r, q)
    elif kind == ANDES:
        rank_newcomer(w, q)
    else:  # vllm-priority: by priority, then arrival
        request.rank = w.cls[request.class_index].priority
