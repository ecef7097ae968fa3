"""Misses that are certain but not in the books yet: requests that wait beyond a promise and have not ended.

The engine books a miss when its event comes: a late first token, a late end, a drop. Until then a request that has
waited longer than its TTFT SLO is already lost, and whoever pays for misses by the step must hear of it in that step.
"""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import cached_njit
from rl_autoscale.sim.layout import FloatArray, IntArray, RecordArray


@cached_njit
def count_overdue(
    requests: RecordArray,
    ttft_slo_s: FloatArray,
    deadline_s: FloatArray,
    now_s: float,
    first: int,
    counts: IntArray,
) -> int:
    """Add the overdue requests of one fleet to ``counts``.

    Args:
        requests: REQUEST records that have arrived, in that order.
        ttft_slo_s: of each class, shape (num_classes,).
        deadline_s: likewise; inf without one.
        now_s: the time.
        first: all records before this one have ended.
        counts: int64, shape (num_classes,); changed.

    Returns:
        The new ``first``.
    """
    for q in range(first, requests.shape[0]):
        request = requests[q]
        if request.outcome != 0:
            if q == first:
                first += 1
            continue
        c = request.class_index
        waited_s = now_s - request.arrival_s
        booked = request.first_token_s - request.arrival_s > ttft_slo_s[c]
        late = math.isnan(request.first_token_s) and waited_s > ttft_slo_s[c]
        if not booked and (late or waited_s > deadline_s[c]):
            counts[c] += 1
    return first
