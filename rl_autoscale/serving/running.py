"""Run a server until SIGTERM or SIGINT, on uvloop where it is installed."""

from __future__ import annotations

import asyncio
import gc
import importlib
import signal
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

Server = TypeVar("Server")


async def serve_until_signal(
    server: AbstractAsyncContextManager[Server],
    on_ready: Callable[[Server], None],
    on_signal: Callable[[Server], Awaitable[object]],
) -> None:
    """Enter a server, wait for a signal, let it drain; a second signal, or one before it is ready, ends it at once.

    Args:
        server: listens while it is entered.
        on_ready: called once it listens.
        on_signal: drains it.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    task = asyncio.current_task()
    assert task is not None

    def on_any_signal() -> None:
        if not entered or stop.is_set():
            task.cancel()
        stop.set()

    entered = False
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_any_signal)
    async with server as running:
        entered = True
        gc.collect()
        gc.freeze()  # imported code is looked through no more; with the compiler in it that is a long pause
        on_ready(running)
        await stop.wait()
        await on_signal(running)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run to the end; cancelled by a signal counts as an end."""
    try:
        loop_factory = importlib.import_module("uvloop").new_event_loop
    except ImportError:
        loop_factory = None
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        try:
            runner.run(main)
        except asyncio.CancelledError:
            return
