"""Models that take turns on the same GPUs: which of them are loaded next, and with how many replicas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rl_autoscale.fleet.spec import IntArray
from rl_autoscale.fleet.state import FloatArray


def take_turns(
    needed: IntArray, held: IntArray, slack_s: FloatArray, *, margin_s: float, gpus_each: IntArray, num_gpus: int
) -> IntArray:
    """Deal GPUs out to pools: the virtual queue of QLM, whose head decides which model is loaded.

    First those whose work cannot wait any longer, then those that are loaded and have work, then the rest; the least
    slack first. Of these each in turn gets one replica, then what it needs beyond; what nobody needs stays where it is.
    So a model is swapped out for one that would be late, or when it has nothing to do, and not before.

    Args:
        needed: replicas that each pool's own work asks for, shape (num_pools,), >= 0.
        held: asked for now, the same shape.
        slack_s: time that the most urgent work of each pool has to spare, its swap included; inf without work.
        margin_s: with less than this, work cannot wait any longer.
        gpus_each: of one replica of each pool.
        num_gpus: that the pools share.

    Returns:
        Replicas, shape (num_pools,); they fit ``num_gpus``.
    """
    rank = np.where(slack_s <= margin_s, 0, np.where(held > 0, 1, 2))
    order = np.lexsort((slack_s, rank))
    given, left = np.zeros_like(needed), num_gpus
    for equals in (order[rank[order] == k].tolist() for k in range(3)):
        for wanted in (np.minimum(needed, 1), needed):
            left = _deal(given, wanted, equals, gpus_each, left)
    _deal(given, held, order.tolist(), gpus_each, left)
    return given


def _deal(given: IntArray, wanted: IntArray, order: Sequence[int], gpus_each: IntArray, left: int) -> int:
    """Raise what is given towards what is wanted, in order; returns the GPUs that are left."""
    for p in order:
        more = min(max(int(wanted[p] - given[p]), 0), left // int(gpus_each[p]))
        given[p] += more
        left -= more * int(gpus_each[p])
    return left
