"""Prompt tokens before the tokenizer has seen them.

The gateway has no tokenizer: it divides a prompt's bytes by a ratio and corrects the ratio by what replicas report for
prompts whose bytes it knows. English text has about four bytes per token. Prompts given as token ids are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_FIRST_RATIO = 4.0
_MEMORY_TOKENS = 50_000.0
"""Tokens after which an observation has lost 1 - 1/e of its weight."""
_MESSAGE_TOKENS = 4
"""What a chat template adds to a message, roughly."""


@dataclass(frozen=True, slots=True)
class PromptSize:
    """What is known of a prompt's length.

    Attributes:
        text_bytes: of its texts.
        known_tokens: token ids, and what a chat template adds.
    """

    text_bytes: int
    known_tokens: int


class TokenEstimator:
    """Bytes per token, learned from reported usage."""

    def __init__(self) -> None:
        self._bytes = _FIRST_RATIO * _MEMORY_TOKENS * 0.02  # what it believes at first weighs a thousand tokens
        self._tokens = _MEMORY_TOKENS * 0.02

    @property
    def bytes_per_token(self) -> float:
        """The ratio in force."""
        return self._bytes / self._tokens

    def estimate(self, size: PromptSize) -> int:
        """Prompt tokens, at least 1."""
        return max(round(size.text_bytes / self.bytes_per_token) + size.known_tokens, 1)

    def correct(self, size: PromptSize, prompt_tokens: int) -> None:
        """A replica has counted a prompt."""
        text_tokens = prompt_tokens - size.known_tokens
        if size.text_bytes <= 0 or text_tokens <= 0:
            return
        keep = max(1.0 - text_tokens / _MEMORY_TOKENS, 0.0)
        self._bytes = self._bytes * keep + size.text_bytes
        self._tokens = self._tokens * keep + text_tokens


def prompt_size(body: dict[str, Any]) -> PromptSize:
    """Measure the prompt of a completion or a chat; pictures and tools count nothing."""
    if "messages" in body:
        messages = body["messages"]
        return PromptSize(sum(_message_bytes(message) for message in messages), _MESSAGE_TOKENS * len(messages))
    prompt = body["prompt"]
    parts = prompt if isinstance(prompt, list) else [prompt]
    text_bytes = sum(len(part.encode()) for part in parts if isinstance(part, str))
    num_ids = sum(1 for part in parts if isinstance(part, int))
    return PromptSize(text_bytes, num_ids + sum(len(part) for part in parts if isinstance(part, list)))


def _message_bytes(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return len(content.encode())
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return sum(len(text.encode()) for text in texts if isinstance(text, str))
