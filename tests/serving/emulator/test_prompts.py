"""Equal beginnings of prompts have equal keys, and nothing else has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.serving.emulator.prompts import block_keys

ids = st.lists(st.integers(0, 3), max_size=80)


def keys(prompt) -> tuple[int, ...]:
    return block_keys({"prompt": prompt}, 10_000)


@given(ids, ids)
def test_two_prompts_share_the_keys_of_the_full_blocks_they_begin_with(first, second) -> None:
    alike = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    shared = sum(a == b for a, b in zip(keys(first), keys(second), strict=False))
    assert shared == alike // 16
    assert len(keys(first)) == len(first) // 16


def test_text_and_messages_have_keys_too_and_roles_tell_them_apart() -> None:
    text = "x" * 200
    assert len(keys(text)) == 200 // 4 // 16
    assert keys(text)[:2] == keys("x" * 150)[:2]

    def chat(role: str) -> tuple[int, ...]:
        return block_keys({"messages": [{"role": role, "content": text}]}, 10_000)

    assert chat("user") == chat("user") != chat("system")
    assert block_keys({"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}, 10_000) == chat(
        "user"
    )


def test_no_more_blocks_than_the_prompt_fills() -> None:
    assert len(block_keys({"prompt": [1] * 100}, 40)) == 2


def test_an_id_is_no_text() -> None:
    assert keys([[1] * 16]) == keys([1] * 16) != keys(["1"] * 16)
