"""What an episode's records say beyond cost and attainment: how GPUs were used, and how service varied.

Pure functions over REQUEST records and the time line, run once after an episode. docs/metrics.md defines each figure.
"""

from __future__ import annotations

import numpy as np

from rl_autoscale.fleet.jit import cached_njit
from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.profile import TYPICAL_OUTPUT_TOKENS, TYPICAL_PROMPT_TOKENS
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.layout import NONE, FloatArray, IntArray, Outcome, RecordArray
from rl_autoscale.sim.reading import fill_qoe


def coefficient_of_variation(values: FloatArray) -> float:
    """Standard deviation over mean; NaN without values, or where their mean is 0."""
    mean = float(values.mean()) if len(values) else 0.0
    return float(values.std()) / mean if mean else float("nan")


def pools_used(spec: FleetSpec, requests: RecordArray, pools: RecordArray) -> IntArray:
    """The pool each request was last sent to, else its class's first choice; shape (num_requests,)."""
    sent = np.searchsorted(pools["base"], requests["replica"], side="right") - 1
    return np.where(np.isnan(requests["dispatched_s"]), spec.first_choice[requests["class_index"]], sent)


def busy_replica_s(requests: RecordArray, pools: RecordArray) -> FloatArray:
    """Time in which a replica had a request, summed over the replicas of each pool; shape (num_pools,).

    Not for prefill and decode pools: the records tell only where a request was last. An engine never idles with work,
    so this is the union of the requests' stays. A stay that ended in an eviction, a migration or a crash is not in the
    records; it is missing where no other request was there.
    """
    outcome = requests["outcome"]
    stayed = (outcome == Outcome.FINISHED) | (outcome == Outcome.FAILED)
    stayed |= (outcome == Outcome.UNFINISHED) & (requests["num_evictions"] == 0)
    stayed &= ~np.isnan(requests["dispatched_s"])
    replica, since_s, until_s = (requests[name][stayed] for name in ("replica", "dispatched_s", "end_s"))
    until_s = np.fmin(until_s, requests["last_token_s"][stayed])  # post-processing needs no replica
    order = np.lexsort((since_s, replica))
    busy_s = np.zeros(len(pools))
    for here in np.split(order, np.flatnonzero(np.diff(replica[order])) + 1):
        if len(here):
            last_s = np.maximum.accumulate(until_s[here])
            first_s = np.maximum(since_s[here], np.concatenate(([-np.inf], last_s[:-1])))
            pool = int(np.searchsorted(pools["base"], replica[here[0]], side="right")) - 1
            busy_s[pool] += float((last_s - first_s).clip(min=0.0).sum())
    return busy_s


def work_gpu_s(spec: FleetSpec, requests: RecordArray, pool_index: IntArray) -> FloatArray:
    """GPU-seconds that each request takes in full batches of its pool, shape (num_requests,); see fleet/demand.py.

    Of prefill and decode pools the records hold the last; the other is the first choice.
    """
    prefill_index = decode_index = pool_index
    if spec.decode_pools:
        first_choice = spec.first_choice[requests["class_index"]]
        decodes = np.isin(pool_index, spec.decode_pools)
        prefill_index = np.where(decodes, first_choice, pool_index)
        decode_index = np.where(decodes, pool_index, spec.decode_pools[0])
    prompt_s, token_s = (np.array([_prices_s(pool) for pool in spec.pools]) * spec.gpus_per_replica[:, None]).T
    prompt_gpu_s = requests["prompt_tokens"] * prompt_s[prefill_index]
    return np.asarray(prompt_gpu_s + requests["output_tokens"] * token_s[decode_index])


def _prices_s(pool: PoolSpec) -> tuple[float, float]:
    return (
        pool.hardware.prefill_s_per_token(TYPICAL_PROMPT_TOKENS),
        pool.full_batch_decode_s(TYPICAL_PROMPT_TOKENS, TYPICAL_OUTPUT_TOKENS),
    )


def provisioning_gap(needed: FloatArray, held: FloatArray) -> tuple[float, float]:
    """(over-, under-provisioned): GPUs held beyond need, and short of it, over those needed; NaN without need.

    The provisioning accuracies of Herbst et al., "Elasticity in Cloud Computing" (ICAC 2013), summed before the
    division, so that a step that needs nothing counts as well.

    Args:
        needed: GPUs, shape (num_steps,).
        held: GPUs, shape (num_steps,).
    """
    total = float(needed.sum())
    if not total > 0:
        return float("nan"), float("nan")
    gap = held - needed
    return float(gap.clip(min=0.0).sum()) / total, float((-gap).clip(min=0.0).sum()) / total


def token_rates(requests: RecordArray, step_s: float) -> FloatArray:
    """Output tokens per step until the last arrival, shape (num_steps,).

    A request's tokens after its first are spread evenly between its first and its last, since only these are kept.
    """
    done = requests["outcome"] == Outcome.FINISHED
    first_s, end_s, tokens = (requests[name][done] for name in ("first_token_s", "last_token_s", "output_tokens"))
    edges_s = np.arange(0.0, float(requests["arrival_s"].max(initial=0.0)), step_s)
    if len(edges_s) < 2 or not len(first_s):
        return np.zeros(0)
    firsts = np.bincount((first_s / step_s).astype(np.int64), minlength=len(edges_s))[: len(edges_s) - 1]
    spread = end_s > first_s
    rate_per_s = (tokens[spread] - 1) / (end_s[spread] - first_s[spread])
    begun = _ramp(first_s[spread], rate_per_s, edges_s) - _ramp(end_s[spread], rate_per_s, edges_s)
    return np.asarray(firsts + np.diff(begun))


def _ramp(start_s: FloatArray, slope_per_s: FloatArray, at_s: FloatArray) -> FloatArray:
    """Sum over items of slope * max(t - start, 0), at each t."""
    order = np.argsort(start_s)
    slope, offset = slope_per_s[order], (slope_per_s * start_s)[order]
    count = np.searchsorted(start_s[order], at_s, side="right")
    sums = np.concatenate(([0.0], np.cumsum(slope))), np.concatenate(([0.0], np.cumsum(offset)))
    return np.asarray(sums[0][count] * at_s - sums[1][count])


def quality_of_experience(requests: RecordArray, ttft_s: float, token_s: float) -> FloatArray:
    """Andes' QoE of each request, 0..1, shape (num_requests,); 0 where it did not finish. See sim/reading.py.

    Args:
        requests: of one class.
        ttft_s: expected time to first token; the class's SLO.
        token_s: expected time per token, the reading speed's inverse; the class's SLO.
    """
    qoe = np.empty(len(requests))
    fill_qoe(requests, ttft_s, token_s, qoe)
    return qoe


def head_of_line_blocking_s(requests: RecordArray) -> FloatArray:
    """How long each request waited behind a longer one, shape (num_requests,); NaN where it never ran.

    The part of its time from arrival to its first place in a batch during which a request that arrived before it, has
    more tokens (prompt and output) and was served by the same replica had not ended. Waiting behind shorter requests is
    no blocking: no order of service would spare it without making them wait.
    """
    blocked_s = np.full(len(requests), np.nan)
    ran = np.flatnonzero((requests["replica"] != NONE) & ~np.isnan(requests["scheduled_s"]))
    tokens = requests["prompt_tokens"].astype(np.int64) + requests["output_tokens"]
    order = ran[np.argsort(requests["replica"][ran], kind="stable")]
    for here in np.split(order, np.flatnonzero(np.diff(requests["replica"][order])) + 1):
        _, rank = np.unique(-tokens[here], return_inverse=True)
        latest_s = np.full(len(here) + 1, -np.inf)
        behind_s = np.empty(len(here))
        _latest_end_of_longer(requests["end_s"][here], rank.astype(np.int64), latest_s, behind_s)
        wait_end_s = np.minimum(behind_s, requests["scheduled_s"][here])
        blocked_s[here] = (wait_end_s - requests["arrival_s"][here]).clip(min=0.0)
    return blocked_s


@cached_njit
def _latest_end_of_longer(end_s: FloatArray, rank: IntArray, tree: FloatArray, found: FloatArray) -> None:
    """For every item, the largest end among earlier items of smaller rank, -inf without any: a tree of prefix maxima.

    Args:
        end_s: in order of arrival, shape (n,).
        rank: from 0, the longest; shape (n,).
        tree: scratch of -inf, shape (n + 1,).
        found: output, shape (n,).
    """
    for k in range(len(end_s)):
        latest = -np.inf
        node = rank[k]
        while node > 0:
            latest = max(latest, tree[node])
            node -= node & -node
        found[k] = latest
        node = rank[k] + 1
        while node < len(tree):
            tree[node] = max(tree[node], end_s[k])
            node += node & -node
