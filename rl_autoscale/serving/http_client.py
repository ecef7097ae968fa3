"""The one door to HTTP for everything the controller asks: replicas, Prometheus, the gateway."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

MAX_BODY_BYTES = 16 * 2**20


class HttpError(Exception):
    """No answer: refused, reset, timed out, too large or not HTTP."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """Status and body; any status is an answer."""

    status: int
    body: bytes


class Http(Protocol):
    """Sends one request; injected everywhere, so that tests open no socket."""

    def __call__(
        self,
        method: str,
        url: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float,
    ) -> HttpAnswer:
        """Return the answer, or raise HttpError."""
        ...


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A replica that redirects is not the replica we asked; the status is handed on."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


# Proxies of the environment are not used: replicas and gateways are neighbours.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())


def send(
    method: str,
    url: str,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float,
) -> HttpAnswer:
    """Send one request with the standard library; ``timeout_s`` bounds each socket operation.

    Raises:
        HttpError: no usable answer.
    """
    if not url.startswith(("http://", "https://")):
        raise HttpError(f"'{url}' is not an http:// or https:// address")
    request = urllib.request.Request(url, data=body, headers=dict(headers or {}), method=method)
    try:
        with _OPENER.open(request, timeout=timeout_s) as answer:
            return HttpAnswer(answer.status, _read(answer))
    except urllib.error.HTTPError as error:
        with error:
            return HttpAnswer(error.code, error.read(MAX_BODY_BYTES))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise HttpError(f"{method} {url}: {type(error).__name__}: {reason}") from None


def _read(answer: http.client.HTTPResponse) -> bytes:
    body = answer.read(MAX_BODY_BYTES + 1)
    if len(body) > MAX_BODY_BYTES:
        raise HttpError(f"answer is larger than {MAX_BODY_BYTES} bytes")
    return body
