"""OpenAI's JSON, as vLLM writes it; the text is a word per token."""

from __future__ import annotations

import json
from typing import Any

_WORD = " word"
DONE = b"data: [DONE]\n\n"


class Answer:
    """The JSON of one request's answer.

    Args:
        number: unique.
        model: its name.
        is_chat: shape of the chat route.
        created_s: wall clock.
        prompt_tokens: for the usage.
    """

    def __init__(self, number: int, model: str, *, is_chat: bool, created_s: int, prompt_tokens: int) -> None:
        self._is_chat = is_chat
        self._prompt_tokens = prompt_tokens
        self._head = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{number}", "created": created_s, "model": model}

    def opening(self) -> bytes:
        """A chat stream opens with its role; another stream with nothing."""
        return self._event([self._choice({"role": "assistant", "content": ""}, None)]) if self._is_chat else b""

    def tokens(self, count: int, finish_reason: str | None) -> bytes:
        """An event with so many tokens."""
        text = _WORD * count
        return self._event([self._choice({"content": text} if self._is_chat else text, finish_reason)])

    def usage(self, output_tokens: int) -> bytes:
        """The event that closes a stream whose client asked for its usage."""
        return self._event([], usage=self._usage(output_tokens))

    def whole(self, output_tokens: int, finish_reason: str) -> dict[str, Any]:
        """The answer in one piece."""
        text = _WORD * output_tokens
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish_reason, "stop_reason": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": self._usage(output_tokens)}

    def _choice(self, part: dict[str, str] | str, finish_reason: str | None) -> dict[str, Any]:
        content = {"delta": part} if self._is_chat else {"text": part}
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}

    def _event(self, choices: list[dict[str, Any]], **more: object) -> bytes:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        data = {**self._head, "object": kind, "choices": choices, **more}
        return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"

    def _usage(self, output_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "total_tokens": self._prompt_tokens + output_tokens,
            "completion_tokens": output_tokens,
        }


def error(status: int, message: str) -> dict[str, object]:
    """An error as vLLM words it."""
    kinds = {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
    return {
        "error": {"message": message, "type": kinds.get(status, "InternalServerError"), "param": None, "code": status}
    }
