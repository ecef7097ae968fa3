"""What a prompt is made of, so that equal beginnings are found again in the prefix cache.

There is no tokenizer: token ids are tokens, and text has one for every four bytes, as everywhere in the emulator. As in
vLLM (v1/core/kv_cache_utils.py, `hash_block_tokens`), the key of a block covers the block and all before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS

TEXT_BYTES_PER_TOKEN = 4
_KEY_BYTES = 7
"""Keys stay below 2**56: far from colliding, and whole numbers as the scheduler wants them."""


def block_keys(body: dict[str, Any], num_tokens: int) -> tuple[int, ...]:
    """Keys of a prompt's full KV blocks, in order; two prompts share as many as they begin alike.

    Args:
        body: of a completion or a chat, checked.
        num_tokens: of the prompt, which has no more full blocks than fit into it.
    """
    keys: list[int] = []
    digest = blake2b(digest_size=_KEY_BYTES)
    in_block = 0
    for token in _tokens(body):
        digest.update(len(token).to_bytes(1) + token)
        in_block += 1
        if in_block == BLOCK_SIZE_TOKENS:
            keys.append(int.from_bytes(digest.digest()))
            in_block = 0
    return tuple(keys[: num_tokens // BLOCK_SIZE_TOKENS])


def _tokens(body: dict[str, Any]) -> Iterator[bytes]:
    """The prompt's tokens, each as bytes of its own."""
    if "messages" not in body:
        yield from _of_prompt(body["prompt"])
        return
    for message in body["messages"]:
        if not isinstance(message, dict):
            continue
        yield from (b"role", str(message.get("role")).encode()[:200], b"begin", b"end")  # a template's four tokens
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        for part in parts:
            text = part.get("text") if isinstance(part, dict) else None
            yield from _of_text(text if isinstance(text, str) else "")


def _of_prompt(prompt: Any) -> Iterator[bytes]:
    if isinstance(prompt, str):
        yield from _of_text(prompt)
    elif isinstance(prompt, list):
        for part in prompt:
            yield from _of_prompt(part)
    elif isinstance(prompt, int):
        yield b"#" + str(prompt).encode()[:200]


def _of_text(text: str) -> Iterator[bytes]:
    raw = text.encode()
    for start in range(0, len(raw), TEXT_BYTES_PER_TOKEN):
        yield raw[start : start + TEXT_BYTES_PER_TOKEN]
