"""CPU time of the gateway per token and per request, on a machine that others use too.

    python benchmarks/gateway_cpu.py
    python benchmarks/gateway_cpu.py --against ../other-checkout      # the same of other code, in turn

This process plays the replica and the clients. Each token of a stream is sent when its client has the one before, so
that none is merged with another, however slow the machine; a request is one token, one after the other. What other
jobs do to caches and clocks only adds: of many short windows the least, the lower quartile and the median are given,
microseconds. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import yaml
from gateway_overhead import END, process, profile

CHOICE = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None, "stop_reason": None}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
WINDOW_REQUESTS, WINDOW_TOKENS, LOOK_S = 20, 500, 0.2


def chunk(**said: object) -> bytes:
    """One event as vLLM and its server write it."""
    body = {"id": "cmpl-8f2e1c3a9d7b4e5f", "object": "text_completion", "created": 1_700_000_000, "model": "m", **said}
    event = b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"


TOKEN = chunk(choices=[CHOICE], usage=None)
LAST = chunk(choices=[{**CHOICE, "finish_reason": "length"}], usage=None)
USAGE = chunk(choices=[], usage={"prompt_tokens": 20, "completion_tokens": 1})
DONE = b"e\r\ndata: [DONE]\n\n\r\n" + END


class Replica(asyncio.Protocol):
    """A connection of the gateway's; its stream goes on when its client says so."""

    by_request: ClassVar[dict[str, Replica]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.text = transport, b""

    def data_received(self, data: bytes) -> None:
        self.text += data
        head, _, body = self.text.partition(b"\r\n\r\n")
        size = re.search(rb"(?i)content-length: (\d+)", head)
        if size is None or len(body) < int(size[1]):
            return
        self.text, self.left = b"", int(json.loads(body)["max_tokens"])
        self.by_request[re.search(rb"(?i)x-request-id: (\S+)", head)[1].decode()] = self
        self.transport.write(HEAD)
        self.send()

    def send(self) -> None:
        self.left -= 1
        self.transport.write(TOKEN if self.left else LAST + USAGE + DONE)


class Client(asyncio.Protocol):
    """One request; asks its replica for a token whenever one has come."""

    num_seen = 0  # of all clients

    def __init__(self, number: int, tokens: int) -> None:
        self.number, self.left = str(number), tokens
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        body = json.dumps({"prompt": [1] * 20, "stream": True, "max_tokens": self.left}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nx-request-id: {self.number}\r\n"
        transport.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    def data_received(self, data: bytes) -> None:
        count = data.count(b'"text":')
        self.left -= count
        Client.num_seen += count
        if count and self.left:
            Replica.by_request[self.number].send()
        if data.endswith(END):
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.over.set_result(self.left)


def cpu_ns(pid: int) -> int:
    """Of all its threads; finer than /proc/PID/stat."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


async def request(port: int, number: int, tokens: int) -> None:
    _, client = await asyncio.get_running_loop().create_connection(lambda: Client(number, tokens), "127.0.0.1", port)
    if left := await client.over:
        raise RuntimeError(f"{left} of {tokens} tokens are missing")


async def one_by_one(pid: int, port: int, count: int) -> list[float]:
    windows = []
    for first in range(0, count, WINDOW_REQUESTS):
        before = cpu_ns(pid)
        for number in range(first, first + WINDOW_REQUESTS):
            await request(port, number, 1)
        windows.append((cpu_ns(pid) - before) / WINDOW_REQUESTS)
    return windows


async def in_streams(pid: int, port: int, num_streams: int, tokens: int) -> list[float]:
    windows: list[float] = []

    async def look() -> None:
        spent, seen = cpu_ns(pid), Client.num_seen
        while True:
            await asyncio.sleep(LOOK_S)
            if Client.num_seen - seen >= WINDOW_TOKENS:
                windows.append((cpu_ns(pid) - spent) / (Client.num_seen - seen))
                spent, seen = cpu_ns(pid), Client.num_seen

    looking = asyncio.create_task(look())
    await asyncio.gather(*(request(port, number, tokens) for number in range(num_streams)))
    looking.cancel()
    return windows


async def measure(folder: Path, asked: argparse.Namespace) -> dict[str, list[float]]:
    server = await asyncio.get_running_loop().create_server(Replica, "127.0.0.1", 0)
    replica = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile("instant", 1e-3)))
    fleet = {
        "pools": [{"name": "pool", "profile": str(folder / "profile.yaml")}],
        "classes": [{"name": "chat", "ttft_slo_s": 60, "tpot_slo_s": 1}],
    }
    replicas = [{"replica_id": "a", "pool": "pool", "url": replica, "phase": "ready"}]
    config = folder / "gateway.yaml"
    config.write_text(yaml.safe_dump({"fleet": fleet, "replicas": replicas, "port": 0, "control_port": 0}))
    async with process("gateway", "--config", str(config)) as (pid, port), server:
        await one_by_one(pid, port, WINDOW_REQUESTS)  # warm
        return {
            "request": await one_by_one(pid, port, asked.requests),
            "token": await in_streams(pid, port, asked.streams, asked.tokens),
        }


def in_checkout(folder: Path | None, run: Callable[[], Awaitable[object]]) -> object:
    """Measure with the gateway of a checkout; None: that of this environment."""
    import uvloop

    before = os.environ.get("PYTHONPATH")
    if folder is not None:
        os.environ["PYTHONPATH"] = str(folder.resolve())
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run())
    finally:
        os.environ.pop("PYTHONPATH", None)
        if before is not None:
            os.environ["PYTHONPATH"] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=150, help="per stream")
    parser.add_argument("--requests", type=int, default=600)
    asked = parser.parse_args()
    checkouts = [None] if asked.against is None else [asked.against, None]
    found: dict[str, list[float]] = {}
    for _ in range(asked.rounds):
        for checkout in checkouts:
            with tempfile.TemporaryDirectory() as folder:
                windows = in_checkout(checkout, lambda folder=folder: measure(Path(folder), asked))
            for what, costs in windows.items():
                found.setdefault(f"{checkout or 'here'}, us per {what}", []).extend(costs)
    for name, costs in sorted(found.items()):
        least, quartile, median = np.percentile(costs, (0, 25, 50)) / 1e3
        print(f"{name:>60}: least {least:7.1f}, lower quartile {quartile:7.1f}, median {median:7.1f}")
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
