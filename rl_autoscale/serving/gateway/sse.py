"""Server-sent events of a completion stream: where they end, and what they say.

The proxy forwards events as the replica wrote them, byte for byte. Only events that may say something are parsed: a
plain token event costs a few searches in its bytes. In JSON a quote inside a string is escaped, so the bytes
``"error"`` are a key or a whole string, and parsing decides which.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

MAX_EVENT_BYTES = 1 << 20
"""No token event is near this; what is longer is not a completion stream."""


class StreamError(Exception):
    """A replica's stream is not what it should be."""


class EventSplitter:
    """Cuts a byte stream into events; keeps the beginning of an event that has not ended."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        r"""Take bytes from the replica and give the events that are complete, each with its blank line.

        Raises:
            StreamError: an event longer than `MAX_EVENT_BYTES`.
        """
        if not self._rest and chunk.endswith(b"\n\n") and chunk.count(b"\n\n") == 1:
            return [chunk]
        data = self._rest + chunk
        separator = b"\r\n\r\n" if b"\r\n\r\n" in data else b"\n\n"
        *complete, self._rest = data.split(separator)
        if len(self._rest) > MAX_EVENT_BYTES:
            raise StreamError(f"the replica sent an event longer than {MAX_EVENT_BYTES} bytes")
        return [event + separator for event in complete]

    @property
    def rest(self) -> bytes:
        """What came after the last complete event."""
        return self._rest


class Kind(Enum):
    """What an event is."""

    TOKEN = "token"  # output, or the end of it
    OTHER = "other"  # a role, a comment: nothing of the answer
    USAGE = "usage"  # token counts and nothing else
    ERROR = "error"
    DONE = "done"


class StreamWatch:
    """What a stream has said so far.

    Attributes:
        begun: whether some of the answer was in it.
        finish_reason: of the last choice that gave one.
        done: whether the closing mark has come.
        num_token_events: fewer than tokens where a slow reader gets several in one event.
        prompt_tokens: as the replica reports, or None.
        completion_tokens: as the replica reports, or None.
        error: the replica's error message, empty without one.
    """

    def __init__(self) -> None:
        self.begun = False
        self.finish_reason: str | None = None
        self.done = False
        self.num_token_events = 0
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.error = ""

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer: as reported, else the number of token events."""
        return self.num_token_events if self.completion_tokens is None else self.completion_tokens

    @property
    def complete(self) -> bool:
        """Whether the answer has come to its own end; an engine that aborts says so, or says nothing."""
        return self.finish_reason not in (None, "abort") and not self.error

    def see(self, event: bytes) -> Kind:
        """Take note of one event."""
        if (
            self.begun
            and b'"finish_reason":null' in event
            and (b'"usage"' not in event or b'"usage":null' in event)
            and b'"error"' not in event
            and event.startswith(b"data: {")
        ):
            self.num_token_events += 1
            return Kind.TOKEN
        return self._look_closely(event)

    def _look_closely(self, event: bytes) -> Kind:
        data = b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
        if data == b"[DONE]":
            self.done = True
            return Kind.DONE
        return self.see_json(data)

    def see_json(self, data: bytes) -> Kind:
        """Take note of an event's data, or of an answer that came in one piece."""
        try:
            said = json.loads(data) if data else None
        except ValueError:
            said = None
        return self._take_in(said) if isinstance(said, dict) else Kind.OTHER

    def _take_in(self, said: dict[str, Any]) -> Kind:
        if said.get("error"):
            error = said["error"]
            self.error = str(error.get("message", error) if isinstance(error, dict) else error)
            return Kind.ERROR
        self._note_usage(said.get("usage"))
        choices = [choice for choice in said.get("choices") or () if isinstance(choice, dict)]
        if not choices:
            return Kind.USAGE if said.get("usage") else Kind.OTHER
        self.finish_reason = next((c["finish_reason"] for c in choices if c.get("finish_reason")), self.finish_reason)
        if not any(_has_output(choice) for choice in choices):
            return Kind.OTHER
        self.begun = True
        self.num_token_events += 1
        return Kind.TOKEN

    def _note_usage(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self.prompt_tokens = _count(usage.get("prompt_tokens"), self.prompt_tokens)
            self.completion_tokens = _count(usage.get("completion_tokens"), self.completion_tokens)


def _has_output(choice: dict[str, Any]) -> bool:
    """Whether a choice holds some of the answer; a chat's opening event holds only a role."""
    delta = choice.get("delta")
    if choice.get("finish_reason") or not isinstance(delta, dict):
        return True
    return any(value for name, value in delta.items() if name != "role")


def _count(value: Any, default: int | None) -> int | None:
    return value if isinstance(value, int) and value >= 0 else default
