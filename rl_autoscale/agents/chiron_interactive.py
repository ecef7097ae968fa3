"""Chiron's global interactive loop: interactive backpressure against the over-provisioning level Theta.

Our rebuild of Chiron (arXiv 2501.08090v1, sections 5.1-5.2):

    IBP = instances with interactive work / all interactive and mixed instances    two rebuilds of the paper agree
    IBP > Theta: add; IBP < Theta: remove                                          two rebuilds agree
    Theta = 1 / r, r the spike factor of arrivals over one load time               the paper's example: 3x gives 1/3

Step size and dead band are not known. `unit_step` is the +-1 that one rebuild uses; unless Theta is 1/k no integer
sits on it and it flips for ever. `target_step` jumps to the fixed point N* = max(1, ceil(busy / Theta)) and shrinks
only from above ceil(busy / (Theta (1 - h))) (another rebuild; h = 0.25). Loading instances count in the denominator
(ours).

The paper's router packs: one instance is filled before the next is opened. Under a router that spreads, every
instance is "busy" at the smallest load and IBP sticks at 1, so there busy is ceil(interactive requests / B), as one
rebuild does.
"""

from __future__ import annotations

import numpy as np

from rl_autoscale.agents.base import ceil_replicas
from rl_autoscale.fleet.spec import FleetSpec, IntArray
from rl_autoscale.fleet.state import FleetState, FloatArray

THETA = 1.0 / 3.0
"""The paper's worked example: a spike of 3x."""
THETA_BOUNDS = (0.1, 0.9)
"""Clamp of a Theta taken from a trace; one rebuild's."""
_EPSILON = 1e-9


def busy_instances(spec: FleetSpec, state: FleetState, pools: list[int], batch_cap: FloatArray) -> float:
    """Instances with interactive work over the given pools; pools without a reading count as 0.

    Args:
        spec: its router decides between counting instances (packing) and counting work (all others).
        state: telemetry.
        pools: interactive and mixed pools.
        batch_cap: B of every pool, shape (num_pools,).
    """
    if spec.router == "packing":
        return float(np.nansum(state.pools.busy_interactive[pools]))
    interactive = [c for c, service_class in enumerate(spec.classes) if service_class.kind == "interactive"]
    queued = np.nansum(state.classes.queue_length[interactive])
    in_batches = np.nansum(state.pools.in_flight_interactive[pools] / batch_cap[pools])
    return float(ceil_replicas(in_batches + queued / batch_cap[pools].mean()))


def unit_step(busy: float, total: int, theta: float, dead_band: float) -> int:
    """One instance more or less: up while IBP > Theta, down while IBP < Theta (1 - dead_band)."""
    if busy > theta * total + _EPSILON:
        return total + 1
    if busy < theta * (1.0 - dead_band) * total - _EPSILON:
        return max(1, total - 1)
    return max(1, total)


def target_step(busy: float, total: int, theta: float, dead_band: float) -> int:
    """Straight to N*: up at once, down only from above the dead band."""
    fixed_point = max(1, ceil_replicas(busy / theta))
    if total < fixed_point or total > max(1, ceil_replicas(busy / (theta * (1.0 - dead_band)))):
        return fixed_point
    return total


def spike_theta(arrival_s: FloatArray, load_time_s: float) -> float:
    """Theta from a *training* trace: 1 / p99 of the ratio of adjacent non-empty bins one load time long, clamped.

    Args:
        arrival_s: shape (num_requests,), non-decreasing.
        load_time_s: start-up time of an instance, > 0.

    Returns:
        Theta in `THETA_BOUNDS`; the paper's 1/3 when the trace is too short to tell.
    """
    if len(arrival_s) == 0:
        return THETA
    counts = np.bincount(((arrival_s - arrival_s[0]) // load_time_s).astype(np.int64))
    before, after = counts[:-1], counts[1:]
    both = (before > 0) & (after > 0)
    if not both.any():
        return THETA
    return float(np.clip(1.0 / np.percentile(after[both] / before[both], 99.0), *THETA_BOUNDS))


def split_total(total: int, busy: float, asked_for: IntArray, spec: FleetSpec, pools: list[int]) -> IntArray:
    """Spread a new total over interactive and mixed pools without moving any two of them in opposite directions.

    Ours: ceil(busy) instances belong in interactive pools and everything above in mixed ones, so that batch work can
        use all
    slack. Growth and shrinking each go where that split is farthest off first, within every pool's bounds.

    Args:
        total: instances wanted over ``pools``.
        busy: instances with interactive work.
        asked_for: shape (num_pools,), the targets now.
        spec: bounds and roles.
        pools: interactive and mixed pools.

    Returns:
        Shape (num_pools,); other pools are unchanged.
    """
    target = asked_for.copy()
    dedicated = [p for p in pools if spec.pools[p].role == "interactive"]
    mixed = [p for p in pools if spec.pools[p].role == "mixed"]
    change = total - int(asked_for[pools].sum())
    surplus = int(asked_for[dedicated].sum()) - ceil_replicas(busy)
    if change >= 0:
        change = _grow(target, spec.max_replicas, dedicated, min(change, max(0, -surplus)), change)
        change = _grow(target, spec.max_replicas, mixed, change, change)
        _grow(target, spec.max_replicas, dedicated, change, change)
    else:
        left = _shrink(target, spec.min_replicas, dedicated, min(-change, max(0, surplus)), -change)
        left = _shrink(target, spec.min_replicas, mixed, left, left)
        _shrink(target, spec.min_replicas, dedicated, left, left)
    return target


def _grow(target: IntArray, bounds: IntArray, pools: list[int], at_most: int, wanted: int) -> int:
    """Add up to ``at_most`` to the pools in order, in place; returns what of ``wanted`` is left."""
    for pool in pools:
        added = min(at_most, max(0, int(bounds[pool] - target[pool])))
        target[pool] += added
        at_most, wanted = at_most - added, wanted - added
    return wanted


def _shrink(target: IntArray, bounds: IntArray, pools: list[int], at_most: int, wanted: int) -> int:
    """Remove up to ``at_most`` from the pools, last first, in place; returns what of ``wanted`` is left."""
    for pool in reversed(pools):
        removed = min(at_most, max(0, int(target[pool] - bounds[pool])))
        target[pool] -= removed
        at_most, wanted = at_most - removed, wanted - removed
    return wanted
