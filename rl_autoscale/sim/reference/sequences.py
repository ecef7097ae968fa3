"""What every scheduler works with: the running and waiting sequences of one engine, its KV blocks, and one iteration.

Reference: vllm 0.33.0, v1/core/sched/scheduler.py (`_preempt_request`, `update_from_output`) and
v1/core/kv_cache_manager.py (`allocate_slots`), without pipeline parallelism.

Speculative decoding: a decode sequence computes its next token and the drafts, and the budget of the iteration counts
all of them. What is accepted is not drawn but the average: every sequence earns ``kept_tokens``, has the whole ones and
carries the fraction over. Drafts that are not accepted take no KV blocks here.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from rl_autoscale.fleet.pool import RANKED_SCHEDULERS, PoolSpec
from rl_autoscale.fleet.profile import LatencyProfile
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
        num_stalled: decode sequences of the batch that stand still in it.
        move_s: time in which KV blocks are moved between GPU and host, beside the computation.
    """

    decodes: tuple[Request, ...]
    chunks: tuple[tuple[Request, int], ...]
    num_preempted: int
    num_drafts: int = 0
    earned_tokens: float = 1.0
    draft_s: float = 0.0
    num_stalled: int = 0
    move_s: float = 0.0

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


class Sequences:
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
        self.parked: list[Request] = []  # finished; they keep sequence and blocks until post-processing has room
        self.declined: list[Request] = []  # slos-serve: another replica is offered them before anything else happens
        self.most_tries = 0  # replicas that may decline a request
        self.planned_s = 0.0  # when the scheduler was last asked
        self.next_look_s = 0.0  # fastserve: when it looks for starved requests again
        self.moved_blocks = 0  # between GPU and host, before the next iteration
        self.num_drafts = pool.verified_tokens - 1  # of each decode sequence in an iteration; slos-serve chooses
        self.num_iterations = 0  # in which the decode sequences, if there were any, did not stand still
        self.next_look = 0  # andes: the number of iterations after which it chooses again
        self.now_s = 0.0  # when an iteration ended, or the scheduler was asked
        self.kv = KvBlocks(pool.num_kv_blocks, pool.prefix_caching, self.books)

    @property
    def used_blocks(self) -> int:
        """KV blocks in use."""
        if self.pool.kv_allocation == "contiguous":
            return self.num_reserved
        return self.kv.num_used

    @property
    def num_reserved(self) -> int:
        """KV blocks of the longest that the running sequences may become."""
        return sum(self.most_blocks(request) for request in self.running)

    def most_blocks(self, request: Request) -> int:
        """KV blocks of the longest sequence that a request may become, as its class allows, drafts included."""
        most_tokens = request.prompt_tokens + (request.service_class.max_output_tokens or 0)
        return blocks_for(most_tokens + self.pool.verified_tokens - 1)

    def held_blocks(self, request: Request) -> int:
        """KV blocks that a running sequence keeps from others."""
        contiguous = self.pool.kv_allocation == "contiguous"
        return self.most_blocks(request) if contiguous else len(request.block_table)

    @property
    def virtual_blocks(self) -> int:
        """KV blocks in use, and those that waiting sequences need to be admitted beside what they have kept."""
        contiguous = self.pool.kv_allocation == "contiguous"
        return self.used_blocks + sum(
            self.most_blocks(request) if contiguous else blocks_for(request.num_tokens) - len(request.block_table)
            for request in self.waiting
        )

    def enqueue(self, request: Request, *, front: bool = False) -> None:
        """Put a request into the waiting queue: sorted where it has ranks, else at its end."""
        if self.ranked:
            insort(self.waiting, request, key=lambda waiting: waiting.order)
        else:
            self.waiting.insert(0 if front else len(self.waiting), request)

    def iteration(self, scheduled: dict[Request, int], num_preempted: int) -> Iteration | None:
        """The iteration in which these sequences compute so many tokens each; None without any."""
        if not scheduled:
            return None
        return Iteration(
            tuple(request for request in scheduled if request.decoding),
            tuple((request, tokens) for request, tokens in scheduled.items() if not request.decoding),
            num_preempted,
            self.num_drafts,
            self.pool.kept_tokens[self.num_drafts],
            self.draft_s,
        )

    @property
    def draft_s(self) -> float:
        """Time to draft the next iteration's tokens, one after the other."""
        most = self.pool.verified_tokens - 1
        return self.pool.draft_s * self.num_drafts / most if self.num_drafts > 0 else 0.0

    def tokens_to_compute(self, request: Request) -> int:
        """A decode sequence's next token and its drafts, or what is left of a prompt."""
        return self.pool.verified_tokens if request.decoding else request.num_tokens - request.computed_tokens

    def computed_after(self, request: Request, tokens: int) -> int:
        """Tokens that a request has in the KV cache after an iteration that computes so many."""
        kept = request.tokens_after(self.pool.kept_tokens[self.num_drafts]) if request.decoding else tokens
        return request.computed_tokens + kept

    def complete(self, iteration: Iteration) -> list[Request]:
        """Book the computed tokens of an iteration that has ended.

        Returns:
            The sequences that got new tokens: decodes by index, then prompts in the order of admission.
        """
        self.num_iterations += iteration.num_stalled == 0
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
            if request.has_begun:  # and was interrupted
                request.read_from_s = self.now_s
                request.read_until(request.generated_tokens, self.now_s)
        return sorted(iteration.decodes, key=lambda request: request.index) + caught_up

    def _generate(self, request: Request, tokens: int) -> None:
        """Hand out tokens; what goes beyond the last one is thrown away."""
        new_tokens = min(tokens, request.output_tokens - request.generated_tokens)
        request.generated_tokens += new_tokens
        self.books.generation_tokens += new_tokens

    def interrupt(self, request: Request) -> None:
        """A stream's tokens stop to come evenly."""
        if request.decoding:
            request.read_until(request.generated_tokens, self.now_s)

    def remove(self, request: Request) -> None:
        """Take a request out, finished or not: its KV is lost, but for what the prefix cache keeps."""
        for requests in (self.running, self.waiting, self.parked):
            if request in requests:
                requests.remove(request)
        self.kv.free(request)
        request.computed_tokens = 0
        request.token_fraction = 0.0
        request.on_host = False
        request.decoding = False

    def swap_out(self, request: Request) -> None:
        """A decode sequence leaves, and its KV cache goes to host memory."""
        self.interrupt(request)
        self.running.remove(request)
        self.count_moves(len(request.block_table))
        self.kv.free(request)
        request.token_fraction = 0.0
        request.on_host = True
        request.decoding = False

    def count_moves(self, num_blocks: int) -> None:
        """Blocks are moved between GPU and host."""
        self.moved_blocks += num_blocks
        self.books.moved_blocks += num_blocks

    def park(self, request: Request) -> None:
        """A finished sequence must wait: it computes nothing more, but keeps its place in the batch and its blocks."""
        self.running.remove(request)
        self.parked.append(request)

    def hold(self, request: Request) -> None:
        """A computed prompt waits for its transfer: it leaves the batch, but its blocks are taken until `send_off`."""
        self.running.remove(request)

    def send_off(self, request: Request) -> None:
        """The KV of a computed prompt is elsewhere now: free its blocks, keep what is known of it."""
        self.count_release(request)
        self.kv.free(request)
        request.decoding = False

    def count_release(self, request: Request) -> None:
        """Book what a request holds that is about to leave for good."""
        self.books.released_tokens += request.computed_tokens
        self.books.released_blocks += self.held_blocks(request)

    def preempt(self, victim: Request) -> None:
        """Send a running sequence back to the front of the waiting queue; it keeps its tokens, not their KV."""
        self.interrupt(victim)
        self.remove(victim)
        victim.num_preemptions += 1
        self.books.preemptions += 1
        self.enqueue(victim, front=True)

    @property
    def ranked(self) -> bool:
        """Whether the waiting queue is sorted."""
        return self.pool.scheduler in RANKED_SCHEDULERS
