"""The designed load: what is sent, what the server's clocks said, one row per point.

Rows have the columns of docs/profiles.md (``prefill_chunk_tokens``, ..., ``iter_time_ms``), so what is measured here
and what a user measured otherwise are fitted by the same code.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.serving.calibration.server import CalibratedServer, Look, Row, iteration_row

Progress = Callable[[str, int, int], None]
"""Told what is measured, points done and in all."""

SETTLED_TOKENS = 3
"""Every sequence of a batch has so many tokens before the batch is measured: its prompts are over."""
_LOOK_S = 0.002
_IDLE_LOOKS, _IDLE_WAIT_S = 50, 0.1
_FIRST_ID, _LAST_ID = 100, 400
"""Token ids that every vocabulary has, past most special tokens."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be sent.

    Attributes:
        max_num_seqs: of the engine.
        max_num_batched_tokens: of the engine.
        max_model_len: prompt and output together.
        kv_tokens: of the KV cache.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        repeats: requests per prompt length and mixed point.
        tokens: decode iterations per decode point.
        prompts: prompt lengths, as far as they fit; best where the fit may put its knots.
        max_chunks: longest prompt, in token budgets; what a chunk adds tells how much its context costs.
        max_batch: largest decode batch.
        contexts: prompt lengths of decode batches.
    """

    prompts: tuple[int, ...]
    repeats: int = 4
    tokens: int = 24
    max_chunks: int = 3
    max_batch: int = 64
    contexts: tuple[int, ...] = (64, 1024)


def prompt_lengths(limits: Limits, plan: Plan) -> list[int]:
    """The plan's prompts that are one chunk, and the longest such prompt."""
    longest = min(limits.max_num_batched_tokens, limits.max_model_len - 1)
    return sorted({length for length in plan.prompts if length < longest} | {longest})


def decode_points(limits: Limits, plan: Plan) -> list[tuple[int, int]]:
    """(batch, prompt) pairs that fit the engine, the context window and three quarters of the KV cache."""
    room = 8 * plan.tokens
    points = []
    for prompt in plan.contexts:
        batch = 1
        while batch <= min(limits.max_num_seqs - 1, plan.max_batch):
            fits = prompt + room <= limits.max_model_len and batch * (prompt + room) <= 0.75 * limits.kv_tokens
            points += [(batch, prompt)] if fits else []
            batch *= 2
    return points


@asynccontextmanager
async def _together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that raises the first error itself; one error ends all tasks."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


class Bench:
    """Measures one server.

    Args:
        server: idle but for us.
        limits: what may be sent.
        plan: how much is measured.
        rng: of the token ids; prompts differ, so that no prefix cache answers for the engine.
    """

    def __init__(self, server: CalibratedServer, limits: Limits, plan: Plan, rng: np.random.Generator) -> None:
        self._server = server
        self._limits = limits
        self._plan = plan
        self._rng = rng

    async def measure(self, progress: Progress | None = None) -> list[Row]:
        """All points.

        Raises:
            SpecError: the server refuses, or is used by somebody else.
        """
        lengths, batches = prompt_lengths(self._limits, self._plan), decode_points(self._limits, self._plan)
        if not batches:
            raise SpecError("no decode batch fits the server's context window and KV cache; nothing can be measured")
        total, rows = len(lengths) + len(batches), []
        await self._prefill(lengths[0])  # the first request of a server warms it up
        for done, length in enumerate(lengths):
            if progress is not None:
                progress(f"prompt of {length} tokens", done, total)
            rows.append(await self._prefill(length))
        rows += await self._later_chunks(rows[-1])
        for done, (batch, prompt) in enumerate(batches, start=len(lengths)):
            if progress is not None:
                progress(f"batch of {batch} at {prompt} tokens", done, total)
            rows += await self._decode(batch, prompt, lengths[done % len(lengths)])
        return rows

    async def _prefill(self, length: int) -> Row:
        before = await self._idle()
        for _ in range(self._plan.repeats):
            await self._whole(length)
        return iteration_row(chunk=length, time_s=self._prefill_s(before, await self._server.look()))

    async def _later_chunks(self, first: Row) -> list[Row]:
        """Prompts of two, three, ... full token budgets; each takes one iteration more than the one before."""
        budget = self._limits.max_num_batched_tokens
        before_ms, rows = first["iter_time_ms"], []
        for num_chunks in range(2, self._plan.max_chunks + 1):
            length = num_chunks * budget
            if length >= self._limits.max_model_len or length > 0.75 * self._limits.kv_tokens:
                break
            whole_ms = (await self._prefill(length))["iter_time_ms"]
            if whole_ms > before_ms:  # else noise; there is no such iteration
                added_s = (whole_ms - before_ms) / 1e3
                rows.append(iteration_row(chunk=budget, chunk_context=length - budget, time_s=added_s))
            before_ms = whole_ms
        return rows

    async def _decode(self, batch: int, prompt: int, beside: int) -> list[Row]:
        """A decode row, and one with a prompt beside the same batch."""
        start = await self._idle()
        room = self._limits.max_model_len - prompt
        max_tokens = min(room, int(0.9 * self._limits.kv_tokens / batch) - prompt, 100 * self._plan.tokens)
        async with self._batch(batch, prompt, max_tokens) as counts:
            first = await self._server.look()
            goal = min(counts) + self._plan.tokens
            while min(counts) < goal:
                await asyncio.sleep(_LOOK_S)
            second = await self._server.look()
            self._check_batch(batch, start, first, second)
            rows = [_decode_row(batch, prompt, start, first, second)]
            length = min(beside, self._limits.max_num_batched_tokens - batch, self._limits.max_model_len - 1)
            for _ in range(self._plan.repeats):
                await self._whole(length)
            third = await self._server.look()
            self._check_batch(batch, start, second, third)
            context = prompt + (second.generated + third.generated - 2 * start.generated) / (2.0 * batch)
            time_s = self._prefill_s(second, third)
            rows.append(iteration_row(chunk=length, num_decode=batch, context=context, time_s=time_s))
        return rows

    @asynccontextmanager
    async def _batch(self, size: int, prompt: int, max_tokens: int) -> AsyncIterator[list[int]]:
        """So many sequences that decode; counts of their tokens. They are taken back at the end."""
        counts = [0] * size

        async def one(place: int) -> None:
            async with aclosing(self._server.stream(self._prompt(prompt), max_tokens)) as tokens:  # type: ignore[type-var]
                async for new in tokens:
                    counts[place] += new
            raise SpecError(f"{max_tokens} tokens were over before the batch was measured; the server is too fast")

        async with _together() as group:
            tasks = [group.create_task(one(place)) for place in range(size)]
            while min(counts) < SETTLED_TOKENS:
                await asyncio.sleep(_LOOK_S)
            yield counts
            for task in tasks:
                task.cancel()

    async def _whole(self, length: int) -> None:
        async with aclosing(self._server.stream(self._prompt(length), 1)) as tokens:  # type: ignore[type-var]
            async for _ in tokens:
                pass

    async def _idle(self) -> Look:
        for _ in range(_IDLE_LOOKS):
            look = await self._server.look()
            if look.running + look.waiting == 0:
                return look
            await asyncio.sleep(_IDLE_WAIT_S)
        raise SpecError(
            f"the server has {look.running} running and {look.waiting} waiting requests of others; calibrate an idle "
            "replica"
        )

    def _prefill_s(self, before: Look, after: Look) -> float:
        found = after.prefill.since(before.prefill)
        if found.count != self._plan.repeats:
            raise SpecError(
                f"the server finished {found.count:g} requests where {self._plan.repeats} were sent; somebody else "
                "uses it, or it restarted: calibrate an idle replica"
            )
        return found.mean

    def _check_batch(self, batch: int, start: Look, first: Look, second: Look) -> None:
        if not first.running == second.running == batch or second.preemptions != start.preemptions:
            raise SpecError(
                f"{first.running} and then {second.running} sequences ran where {batch} were sent "
                f"({second.preemptions - start.preemptions:g} preempted); calibrate an idle replica, and check "
                "--max-num-seqs"
            )

    def _prompt(self, length: int) -> list[int]:
        ids: npt.NDArray[np.int64] = self._rng.integers(_FIRST_ID, _LAST_ID, length)
        return [int(token) for token in ids]

    async def random_load(self, arrival_s: list[float], prompts: list[int], outputs: list[int]) -> list[Served]:
        """Send requests at their times, whatever has become of those before, and stamp what comes back."""
        await self._idle()
        clock = asyncio.get_running_loop().time
        origin_s = clock()
        served: list[Served] = []

        async def one(at_s: float, prompt: int, output: int) -> None:
            ids = self._prompt(prompt)
            await asyncio.sleep(max(origin_s + at_s - clock(), 0.0))
            sent_s, first_s, end_s = clock(), 0.0, 0.0
            async with aclosing(self._server.stream(ids, output)) as tokens:  # type: ignore[type-var]
                async for _ in tokens:
                    end_s = clock()
                    first_s = first_s or end_s
            served.append(Served(prompt, output, sent_s - origin_s, first_s - origin_s, end_s - origin_s))

        async with _together() as group:
            for request in zip(arrival_s, prompts, outputs, strict=True):
                group.create_task(one(*request))
        return sorted(served, key=lambda item: item.arrival_s)


@dataclass(frozen=True, slots=True)
class Served:
    """One request as this client saw it; seconds since the load began."""

    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    first_token_s: float
    end_s: float


def _decode_row(batch: int, prompt: int, start: Look, first: Look, second: Look) -> Row:
    generated = (first.generated + second.generated - 2 * start.generated) / (2.0 * batch)
    return iteration_row(num_decode=batch, context=prompt + generated, time_s=second.itl.since(first.itl).mean)
