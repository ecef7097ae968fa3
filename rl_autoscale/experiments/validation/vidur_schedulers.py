"""The two schedulers of Vidur's runs, in the reference's terms: they isolate what a scheduler's rules are worth.

Reference: microsoft/vidur 7d47513, vidur/scheduler/replica_scheduler/{sarathi,vllm}_replica_scheduler.py. Where they
differ from vLLM V1 (sim/reference/schedulers/vllm.py):

- a new request reserves the blocks of its whole prompt at once, and 1 % of all blocks must stay free after it;
- a decode sequence needs one free block in every iteration, even where its last block has room;
- new requests are admitted in the very iteration in which others were preempted;
- ``vllm`` (as of 2023) never mixes: prompts go first, whole, as long as their number times the longest fits the budget.
"""

from __future__ import annotations

from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.sim.reference.books import PoolBooks
from rl_autoscale.sim.reference.request import Request, blocks_for
from rl_autoscale.sim.reference.scheduler import Iteration, Scheduler

WATERMARK = 0.01
"""Share of the blocks that must stay free when a request is admitted."""


class VidurScheduler(Scheduler):
    """What both share: how blocks are taken and who is preempted.

    Args:
        pool: engine settings.
        books: the pool's.
    """

    def __init__(self, pool: PoolSpec, books: PoolBooks) -> None:
        super().__init__(pool, books)
        self._watermark_blocks = int(WATERMARK * pool.num_kv_blocks)

    def _may_admit(self, request: Request) -> bool:
        has_room = self.kv.num_free - blocks_for(request.num_tokens) >= self._watermark_blocks
        return has_room and len(self.running) < self.pool.batch_limit

    def _admit(self, request: Request, now_s: float) -> None:
        """Take the head of the waiting queue and the blocks of its whole prompt."""
        self.kv.extend(request, request.num_tokens)
        self.running.append(self.waiting.pop(0))
        if not request.scheduled_s >= 0.0:
            request.scheduled_s = now_s

    def _schedule_decodes(self) -> tuple[list[Request], list[Request], int]:
        """(decode sequences, prompts under way, how many were preempted), oldest first; the youngest is the victim."""
        in_turn = sorted(self.running, key=lambda request: request.index)
        decodes: list[Request] = []
        under_way: list[Request] = []
        num_preempted = 0
        while in_turn:
            request = in_turn.pop(0)
            if not request.decoding:
                under_way.append(request)
                continue
            while self.kv.num_free < 1:
                victim = in_turn.pop() if in_turn else request
                self.preempt(victim)
                num_preempted += 1
                if victim is request:
                    break
            else:
                self.kv.extend(request, request.computed_tokens + 1)
                decodes.append(request)
        return decodes, under_way, num_preempted


class SarathiScheduler(VidurScheduler):
    """Chunked prefill: decodes, then prompts under way, then new ones, while the token budget lasts."""

    def schedule(self, now_s: float) -> Iteration | None:
        """Decide the next iteration; None with nothing to run."""
        decodes, under_way, num_preempted = self._schedule_decodes()
        budget = self.pool.token_budget - len(decodes)
        chunks: list[tuple[Request, int]] = []
        for request in under_way:
            if budget > 0:
                chunks.append((request, min(request.num_tokens - request.computed_tokens, budget)))
                budget -= chunks[-1][1]
        while self.waiting and budget > 0 and self._may_admit(self.waiting[0]):
            request = self.waiting[0]
            self._admit(request, now_s)
            chunks.append((request, min(request.num_tokens, budget)))
            budget -= chunks[-1][1]
        return Iteration(tuple(decodes), tuple(chunks), num_preempted) if decodes or chunks else None


class PrefillFirstScheduler(VidurScheduler):
    """vLLM as of 2023: whole prompts alone whenever one can be admitted, decodes otherwise."""

    def schedule(self, now_s: float) -> Iteration | None:
        """Decide the next iteration; None with nothing to run."""
        chunks: list[tuple[Request, int]] = []
        longest = 0
        while self.waiting and self._may_admit(self.waiting[0]):
            request = self.waiting[0]
            longest = max(longest, request.num_tokens)
            if (len(chunks) + 1) * longest > self.pool.token_budget:
                break
            self._admit(request, now_s)
            chunks.append((request, request.num_tokens))
        if chunks:
            return Iteration((), tuple(chunks), 0)
        decodes, _, num_preempted = self._schedule_decodes()
        return Iteration(tuple(decodes), (), num_preempted) if decodes else None
