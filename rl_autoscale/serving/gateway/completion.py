"""What a client asks for, checked as far as the gateway must understand it, and what is sent on to a replica."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rl_autoscale.serving.gateway.tokens import PromptSize, prompt_size


class BadRequestError(Exception):
    """A request that no replica could serve; the message is for the client."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One request for a completion.

    Attributes:
        path: the replica's route.
        body: as parsed.
        raw: as it came.
        size: of its prompt.
        streams: whether the client wants a stream.
        wants_usage: whether the client wants the stream's closing usage event.
    """

    path: str
    body: dict[str, Any]
    raw: bytes
    size: PromptSize
    streams: bool
    wants_usage: bool

    def upstream_body(self, priority: int | None) -> bytes:
        """The body for a replica: as it came, plus what the gateway needs.

        A stream is asked to close with its usage, since token events are fewer than tokens when a reader is slow.

        Args:
            priority: vLLM's, to be set; None leaves the client's.
        """
        body = self.body
        if priority is not None and body.get("priority") != priority:
            body = {**body, "priority": priority}
        if self.streams and not self.wants_usage:
            body = {**body, "stream_options": {**(body.get("stream_options") or {}), "include_usage": True}}
        return self.raw if body is self.body else json.dumps(body, separators=(",", ":")).encode()


def parse_completion(path: str, raw: bytes) -> Completion:
    """Read a request body.

    Args:
        path: ``/v1/completions`` or ``/v1/chat/completions``.
        raw: the body.

    Raises:
        BadRequestError: not JSON, not an object, or without a prompt.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequestError(f"the body is a JSON {type(body).__name__}; send an object")
    wanted = "messages" if path.endswith("/chat/completions") else "prompt"
    other = "prompt" if wanted == "messages" else "messages"
    if not isinstance(body.get(wanted), list if wanted == "messages" else (str, list)) or other in body:
        raise BadRequestError(f"{path} needs '{wanted}' ({'a list' if wanted == 'messages' else 'text or token ids'})")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequestError("'stream_options' must be an object")
    if not isinstance(body.get("stream", False), bool | None):
        raise BadRequestError("'stream' must be true or false")
    return Completion(
        path, body, raw, prompt_size(body), bool(body.get("stream")), bool((options or {}).get("include_usage"))
    )
