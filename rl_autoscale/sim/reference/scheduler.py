"""vLLM V1's scheduler inside one replica: which sequences run in the next iteration, and with how many tokens each.

Reference: vllm 0.33.0, v1/core/sched/scheduler.py (`Scheduler.schedule`, `_preempt_request`, `update_from_output`) and
v1/core/kv_cache_manager.py (`allocate_slots`), without pipeline parallelism.

Speculative decoding: a decode sequence computes its next token and the drafts, and the budget of the iteration counts
all of them. What is accepted is not drawn but the average: every sequence earns ``tokens_per_iteration``, has the whole
ones and carries the fraction over. Drafts that are not accepted take no KV blocks here.

Two deviations, both only under priority scheduling, where the victim may stand before the sequence that needs its
blocks: a sequence that preempts itself does not make those behind it pause for an iteration, and a prompt chunk uses
the token budget that a victim gives back. And one that only prefix caching can tell: blocks are handed out when it is
settled who goes on, so what victims leave behind is in the queue of free blocks before the first is taken.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS, LatencyProfile
from rl_autoscale.fleet.spec import PoolSpec
from rl_autoscale.sim.reference.books import PoolBooks
from rl_autoscale.sim.reference.kv_blocks import KvBlocks
from rl_autoscale.sim.reference.request import Request, blocks_for


@dataclass(frozen=True, slots=True)
class Iteration:
    """One forward pass: the new tokens of each sequence in it.

    Attributes:
        decodes: sequences that compute one token each.
        chunks: (sequence, prompt tokens) pairs.
        num_preempted: sequences that lost their KV so that these could go on.
        num_drafts: draft tokens that each decode sequence verifies.
        earned_tokens: that each decode sequence gets, on average.
        draft_s: time to draft; only with decode sequences.
    """

    decodes: tuple[Request, ...]
    chunks: tuple[tuple[Request, int], ...]
    num_preempted: int
    num_drafts: int = 0
    earned_tokens: float = 1.0
    draft_s: float = 0.0

    def duration_s(self, profile: LatencyProfile) -> float:
        """Seconds by the latency profile; a decode sequence reads its whole context and the tokens it computes."""
        new_tokens = 1 + self.num_drafts
        return (self.draft_s if self.decodes else 0.0) + profile.iteration_s(
            num_decode=len(self.decodes),
            decode_context_tokens=sum(
                request.computed_tokens + request.token_fraction + new_tokens for request in self.decodes
            ),
            num_drafts=self.num_drafts * len(self.decodes),
            chunks=tuple((tokens, request.computed_tokens) for request, tokens in self.chunks),
        )


class Scheduler:
    """Running and waiting sequences of one engine and its KV blocks.

    Args:
        pool: engine settings.
        books: the pool's; by default its own.
    """

    def __init__(self, pool: PoolSpec, books: PoolBooks | None = None) -> None:
        self.pool = pool
        self.books = PoolBooks() if books is None else books
        self.running: list[Request] = []  # in the order of admission
        self.waiting: list[Request] = []
        self.kv = KvBlocks(pool.num_kv_blocks, pool.prefix_caching, self.books)

    @property
    def used_blocks(self) -> int:
        """KV blocks in use."""
        return self.kv.num_used

    def add(self, request: Request) -> None:
        """A request arrives at the engine."""
        if self.pool.scheduler == "priority":
            insort(self.waiting, request, key=_urgency)
        else:
            self.waiting.append(request)

    def schedule(self, now_s: float) -> Iteration | None:
        """Decide the next iteration: running sequences first, then the waiting queue; None with nothing to run."""
        scheduled, num_preempted = self._schedule_running()
        if num_preempted == 0:
            self._admit_waiting(scheduled, now_s)
        if not scheduled:
            return None
        return Iteration(
            tuple(request for request in scheduled if request.decoding),
            tuple((request, tokens) for request, tokens in scheduled.items() if not request.decoding),
            num_preempted,
            self.pool.verified_tokens - 1,
            self.pool.tokens_per_iteration,
            self.pool.draft_s,
        )

    def _schedule_running(self) -> tuple[dict[Request, int], int]:
        """Give every running sequence its tokens and blocks; when blocks run out, preempt."""
        scheduled: dict[Request, int] = {}
        promised: dict[Request, int] = {}
        num_preempted = 0
        for request in list(self.running):
            while request in self.running:
                budget = self.pool.token_budget - sum(scheduled.values())
                tokens = min(self._tokens_to_compute(request), budget)
                blocks = blocks_for(self._computed_after(request, tokens)) - len(request.block_table)
                if sum(promised.values()) + blocks <= self.kv.num_free:
                    scheduled[request], promised[request] = tokens, blocks
                    break
                victim = self._victim()
                self._preempt(victim)
                scheduled.pop(victim, None)
                promised.pop(victim, None)
                num_preempted += 1
        for request, tokens in scheduled.items():
            self.kv.extend(request, self._computed_after(request, tokens))
        return scheduled, num_preempted

    def _tokens_to_compute(self, request: Request) -> int:
        """A decode sequence's next token and its drafts, or what is left of a prompt."""
        return self.pool.verified_tokens if request.decoding else request.num_tokens - request.computed_tokens

    def _computed_after(self, request: Request, tokens: int) -> int:
        """Tokens that a request has in the KV cache after an iteration that computes so many."""
        kept = request.tokens_after(self.pool.tokens_per_iteration) if request.decoding else tokens
        return request.computed_tokens + kept

    def _admit_waiting(self, scheduled: dict[Request, int], now_s: float) -> None:
        """Admit from the head of the waiting queue while budget, batch and blocks last."""
        budget = self.pool.token_budget - sum(scheduled.values())
        while self.waiting and budget > 0 and len(self.running) < self.pool.batch_limit:
            request = self.waiting[0]
            hit = self.kv.longest_hit(request)
            num_idle = sum(block.num_users == 0 for block in hit)
            if blocks_for(request.num_tokens) - len(hit) + num_idle > self.kv.num_free:  # scheduler_reserve_full_isl
                break
            self.kv.reuse(request, hit)
            request.computed_tokens = len(hit) * BLOCK_SIZE_TOKENS
            self._count_lookup(request)
            tokens = min(request.num_tokens - request.computed_tokens, budget)
            self.kv.extend(request, request.computed_tokens + tokens)
            self.running.append(self.waiting.pop(0))
            scheduled[request] = tokens
            budget -= tokens
            if not request.scheduled_s >= 0.0:
                request.scheduled_s = now_s

    def _count_lookup(self, request: Request) -> None:
        """Book a look into the prefix cache; as in vLLM, requests that were preempted are not counted."""
        if self.pool.prefix_caching and request.num_preemptions == 0:
            self.books.prefix_queried_tokens += request.num_tokens
            self.books.prefix_hit_tokens += request.computed_tokens

    def complete(self, iteration: Iteration) -> list[Request]:
        """Book the computed tokens of an iteration that has ended.

        Returns:
            The sequences that got new tokens: decodes by index, then prompts in the order of admission.
        """
        for request in iteration.decodes:
            new_tokens = request.tokens_after(iteration.earned_tokens)
            request.token_fraction += iteration.earned_tokens - new_tokens
            request.computed_tokens += new_tokens
            self._generate(request, new_tokens)
        for request, tokens in iteration.chunks:
            request.computed_tokens += tokens
        caught_up = [request for request, _ in iteration.chunks if request.computed_tokens == request.num_tokens]
        for request in caught_up:
            self._generate(request, 1)
            request.decoding = True
        return sorted(iteration.decodes, key=lambda request: request.index) + caught_up

    def _generate(self, request: Request, tokens: int) -> None:
        """Hand out tokens; what goes beyond the last one is thrown away."""
        new_tokens = min(tokens, request.output_tokens - request.generated_tokens)
        request.generated_tokens += new_tokens
        self.books.generation_tokens += new_tokens

    def remove(self, request: Request) -> None:
        """Take a request out, finished or not: its KV is lost, but for what the prefix cache keeps."""
        (self.running if request in self.running else self.waiting).remove(request)
        self.kv.free(request)
        request.computed_tokens = 0
        request.token_fraction = 0.0
        request.decoding = False

    def _victim(self) -> Request:
        """The sequence to preempt: the last admitted, or under priority scheduling the least urgent."""
        return max(self.running, key=_urgency) if self.pool.scheduler == "priority" else self.running[-1]

    def _preempt(self, victim: Request) -> None:
        """Send a running sequence back to the front of the waiting queue; it keeps its tokens, not their KV."""
        self.remove(victim)
        victim.num_preemptions += 1
        if self.pool.scheduler == "priority":
            insort(self.waiting, victim, key=_urgency)
        else:
            self.waiting.insert(0, victim)


def _urgency(request: Request) -> tuple[int, int]:
    """Sort key of priority scheduling: lower priority first, then the earlier arrival."""
    return request.service_class.priority, request.index
