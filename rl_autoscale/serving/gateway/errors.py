"""Errors as clients of OpenAI's API know them."""

from __future__ import annotations

import json

from aiohttp import web


def error_response(status: int, kind: str, message: str, retry_after_s: float | None) -> web.Response:
    """An answer that is an error; where it may pass, with the time to come again."""
    headers = {}
    if status in (429, 503) and retry_after_s is not None:
        headers["Retry-After"] = str(max(round(retry_after_s + 0.5), 1))
    return web.json_response(_body(kind, message), status=status, headers=headers)


def error_event(kind: str, message: str) -> bytes:
    """The end of a stream that has failed."""
    return b"data: " + json.dumps(_body(kind, message)).encode() + b"\n\ndata: [DONE]\n\n"


def _body(kind: str, message: str) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "code": kind}}
