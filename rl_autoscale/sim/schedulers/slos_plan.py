"""Kernel, SLOs-Serve's dynamic programme: which of the requests that wait can all have their first tokens in time.

Reference: Chen et al., arXiv 2504.08784, Algorithm 1, as in gulang2019/SLOServe; both simulators call it.

Prompts are computed one after the other, the earliest deadline first, beside the decode sequences, to which each of
them belongs as soon as it is computed. How fast follows from the tightest TPOT among those that decode by then: an
iteration lasts that long, and prompts get what it has room for (dynamic batch sizes). Wanted is the largest set of
prompts of which none is late, that fits the KV cache, and whose decodes keep the tightest TPOT in the end.

The programme goes through the prompts by deadline. What lies behind matters by the number accepted, the tightest TPOT,
the time and the tokens in the KV cache: for each pair of the first two it keeps those (time, tokens) that no other
equals or betters in both.

The authors count the sequences of each TPOT, since slower ones skip iterations; here all decode in each, so the
tightest TPOT says it all and the programme is polynomial. They know the length of outputs, so the KV cache holds whole
requests; here it holds what exists.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from rl_autoscale.fleet.jit import njit, shared_njit
from rl_autoscale.sim.layout import FloatArray, IntArray, RecordArray

MOST_CANDIDATES = 48
"""Requests among which one call chooses; bits of a set."""
MOST_LABELS = 4
"""(time, tokens) pairs that are kept for one number and one tightest TPOT; random cases need two."""

PLAN_PROMPT = np.dtype(
    [
        ("request", np.int32),
        ("tier", np.int32),  # of its TPOT: index into the periods
        ("kept", np.int32),  # 1 where it is not to choose: it was promised, or is under way
        ("deadline_s", np.float64),  # inf where nothing was promised
        ("left_tokens", np.int64),  # to compute before it decodes
        ("done_tokens", np.int64),
    ],
    align=True,
)


class PlanLabels(NamedTuple):
    """What lies behind, by the number accepted and the tier of the tightest TPOT; room for `MOST_LABELS` each."""

    used: IntArray  # (MOST_CANDIDATES + 1, num_tiers): how many are kept
    time_s: FloatArray  # (MOST_CANDIDATES + 1, num_tiers, MOST_LABELS): when the last prompt is computed
    context: IntArray  # likewise: KV tokens of all sequences then
    chosen: IntArray  # likewise: bit k is set if candidate k is accepted


def plan_labels(num_tiers: int) -> PlanLabels:
    """Room for the labels of one call."""
    shape = (MOST_CANDIDATES + 1, num_tiers, MOST_LABELS)
    return PlanLabels(np.zeros(shape[:2], np.int64), np.zeros(shape), *np.zeros((2, *shape), np.int64))


@shared_njit
def largest_chunk(
    limit_s: float, most: int, done: int, tokens: int, pairs: float, context: int, num_chunks: int, num_decode: int,
    decode_context: int, table_s: FloatArray, slopes: FloatArray,
) -> int:  # fmt: skip
    """Prompt tokens that can join an iteration without making it longer than allowed.

    Args:
        limit_s: how long it may last.
        most: tokens that are left of the prompt and of the token budget.
        done: tokens of the prompt that are computed.
        tokens: of the chunks that are in the iteration already; likewise their ``pairs`` and ``context``.
        pairs: (query, key) pairs.
        context: tokens computed before.
        num_chunks: their number.
        num_decode: decode sequences.
        decode_context: KV tokens that those read.
        table_s: seconds by new tokens, as in World.token_time.
        slopes: as in World.coefficients.
    """
    fixed_s = (slopes[1] + slopes[6]) * num_decode + (slopes[0] + slopes[5]) * decode_context
    fixed_s += slopes[3] * (context + done) + slopes[4] * (num_chunks + 1) + slopes[2] * pairs
    fits = 0
    too_many = most + 1
    while fits + 1 < too_many:
        middle = (fits + too_many) >> 1
        if table_s[num_decode + tokens + middle] + fixed_s + slopes[2] * (middle * (done + 0.5 * middle)) <= limit_s:
            fits = middle
        else:
            too_many = middle
    return fits


@shared_njit
def prompt_end_s(
    start_s: float, left: int, done: int, period_s: float, num_decode: int, context: int, budget: int,
    table_s: FloatArray, slopes: FloatArray,
) -> float:  # fmt: skip
    """When a prompt is computed that has all that iterations of a TPOT have room for; inf if they have none.

    Args:
        start_s: when the prompt before it is computed.
        left: its tokens to compute.
        done: its tokens that are computed.
        period_s: the tightest TPOT of those that decode; inf without any.
        num_decode: how many decode.
        context: their KV tokens.
        budget: tokens of an iteration.
        table_s: as for `largest_chunk`.
        slopes: likewise.
    """
    most = budget - num_decode
    chunk = 0
    if most > 0:
        chunk = largest_chunk(period_s, most, 0, 0, 0.0, 0, 0, num_decode, context + num_decode, table_s, slopes)
    if chunk == 0:
        return math.inf
    iteration_s = table_s[num_decode + chunk] + (slopes[1] + slopes[6]) * num_decode
    iteration_s += (slopes[0] + slopes[5]) * (context + num_decode) + slopes[2] * (0.5 * chunk * chunk) + slopes[4]
    earlier = done + 0.5 * max(left - chunk, 0)  # tokens that its chunks read back, on average
    return float(start_s + left * (iteration_s / chunk) + (slopes[2] * left * earlier + slopes[3] * earlier))


@njit
def keep_label(labels: PlanLabels, number: int, tier: int, time_s: float, context: int, chosen: int) -> None:
    """Add a (time, tokens) pair unless another is as good; those that it betters go, or for want of room the latest."""
    times, contexts, sets = labels.time_s[number, tier], labels.context[number, tier], labels.chosen[number, tier]
    count = 0
    for k in range(labels.used[number, tier]):
        if times[k] <= time_s and contexts[k] <= context:
            return
    for k in range(labels.used[number, tier]):
        if time_s > times[k] or context > contexts[k]:
            times[count], contexts[count], sets[count] = times[k], contexts[k], sets[k]
            count += 1
    place = count
    if count == MOST_LABELS:
        place = 0
        for k in range(1, count):
            if times[k] > times[place]:
                place = k
        if times[place] <= time_s:
            return
    else:
        labels.used[number, tier] = count + 1
    times[place], contexts[place], sets[place] = time_s, context, chosen


@shared_njit
def choose_prompts(
    prompts: RecordArray, num_prompts: int, now_s: float, num_decode: int, context: int, tier: int, most_context: int,
    budget: int, periods_s: FloatArray, table_s: FloatArray, slopes: FloatArray, labels: PlanLabels,
) -> int:  # fmt: skip
    """The largest set of candidates of which none is late, and that makes none late that was promised.

    A promise that cannot be kept any more, even without candidates, binds nobody.

    Args:
        prompts: in the order of computation; at most MOST_CANDIDATES are not ``kept``. Deadlines may change.
        num_prompts: of them; there may be more rows.
        now_s: the time.
        num_decode: sequences that decode now.
        context: their KV tokens.
        tier: of the tightest TPOT among those of them that were promised it.
        most_context: KV tokens for which there is room in the end.
        budget: tokens of an iteration.
        periods_s: TPOTs in ascending order, the last of them inf.
        table_s: as for `largest_chunk`.
        slopes: likewise.
        labels: for its work.

    Returns:
        Bit k is set if the k-th candidate is accepted. Of the largest sets, the one that is computed first.
    """
    release_broken_promises(prompts, num_prompts, now_s, num_decode, context, tier, budget, periods_s, table_s, slopes)
    num_tiers = periods_s.shape[0]
    for number in range(MOST_CANDIDATES + 1):
        for behind in range(num_tiers):
            labels.used[number, behind] = 0
    keep_label(labels, 0, tier, now_s, context, 0)
    num_kept = 0
    num_candidates = 0
    for i in range(num_prompts):
        prompt = prompts[i]
        for number in range(num_candidates, -1, -1):
            for behind in range(num_tiers):
                count = labels.used[number, behind]
                target = min(behind, prompt.tier)
                if prompt.kept:
                    labels.used[number, behind] = 0
                for k in range(count):
                    before = labels.context[number, behind, k]
                    chosen = labels.chosen[number, behind, k]
                    end_s = prompt_end_s(
                        labels.time_s[number, behind, k], prompt.left_tokens, prompt.done_tokens, periods_s[behind],
                        num_decode + num_kept + number, before, budget, table_s, slopes,
                    )  # fmt: skip
                    if end_s > prompt.deadline_s:
                        continue
                    after = before + prompt.done_tokens + prompt.left_tokens
                    if prompt.kept:
                        keep_label(labels, number, target, end_s, after, chosen)
                    else:
                        keep_label(labels, number + 1, target, end_s, after, chosen | (1 << num_candidates))
        if prompt.kept:
            num_kept += 1
        else:
            num_candidates += 1
    for number in range(num_candidates, 0, -1):
        best_s = math.inf
        best = 0
        for behind in range(num_tiers):
            for k in range(labels.used[number, behind]):
                after = labels.context[number, behind, k]
                keeps_pace = paces(num_decode + num_kept + number, after, periods_s[behind], budget, table_s, slopes)
                sooner = best == 0 or labels.time_s[number, behind, k] < best_s
                if keeps_pace and after <= most_context and sooner:
                    best_s = labels.time_s[number, behind, k]
                    best = labels.chosen[number, behind, k]
        if best > 0:
            return best
    return 0


@shared_njit
def paces(num_decode: int, context: int, period_s: float, budget: int, table_s: FloatArray, slopes: FloatArray) -> bool:
    """Whether so many sequences can decode at a TPOT; arguments as for `prompt_end_s`."""
    if num_decode > budget:
        return False
    decode_s = slopes[1] * num_decode + slopes[0] * (context + num_decode)
    return bool(table_s[num_decode] + decode_s <= period_s)


@njit
def release_broken_promises(
    prompts: RecordArray, num_prompts: int, now_s: float, num_decode: int, context: int, tier: int, budget: int,
    periods_s: FloatArray, table_s: FloatArray, slopes: FloatArray,
) -> None:  # fmt: skip
    """Take the deadline from kept prompts that will miss it anyhow; arguments as for `choose_prompts`."""
    time_s = now_s
    for i in range(num_prompts):
        prompt = prompts[i]
        if prompt.kept:
            time_s = prompt_end_s(
                time_s, prompt.left_tokens, prompt.done_tokens, periods_s[tier], num_decode, context, budget, table_s,
                slopes,
            )  # fmt: skip
            if time_s > prompt.deadline_s:
                prompt.deadline_s = math.inf
            num_decode += 1
            context += prompt.done_tokens + prompt.left_tokens
            tier = min(tier, prompt.tier)
