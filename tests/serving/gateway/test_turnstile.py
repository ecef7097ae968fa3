"""Between two turns of the turnstile the event loop looks for what is new."""

from __future__ import annotations

import asyncio
from itertools import groupby

from rl_autoscale.serving.gateway.turnstile import Turnstile

LOOK = -1


async def pass_with_looks(numbers: list[int], cancelled: set[int], width: int) -> list[int]:
    """Who passed when; LOOK wherever the loop came round."""
    loop, turnstile, seen = asyncio.get_running_loop(), Turnstile(width), []
    going_on = True

    def look() -> None:
        seen.append(LOOK)
        if going_on:
            loop.call_soon(look)

    async def token(number: int) -> None:
        await turnstile.turn()
        seen.append(number)

    look()
    tasks = {number: asyncio.create_task(token(number)) for number in numbers}
    await asyncio.sleep(0)
    for number in cancelled:
        tasks[number].cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    going_on = False
    return seen


def runs(seen: list[int]) -> list[list[int]]:
    """What passed between two looks."""
    return [list(group) for is_look, group in groupby(seen, lambda item: item == LOOK) if not is_look]


def test_a_batch_passes_in_order_and_a_few_at_a_time() -> None:
    seen = asyncio.run(pass_with_looks(list(range(11)), set(), width=3))
    assert runs(seen) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]


def test_whoever_is_cancelled_takes_nobodys_place() -> None:
    seen = asyncio.run(pass_with_looks(list(range(9)), {3, 4, 7}, width=3))
    assert runs(seen) == [[0, 1, 2], [5, 6, 8]]


def test_alone_one_passes_at_once() -> None:
    async def alone() -> bool:
        turnstile = Turnstile(1)
        for _ in range(3):
            await asyncio.sleep(0)
            task = asyncio.ensure_future(turnstile.turn())
            await asyncio.sleep(0)
            if not task.done():
                return False
            await asyncio.sleep(0)
        return True

    assert asyncio.run(alone())
