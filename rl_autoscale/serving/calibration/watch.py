"""Iterations of a server in use, out of its own counters: nothing is sent to it but looks at its metrics page.

Counters add up what many requests did at once, so most moments tell nothing about one iteration. Some do:

- *Decode*: between two looks nobody began, nobody ended and nobody was about to begin. Then one batch of known size
  decoded all the while, and the mean gap between tokens is the mean length of its iterations.
- *Prompt*: between two looks exactly one request ended. Then the growth of the sums is that request's prompt, prefill
  time and decode time; the last of them leads back to when its prompt was computed. If no other prompt came to its
  first token around then, its prefill time is one iteration's: this prompt beside the batch that ran.

What these cannot show: two prompts in one iteration, prompts longer than the token budget (their later chunks), batches
and lengths that the traffic does not have, and start-up. KV blocks that requests share are counted once by the engine,
so contexts come out too short where prompts share long prefixes.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.serving.calibration.server import CalibratedServer, Look, Row, iteration_row

_MAX_FAILURES_IN_ROW = 5


@dataclass(frozen=True, slots=True)
class Seen:
    """A look and when it was taken, monotonic seconds."""

    at_s: float
    look: Look


async def watch(
    server: CalibratedServer, watch_s: float, every_s: float, progress: Callable[[float], None] | None = None
) -> list[Seen]:
    """Look for a while; a look that fails is left out.

    Args:
        server: only looked at.
        watch_s: for how long.
        every_s: from one look to the next.
        progress: told the seconds that have passed.

    Raises:
        SpecError: several looks in a row failed.
    """
    clock = asyncio.get_running_loop().time
    began_s = clock()
    seen: list[Seen] = []
    num_failed = 0
    while (passed_s := clock() - began_s) < watch_s:
        try:
            seen.append(Seen(clock(), await server.look()))
            num_failed = 0
        except SpecError:
            num_failed += 1
            if num_failed >= _MAX_FAILURES_IN_ROW or not seen:
                raise
        if progress is not None:
            progress(passed_s)
        await asyncio.sleep(max(every_s - (clock() - began_s - passed_s), 0.0))
    return seen


def watched_rows(seen: Sequence[Seen], max_num_batched_tokens: int) -> list[Row]:
    """The moments that tell of one iteration, as rows for the fit.

    Args:
        seen: looks in the order of time.
        max_num_batched_tokens: token budget; longer prompts are left out.

    Raises:
        SpecError: the server does not say how large its KV cache is.
    """
    if seen and not (seen[0].look.kv_blocks and seen[0].look.block_tokens):
        raise SpecError("the server does not say how many KV blocks it has, so contexts cannot be told")
    looks = [item.look for item in seen]
    rows = [_decode_row(*looks[i : i + 3]) for i in range(len(looks) - 2)]
    rows += [_prompt_row(seen, i, max_num_batched_tokens) for i in range(len(looks) - 1)]
    return [row for row in rows if row is not None]


def _decode_row(before: Look, after: Look, later: Look) -> Row | None:
    """The batch between the first two looks; the third tells whether a prompt was being computed beside it."""
    batch, gaps = before.running, after.itl.since(before.itl)
    same = (
        batch == after.running
        and before.first_tokens == after.first_tokens == later.first_tokens
        and before.prefill.count == after.prefill.count
        and before.preemptions == after.preemptions
    )
    if not same or batch == 0 or gaps.count < batch:
        return None
    context = (_context(before, batch) + _context(after, batch)) / 2.0
    return iteration_row(num_decode=batch, context=context, time_s=gaps.mean)


def _prompt_row(seen: Sequence[Seen], i: int, budget: int) -> Row | None:
    """The prompt of the one request that ended between look ``i`` and the next."""
    before, after = seen[i].look, seen[i + 1].look
    prefill, decode = after.prefill.since(before.prefill), after.decode.since(before.decode)
    computed, prompt = after.computed.since(before.computed), after.prompts.since(before.prompts)
    if prefill.count != 1 or prefill.sum <= 0 or computed.sum < 1:
        return None
    blur_s = (seen[i + 1].at_s - seen[i].at_s) / 2.0
    first_s = (seen[i].at_s + seen[i + 1].at_s) / 2.0 - decode.sum
    moment = first_s - prefill.sum - blur_s, first_s + blur_s
    start = bisect_right(seen, moment[0], key=lambda item: item.at_s) - 1
    end = bisect_left(seen, moment[1], key=lambda item: item.at_s)
    if start < 0 or end >= len(seen):
        return None
    began, ended = seen[start].look, seen[end].look
    riders = began.running, ended.running - (0 if end > i else 1)  # it still runs at the end unless it was so short
    batch = round(sum(riders) / 2.0)
    alone = ended.first_tokens - began.first_tokens == 1 and began.preemptions == ended.preemptions
    if not alone or began.waiting or abs(riders[0] - riders[1]) > 1 or computed.sum + batch > budget:
        return None
    return iteration_row(
        chunk=computed.sum,
        chunk_context=max(prompt.sum - computed.sum, 0.0),
        num_decode=batch,
        context=_context(began, began.running) if batch and began.running else 0.0,
        time_s=prefill.sum,
    )


def _context(look: Look, batch: int) -> float:
    """Mean tokens that a sequence reads: its share of the blocks in use, the last of which is half full on average."""
    assert look.kv_blocks is not None
    assert look.block_tokens is not None
    used_tokens = look.kv_usage * look.kv_blocks * BLOCK_SIZE_TOKENS
    return max(used_tokens / batch - (look.block_tokens - 1) / 2.0, 1.0)
