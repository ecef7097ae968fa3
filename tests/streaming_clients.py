"""Closed-loop clients of real servers: each streams one request after the other and books how it ended."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rl_autoscale.serving.http_client import HttpError, send

COMMAND = [sys.executable, "-c", "from rl_autoscale.cli.root import main; main()"]
MAX_TOKENS = 60


class Client(threading.Thread):
    """Streams until ``stop`` is set.

    Attributes:
        whole: answers with every token asked for, counted by the server's own ``usage``.
        other: (status, last words) of all that ended otherwise.
    """

    def __init__(
        self, port: int, model: str, prompt: str | list[int], stop: threading.Event, max_tokens: int = MAX_TOKENS
    ) -> None:
        super().__init__(daemon=True)
        self.stop, self.whole, self.other = stop, 0, []
        self._port, self._max_tokens = port, max_tokens
        self._body = json.dumps(
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )

    def run(self) -> None:
        while not self.stop.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120.0)
            try:
                connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                text = answer.read().decode()
                if answer.status == 200 and is_whole(text, self._max_tokens):
                    self.whole += 1
                else:
                    self.other.append((answer.status, text[-200:]))
            except (OSError, http.client.HTTPException) as error:
                self.other.append((0, repr(error)))
            finally:
                connection.close()


def is_whole(text: str, max_tokens: int) -> bool:
    """Whether a stream ended as it should, with all its tokens."""
    events = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
    if events[-1] != "[DONE]":
        return False
    said = [json.loads(event) for event in events[:-1]]
    usage = next((event["usage"] for event in reversed(said) if event.get("usage")), {})
    return all("error" not in event for event in said) and usage.get("completion_tokens") == max_tokens


def until(condition: Callable[[], bool], limit_s: float, step: Callable[[], None]) -> None:
    """Step until a condition holds; a test that waits longer than ``limit_s`` fails."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "took too long"
        step()


@contextmanager
def running_gateway(config: Path, control_port: int) -> Iterator[subprocess.Popen[bytes]]:
    """``rl-autoscale gateway`` as a process, from when it answers until it has drained (or was killed)."""

    def answers() -> bool:
        assert process.poll() is None, "the gateway ended"
        try:
            return send("GET", f"http://127.0.0.1:{control_port}/control/snapshot", timeout_s=2.0).status == 200
        except HttpError:
            return False

    process = subprocess.Popen([*COMMAND, "gateway", "--config", str(config)])
    try:
        until(answers, 120.0, lambda: time.sleep(0.2))
        yield process
    finally:
        process.terminate()
        process.wait(30.0)
