"""The one door to HTTP for everything the controller asks: replicas, Prometheus, the gateway."""

from __future__ import annotations

import http.client
import io
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

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


class _Bounded(io.RawIOBase):
    """The bytes of an answer while there is time: a time limit of the socket alone starts anew with every byte."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket) -> None:
        self._raw, self._connection = raw, connection
        self._until_s = time.monotonic() + (connection.gettimeout() or 0.0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out before the end of the answer")
        self._connection.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach(), sock))


class _Connection(http.client.HTTPConnection):
    response_class = _Answer


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Answer


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A replica that redirects is not the replica we asked; the status is handed on."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


# Proxies of the environment are not used: replicas and gateways are neighbours.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect(), _HttpHandler(), _HttpsHandler())


def send(
    method: str,
    url: str,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float,
) -> HttpAnswer:
    """Send one request with the standard library.

    ``timeout_s`` bounds connecting, sending, and the whole answer.

    Raises:
        HttpError: no usable answer.
    """
    if not url.startswith(("http://", "https://")):
        raise HttpError(f"'{url}' is not an http:// or https:// address")
    request = urllib.request.Request(url, data=body, headers=dict(headers or {}), method=method)
    try:
        with _open(request, timeout_s) as answer:
            return HttpAnswer(answer.status, _read(answer))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise HttpError(f"{method} {url}: {type(error).__name__}: {reason}") from None


def _open(request: urllib.request.Request, timeout_s: float) -> Any:
    """An answer of any status."""
    try:
        return _OPENER.open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        return error


def _read(answer: Any) -> bytes:
    body: bytes = answer.read(MAX_BODY_BYTES + 1)
    if len(body) > MAX_BODY_BYTES:
        raise HttpError(f"answer is larger than {MAX_BODY_BYTES} bytes")
    return body
