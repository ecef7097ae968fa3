"""Streams cut into events, prompts measured, bodies made for replicas."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.serving.gateway.completion import parse_completion
from rl_autoscale.serving.gateway.sse import MAX_EVENT_BYTES, EventSplitter, Kind, StreamError, StreamWatch
from rl_autoscale.serving.gateway.tokens import PromptSize, TokenEstimator, prompt_size


@given(st.lists(st.sampled_from([b"data: a", b": c", b"data: x\ndata: y", b'data: {"t":"\\n\\n"}'])), st.data())
def test_events_come_out_whole_however_the_bytes_are_cut(events, data) -> None:
    whole = b"".join(event + b"\n\n" for event in events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    splitter = EventSplitter()
    found = [event for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True) for event in splitter.feed(whole[a:b])]
    assert found == [event + b"\n\n" for event in events]
    assert splitter.rest == b""


def test_carriage_returns_are_kept() -> None:
    assert EventSplitter().feed(b"data: a\r\n\r\ndata: b\r\n\r\n") == [b"data: a\r\n\r\n", b"data: b\r\n\r\n"]


def test_an_event_without_end_is_an_error() -> None:
    with pytest.raises(StreamError):
        EventSplitter().feed(b"x" * (MAX_EVENT_BYTES + 1))


def event(**said) -> bytes:
    return b"data: " + json.dumps(said, separators=(",", ":")).encode() + b"\n\n"


def choice(text: str, finish_reason=None) -> dict:
    return {"index": 0, "text": text, "finish_reason": finish_reason}


@given(st.text())
def test_no_text_looks_like_anything_but_a_token(text) -> None:
    watch = StreamWatch()
    for said in (text, text + '"error"', '"usage":{"completion_tokens":9}', "error", "usage", "[DONE]"):
        assert watch.see(event(choices=[choice(said)])) is Kind.TOKEN
    assert (watch.num_token_events, watch.error, watch.done, watch.completion_tokens) == (6, "", False, None)


def test_what_a_stream_says() -> None:
    watch = StreamWatch()
    kinds = [
        watch.see(b": ping\n\n"),
        watch.see(event(choices=[{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}])),
        watch.see(event(choices=[choice(" a")], usage=None)),
        watch.see(event(choices=[choice(" b")], usage=None)),
        watch.see(event(choices=[choice("", "stop")])),
        watch.see(event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 5})),
        watch.see(b"data: [DONE]\n\n"),
    ]
    token = Kind.TOKEN
    assert kinds == [Kind.OTHER, Kind.OTHER, token, token, token, Kind.USAGE, Kind.DONE]
    assert (watch.prompt_tokens, watch.output_tokens, watch.complete) == (7, 5, True)


@pytest.mark.parametrize("said", [{"error": {"message": "no"}}, {"error": "no"}])
def test_errors(said) -> None:
    watch = StreamWatch()
    assert watch.see(event(**said)) is Kind.ERROR
    assert (watch.error, watch.complete) == ("no", False)


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({"prompt": "hällo"}, PromptSize(6, 0)),
        ({"prompt": [1, 2, 3]}, PromptSize(0, 3)),
        ({"prompt": ["ab", "c"]}, PromptSize(3, 0)),
        ({"prompt": [[1, 2], [3]]}, PromptSize(0, 3)),
        ({"messages": [{"role": "user", "content": "abc"}, {"content": None}, 3]}, PromptSize(3, 12)),
        ({"messages": [{"content": [{"type": "text", "text": "ab"}, {"type": "image_url"}]}]}, PromptSize(2, 4)),
    ],
)
def test_prompts_are_measured(body, size) -> None:
    assert prompt_size(body) == size


def test_the_ratio_follows_what_replicas_report() -> None:
    estimator = TokenEstimator()
    assert estimator.estimate(PromptSize(4000, 0)) == 1000
    for _ in range(100):
        estimator.correct(PromptSize(3000, 4), 1504)  # two bytes per token
    assert estimator.estimate(PromptSize(4000, 10)) == pytest.approx(2010, rel=0.02)
    assert estimator.estimate(PromptSize(0, 0)) == 1


def test_a_body_that_needs_nothing_goes_on_as_it_came() -> None:
    raw = b'{ "prompt":"x",  "stream": true, "stream_options": {"include_usage": true} }'
    assert parse_completion("/v1/completions", raw).upstream_body(None) is raw


def test_a_stream_is_asked_for_its_usage_and_keeps_its_other_options() -> None:
    raw = b'{"prompt":"x","stream":true,"stream_options":{"continuous_usage_stats":true}}'
    body = json.loads(parse_completion("/v1/completions", raw).upstream_body(3))
    assert body == {
        "prompt": "x",
        "stream": True,
        "stream_options": {"continuous_usage_stats": True, "include_usage": True},
        "priority": 3,
    }
