"""Kernel, SLOs-Serve's planning: who of those that wait can be in time, and how many drafts iterations verify.

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

With drafts an iteration brings several tokens and may last as many times the tightest TPOT, but computes drafts that
are not kept as well. As in the authors' SLO-adaptive speculation, of all numbers of drafts that keep the tightest TPOT
the one counts that serves prompts best. For them that is the most room in rounds of this length; but here a sequence
that has just begun to decode allows one iteration of a single TPOT only, so what counts is when the prompt at hand is
computed (`prompt_s`). Theirs has another number of drafts for each TPOT, the fewest that keep it; here all sequences of
an iteration have the same. They take whole tokens per round; here the average is kept, as in all of this simulator.
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


class Costs(NamedTuple):
    """What iterations of a replica take and bring."""

    budget: int  # tokens of an iteration
    table_s: FloatArray  # seconds by new tokens, as in World.token_time
    slopes: FloatArray  # as in World.coefficients
    kept_tokens: FloatArray  # that a decode sequence gets, by the number of its drafts
    fewest_drafts: int  # the most are those of kept_tokens
    draft_s: float  # of drafting the most


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
        tokens: of the chunks that are in the iteration already, and drafts; likewise the chunks' ``pairs`` and
            ``context``.
        pairs: (query, key) pairs.
        context: tokens computed before.
        num_chunks: their number.
        num_decode: decode sequences.
        decode_context: KV tokens that those read.
        table_s: as in Costs.
        slopes: likewise.
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
def drafting_s(drafts: int, num_decode: int, costs: Costs) -> float:
    """Time to draft so many tokens of each decode sequence, one after the other."""
    if drafts == 0 or num_decode == 0:
        return 0.0
    return float(costs.draft_s * drafts / (costs.kept_tokens.shape[0] - 1))


@shared_njit
def decode_s(drafts: int, num_decode: int, context: int, costs: Costs) -> float:
    """Seconds of an iteration without prompts; ``context`` are the KV tokens of those that decode."""
    verified = num_decode * (1 + drafts)
    read_s = costs.slopes[1] * num_decode + costs.slopes[0] * (context + verified)
    return float(costs.table_s[verified] + read_s + drafting_s(drafts, num_decode, costs))


@shared_njit
def room_within(limit_s: float, drafts: int, num_decode: int, context: int, costs: Costs) -> int:
    """Tokens of a prompt that an iteration of this length has room for; other arguments as for `prompt_s`."""
    verified = num_decode * (1 + drafts)
    if verified >= costs.budget:
        return 0
    return largest_chunk(
        limit_s - drafting_s(drafts, num_decode, costs), costs.budget - verified, 0, verified - num_decode, 0.0, 0, 0,
        num_decode, context + verified, costs.table_s, costs.slopes,
    )  # fmt: skip


@shared_njit
def mixed_s(chunk: int, drafts: int, num_decode: int, context: int, costs: Costs) -> float:
    """Seconds of an iteration with so many tokens of a prompt."""
    slopes = costs.slopes
    verified = num_decode * (1 + drafts)
    time_s = costs.table_s[verified + chunk] + (slopes[1] + slopes[6]) * num_decode
    time_s += (slopes[0] + slopes[5]) * (context + verified) + slopes[2] * (0.5 * chunk * chunk) + slopes[4]
    return float(time_s + drafting_s(drafts, num_decode, costs))


@shared_njit
def prompt_s(
    left: int, first_s: float, period_s: float, num_decode: int, context: int, costs: Costs
) -> tuple[int, int, float]:
    """How a prompt is computed the soonest while the decodes keep their pace.

    Args:
        left: its tokens.
        first_s: how long the first iteration may last. Whoever has just begun to decode has no slack: its next token is
            due after one TPOT, whatever number of tokens comes with it.
        period_s: the tightest TPOT of those that decode; inf without any.
        num_decode: how many decode.
        context: their KV tokens.
        costs: of iterations.

    Returns:
        (drafts of each decode sequence, tokens of the prompt in a later iteration, seconds; inf if it cannot be).
    """
    best, best_chunk, best_s = costs.fewest_drafts, 0, math.inf
    for drafts in range(costs.fewest_drafts, costs.kept_tokens.shape[0]):
        later_s = costs.kept_tokens[drafts] * period_s
        first, time_s = 0, 0.0
        if first_s != later_s:
            first = room_within(first_s, drafts, num_decode, context, costs)
            time_s = mixed_s(first, drafts, num_decode, context, costs)
            if first == 0:  # it takes longer than it may
                later_s = min(later_s, first_s - time_s + later_s)
        chunk = room_within(later_s, drafts, num_decode, context, costs)
        if first >= left:
            time_s = left * (time_s / first)
        elif chunk > 0:
            time_s += (left - first) * (mixed_s(chunk, drafts, num_decode, context, costs) / chunk)
        else:
            time_s = math.inf
        if time_s < best_s:
            best, best_chunk, best_s = drafts, chunk, time_s
        if num_decode == 0:
            break
    return best, best_chunk, best_s


@shared_njit
def most_room(period_s: float, num_decode: int, context: int, costs: Costs) -> tuple[int, int]:
    """Drafts with which iterations have the most room for prompts per TPOT, and how much; see `prompt_s`."""
    best, most = costs.fewest_drafts, 0
    for drafts in range(costs.fewest_drafts, costs.kept_tokens.shape[0]):
        chunk = room_within(costs.kept_tokens[drafts] * period_s, drafts, num_decode, context, costs)
        if chunk * costs.kept_tokens[best] > most * costs.kept_tokens[drafts]:
            best, most = drafts, chunk
    return best, most


@shared_njit
def most_output(num_decode: int, context: int, costs: Costs) -> int:
    """Number of drafts with which iterations without prompts bring the most tokens per second.

    With more ``context`` it is never less: what reading it takes is shared by what is kept.
    """
    best = costs.fewest_drafts
    best_s = decode_s(best, num_decode, context, costs)
    for drafts in range(best + 1, costs.kept_tokens.shape[0]):
        time_s = decode_s(drafts, num_decode, context, costs)
        if costs.kept_tokens[drafts] * best_s > costs.kept_tokens[best] * time_s:
            best, best_s = drafts, time_s
    return best


@shared_njit
def prompt_end_s(
    start_s: float, left: int, done: int, period_s: float, num_decode: int, context: int, costs: Costs
) -> float:
    """When a prompt is computed that has all that iterations of a TPOT have room for; inf if they have none.

    Args:
        start_s: when the prompt before it is computed.
        left: its tokens to compute.
        done: its tokens that are computed.
        period_s: as for `prompt_s`, like the others; the prompt before it has just begun to decode.
        num_decode: likewise.
        context: likewise.
        costs: likewise.
    """
    _, chunk, time_s = prompt_s(left, period_s, period_s, num_decode, context, costs)
    if time_s == math.inf:
        return math.inf
    slopes = costs.slopes
    earlier = done + 0.5 * max(left - chunk, 0)  # tokens that its chunks read back, on average
    return float(start_s + time_s + (slopes[2] * left * earlier + slopes[3] * earlier))


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
    periods_s: FloatArray, costs: Costs, labels: PlanLabels,
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
        periods_s: TPOTs in ascending order, the last of them inf.
        costs: of iterations.
        labels: for its work.

    Returns:
        Bit k is set if the k-th candidate is accepted. Of the largest sets, the one that is computed first.
    """
    release_broken_promises(prompts, num_prompts, now_s, num_decode, context, tier, periods_s, costs)
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
                        num_decode + num_kept + number, before, costs,
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
                keeps_pace = paces(num_decode + num_kept + number, after, periods_s[behind], costs)
                sooner = best == 0 or labels.time_s[number, behind, k] < best_s
                if keeps_pace and after <= most_context and sooner:
                    best_s = labels.time_s[number, behind, k]
                    best = labels.chosen[number, behind, k]
        if best > 0:
            return best
    return 0


@shared_njit
def paces(num_decode: int, context: int, period_s: float, costs: Costs) -> bool:
    """Whether so many sequences can decode at a TPOT, with drafts or without; arguments as for `prompt_s`."""
    for drafts in range(costs.fewest_drafts, costs.kept_tokens.shape[0]):
        if num_decode * (1 + drafts) > costs.budget:
            return False
        if decode_s(drafts, num_decode, context, costs) <= costs.kept_tokens[drafts] * period_s:
            return True
    return False


@njit
def release_broken_promises(
    prompts: RecordArray, num_prompts: int, now_s: float, num_decode: int, context: int, tier: int,
    periods_s: FloatArray, costs: Costs,
) -> None:  # fmt: skip
    """Take the deadline from kept prompts that will miss it anyhow; arguments as for `choose_prompts`."""
    time_s = now_s
    for i in range(num_prompts):
        prompt = prompts[i]
        if prompt.kept:
            time_s = prompt_end_s(
                time_s, prompt.left_tokens, prompt.done_tokens, periods_s[tier], num_decode, context, costs
            )
            if time_s > prompt.deadline_s:
                prompt.deadline_s = math.inf
            num_decode += 1
            context += prompt.done_tokens + prompt.left_tokens
            tier = min(tier, prompt.tier)
