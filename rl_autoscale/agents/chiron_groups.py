"""Request groups, QLM's waiting-time bound, and how many batch instances keep every deadline: the arithmetic, no state.

Our rebuild of Chiron's batch autoscaler (arXiv 2501.08090v1, section 5; exact subsection unknown) on QLM's estimator
(arXiv 2407.00047), whose idea the authors' blog confirms: continuous batching makes token throughput R nearly
constant, so a wait is work ahead divided by R, and sums of many output lengths tend to a normal:

    E[W] = n * mean / R      Var[W] = n * std^2 / R^2      bound = E[W] + z * sqrt(Var[W])        formula from memory

Batch backpressure (BBP) counts the groups whose bound exceeds the time left; the fewest instances that bring it to 0
are added (definition from memory). The closed form of that number, the grouping widths and z = 1.645 (95 %) are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rl_autoscale.agents.base import ceil_replicas

GROUP_WIDTH_S = 60.0
"""Least width of a deadline bucket; ours."""
GROUP_WIDTH_FRACTION = 0.1
"""Width as a share of the longest time to a deadline; ours."""
GROUP_MIN_REQUESTS = 200
"""Below this the normal bound is poor, so a small bucket joins its earlier neighbour; ours, after QLM's accuracy."""


class QueuedBatch(NamedTuple):
    """Queued requests of one class that arrived together."""

    deadline_s: float
    num_requests: float
    mean_output_tokens: float
    std_output_tokens: float


@dataclass(frozen=True, slots=True)
class RequestGroup:
    """Queued requests with similar deadlines.

    Attributes:
        deadline_s: the earliest of its members.
        num_requests: of the group.
        work_tokens: mean of the output tokens of the group.
        work_variance: variance of that sum.
    """

    deadline_s: float
    num_requests: float
    work_tokens: float
    work_variance: float


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What the sizing says.

    Attributes:
        instances: to be added to what serves and loads now, >= 0.
        backpressure: groups whose bound exceeds the time left (BBP), before adding anything.
        num_lost: requests in groups that no new instance can save, because it would load too long.
    """

    instances: int
    backpressure: int
    num_lost: float


def queued_arrivals(
    history: Sequence[tuple[float, float]], queue_length: float, oldest_arrival_s: float
) -> list[tuple[float, float]]:
    """Which arrivals are still queued, if the queue is served first come first served.

    Args:
        history: (time, requests admitted) per tick, oldest first.
        queue_length: requests in the queue now.
        oldest_arrival_s: when the head of the queue arrived.

    Returns:
        (arrival time, requests) oldest first, summing to ``queue_length``. The newest arrivals fill the queue; what
        the history does not explain (evicted work, missing ticks) arrived with the head.
    """
    left, found = queue_length, []
    for time_s, admitted in reversed(history):
        if left <= 0:
            break
        taken = min(left, admitted)
        if taken > 0:
            found.append((max(time_s, oldest_arrival_s), taken))
        left -= taken
    if left > 0:
        found.append((oldest_arrival_s, left))
    return found[::-1]


def form_groups(queue: Iterable[QueuedBatch], now_s: float) -> list[RequestGroup]:
    """Cut the queue, earliest deadline first, into groups of similar deadlines.

    A bucket spans max(60 s, 10 % of the longest time to a deadline). A bucket joins its earlier neighbour while that
    has fewer than 200 requests, and the last one joins if it is small itself.
    """
    ordered = sorted((item for item in queue if item.num_requests > 0), key=lambda item: item.deadline_s)
    if not ordered:
        return []
    width_s = max(GROUP_WIDTH_S, GROUP_WIDTH_FRACTION * (ordered[-1].deadline_s - now_s))
    groups: list[list[QueuedBatch]] = [[ordered[0]]]
    bucket_start_s = ordered[0].deadline_s
    for item in ordered[1:]:
        if item.deadline_s >= bucket_start_s + width_s:
            bucket_start_s = item.deadline_s
            if _num_requests(groups[-1]) >= GROUP_MIN_REQUESTS:
                groups.append([])
        groups[-1].append(item)
    if len(groups) > 1 and _num_requests(groups[-1]) < GROUP_MIN_REQUESTS:
        last = groups.pop()
        groups[-1].extend(last)
    return [_group(members) for members in groups]


def _num_requests(members: list[QueuedBatch]) -> float:
    return sum(item.num_requests for item in members)


def _group(members: list[QueuedBatch]) -> RequestGroup:
    return RequestGroup(
        deadline_s=members[0].deadline_s,
        num_requests=_num_requests(members),
        work_tokens=sum(item.num_requests * item.mean_output_tokens for item in members),
        work_variance=sum(item.num_requests * item.std_output_tokens**2 for item in members),
    )


def work_bounds_tokens(groups: Sequence[RequestGroup], z: float) -> list[float]:
    """For each group, the bound on the tokens ahead of its end: mean + z standard deviations of everything up to it."""
    bounds, mean, variance = [], 0.0, 0.0
    for group in groups:
        mean, variance = mean + group.work_tokens, variance + group.work_variance
        bounds.append(mean + z * math.sqrt(variance))
    return bounds


def plan_batch(
    groups: Sequence[RequestGroup],
    *,
    now_s: float,
    tokens_per_s: float,
    instance_tokens_per_s: float,
    load_time_s: float,
    loading: int,
    z: float,
) -> BatchPlan:
    """The fewest new instances with which no group that can still be saved misses its deadline.

    For a group with slack S, work bound T, current rate R, instance rate r and load time L:
    k = ceil((T - R S) / (r (S - L))) if S > L, else no instance can help it. The maximum over groups counts, less
    what is already loading. Work that nothing serves gets one instance even when it is late: late is better than
    never.

    Args:
        groups: earliest deadline first.
        now_s: time of the decision.
        tokens_per_s: R, what serves batch work now, the batch share of mixed instances included.
        instance_tokens_per_s: r, > 0.
        load_time_s: L.
        loading: instances already starting.
        z: normal quantile of the bound.
    """
    needed, backpressure, lost = 0, 0, 0.0
    for group, bound in zip(groups, work_bounds_tokens(groups, z), strict=True):
        slack_s = group.deadline_s - now_s
        excess_tokens = bound - tokens_per_s * slack_s
        if excess_tokens <= 0:
            continue
        backpressure += 1
        if slack_s <= load_time_s:
            lost += group.num_requests
        else:
            needed = max(needed, ceil_replicas(excess_tokens / (instance_tokens_per_s * (slack_s - load_time_s))))
    if groups and tokens_per_s <= 0:
        needed = max(needed, 1)
    return BatchPlan(instances=max(0, needed - loading), backpressure=backpressure, num_lost=lost)
