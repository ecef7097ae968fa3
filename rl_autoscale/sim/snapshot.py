"""Kernel: what a decision reads, filled in at the moment of the scrape; columns follow fleet/state.py."""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import njit


@njit
def snapshot(w, now_s, age_s):
    """Fill ``pool_state`` and ``class_state``; columns are the fields of PoolTelemetry and ClassTelemetry in order."""
    fleet = w.fleet[0]
    window_s = now_s - fleet.snapshot_s
    per_s = 1.0 / window_s if window_s > 0.0 else math.nan
    for p in range(w.pool.shape[0]):
        snapshot_pool(w, p, now_s, per_s, age_s)
    for c in range(w.cls.shape[0]):
        snapshot_class(w, c, now_s, per_s, age_s)
    w.ttft_hist[:] = 0
    w.tpot_hist[:] = 0
    fleet.snapshot_s = now_s
