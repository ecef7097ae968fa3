"""One request from the client to a replica and back.

Nothing is sent to the client before the answer's first token, so that until then a request can be tried elsewhere: a
replica that cannot be reached, that answers 5xx or 429, that opens a stream and closes it without a token (vLLM does
while it drains) or says in it that it is busy, has cost the client nothing but time. From the first token on, events
go through as they come; a replica that fails then ends the stream with an error event.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from rl_autoscale.serving.gateway.completion import BadRequestError, Completion, parse_completion
from rl_autoscale.serving.gateway.config import GatewayConfig
from rl_autoscale.serving.gateway.core import GatewayCore
from rl_autoscale.serving.gateway.errors import error_event, error_response
from rl_autoscale.serving.gateway.guard import Guard
from rl_autoscale.serving.gateway.sse import EventSplitter, Kind, StreamError, StreamWatch
from rl_autoscale.serving.gateway.tickets import INSIDE, State, Ticket
from rl_autoscale.serving.gateway.tokens import TokenEstimator
from rl_autoscale.serving.gateway.turnstile import Turnstile

log = logging.getLogger(__name__)

_FORWARDED = ("x-request-id", "traceparent", "tracestate")
_RETURNED = ("x-request-id",)
_REPLICA_ERRORS = (aiohttp.ClientError, OSError, asyncio.TimeoutError, StreamError)
_STATUS = {State.REFUSED: 429, State.DROPPED: 429, State.FAILED: 502}


@dataclass(slots=True, eq=False)
class Exchange:
    """A request on its way, for the watchdog.

    Attributes:
        writing_since_s: when the write in progress began; None between writes.
        task: to be cancelled when the client does not read.
        heard_s: when its replica was asked, or last said something.
        stalled: whether that has happened.
        attempt: the sending in progress.
        changed: set when the ticket leaves the queue.
    """

    task: asyncio.Task[object] | None
    heard_s: float = math.inf
    writing_since_s: float | None = None
    stalled: bool = False
    attempt: asyncio.Timeout | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def give_up(self) -> None:
        """Take the request off its replica, which sees us hang up; harmless when none has it yet."""
        if self.attempt is not None:
            self.attempt.reschedule(-math.inf)
            self.attempt = None


class _ClientGone(Exception):
    """Writing to the client failed."""


class Proxy:
    """The public side of the gateway.

    Args:
        config: the gateway.
        core: decides.
        guard: keys and classes.
        session: connections to replicas.
        clock: monotonic seconds.
        replica_key: sent to replicas, or None.
    """

    def __init__(
        self,
        config: GatewayConfig,
        core: GatewayCore,
        guard: Guard,
        session: aiohttp.ClientSession,
        clock: Callable[[], float],
        replica_key: str | None = None,
    ) -> None:
        self.core = core
        self.estimator = TokenEstimator()
        self.turned_away: dict[str, int] = {}  # before they were requests of a class: by reason
        self.closing = False
        self.turnstile = Turnstile()
        self._limits = config.limits
        self._sets_priority = config.priority == "class"
        self._guard = guard
        self._session = session
        self._clock = clock
        self._replica_headers = {"Authorization": f"Bearer {replica_key}"} if replica_key else {}
        self._exchanges: set[Exchange] = set()

    # -- routes ----------------------------------------------------------------------------------------------------

    async def complete(self, request: web.Request, path: str, prefix: str) -> web.StreamResponse:
        """Serve a completion; ``prefix`` is the route's, before ``path``."""
        client = self._guard.client(request.headers)
        if client is None:
            return self._turn_away(401, "wrong_key", "unknown API key")
        if self.closing:
            return self._turn_away(503, "closing", "the gateway is shutting down", retry_after_s=5.0)
        try:
            async with asyncio.timeout(self._limits.body_s):
                raw = await request.read()
            completion = parse_completion(path, raw)
            class_index = self._guard.class_index(client, request.headers, prefix)
        except TimeoutError:
            return self._turn_away(408, "slow_body", f"no complete body within {self._limits.body_s:g} s")
        except BadRequestError as error:
            return self._turn_away(400, "bad_request", str(error))
        except web.HTTPRequestEntityTooLarge:
            return self._turn_away(413, "large_body", f"the body exceeds {self._limits.body_bytes} bytes")
        return await self._serve(request, completion, class_index)

    async def models(self, request: web.Request) -> web.StreamResponse:
        """The models of a ready replica."""
        if self._guard.client(request.headers) is None:
            return self._turn_away(401, "wrong_key", "unknown API key")
        now_s = self._clock()
        for replica in self.core.replicas.values():
            if replica.phase != "ready" or replica.suspended_until_s > now_s:
                continue
            try:
                timeout = aiohttp.ClientTimeout(total=5.0)
                url = f"{replica.url}/v1/models"
                async with self._session.get(url, headers=self._replica_headers, timeout=timeout) as upstream:
                    return web.Response(
                        status=upstream.status, body=await upstream.read(), content_type="application/json"
                    )
            except _REPLICA_ERRORS:
                continue
        return self._turn_away(503, "no_replica", "no replica is ready", retry_after_s=5.0)

    def tick(self) -> None:
        """Let time pass for the core, and give up on clients that do not read and replicas that say nothing."""
        now_s = self._clock()
        self.core.tick(now_s)
        for exchange in self._exchanges:
            since_s = exchange.writing_since_s
            if since_s is None:
                if now_s - exchange.heard_s > self._limits.replica_silence_s:
                    exchange.give_up()
            elif now_s - since_s > self._limits.client_stall_s and exchange.task is not None:
                exchange.stalled = True
                exchange.task.cancel()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._exchanges)

    # -- one request -----------------------------------------------------------------------------------------------

    async def _serve(self, request: web.Request, completion: Completion, class_index: int) -> web.StreamResponse:
        exchange = Exchange(asyncio.current_task())
        ticket = self.core.arrive(
            class_index,
            self.estimator.estimate(completion.size),
            self._clock(),
            streams=completion.streams,
            on_change=exchange.changed.set,
            on_evict=exchange.give_up,
        )
        self._exchanges.add(exchange)
        reason = "the client went away"
        try:
            return await self._until_it_ends(request, completion, ticket, exchange)
        except _ClientGone:
            raise ConnectionResetError("the client went away") from None
        except asyncio.CancelledError:
            reason = "the client did not read" if exchange.stalled else reason
            raise
        finally:
            self._exchanges.discard(exchange)
            if ticket.state in INSIDE:
                self.core.cancel(ticket, self._clock(), reason)

    async def _until_it_ends(
        self, request: web.Request, completion: Completion, ticket: Ticket, exchange: Exchange
    ) -> web.StreamResponse:
        while True:
            if ticket.state is State.QUEUED:
                exchange.changed.clear()
                await exchange.changed.wait()
            elif ticket.state is State.SENT:
                response = await self._try_replica(request, completion, ticket, exchange)
                if response is not None:
                    return response
            else:
                return error_response(_STATUS[ticket.state], ticket.state.value, ticket.reason, ticket.retry_after_s)

    async def _try_replica(
        self, request: web.Request, completion: Completion, ticket: Ticket, exchange: Exchange
    ) -> web.StreamResponse | None:
        """Send the request to its replica; None when that failed, or was ended, before the client had anything."""
        relay = _Relay(self, request, completion, ticket, exchange)
        if completion.streams:
            exchange.heard_s = self._clock()
        try:
            async with asyncio.timeout(None) as exchange.attempt:
                return await self._ask_replica(request, completion, ticket, relay)
        except TimeoutError:  # given up
            return await relay.failed(f"the replica said nothing for {self._limits.replica_silence_s:g} s")
        finally:
            exchange.attempt = None
            exchange.heard_s = math.inf

    async def _ask_replica(
        self, request: web.Request, completion: Completion, ticket: Ticket, relay: _Relay
    ) -> web.StreamResponse | None:
        assert ticket.replica is not None
        pool = ticket.replica.pool.spec
        sets_priority = self._sets_priority and pool.scheduler == "vllm-priority"
        priority = self.core.spec.classes[ticket.class_index].priority if sets_priority else None
        try:
            async with self._session.post(
                ticket.replica.url + completion.path,
                data=completion.upstream_body(priority),
                headers=self._headers(request),
                timeout=self._timeout(completion),
            ) as upstream:
                return await relay.answer(upstream)
        except _REPLICA_ERRORS as error:
            return await relay.failed(f"{type(error).__name__}: {error}")

    def _headers(self, request: web.Request) -> dict[str, str]:
        kept = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
        return {"Content-Type": "application/json", "Accept-Encoding": "identity", **kept, **self._replica_headers}

    def _timeout(self, completion: Completion) -> aiohttp.ClientTimeout:
        # A stream has no timer of its own: one would be set anew with every token. The heartbeat sees to silence.
        total_s = None if completion.streams else self._limits.answer_s
        return aiohttp.ClientTimeout(total=total_s, sock_connect=self._limits.replica_connect_s)

    def _turn_away(
        self, status: int, reason: str, message: str, *, retry_after_s: float | None = None
    ) -> web.StreamResponse:
        self.turned_away[reason] = self.turned_away.get(reason, 0) + 1
        return error_response(status, reason, message, retry_after_s)


class _Stream(web.StreamResponse):
    """A stream whose head leaves together with its first token, in one system call, as that of a whole answer does."""

    _send_headers_immediately = False


class _Relay:
    """The way back of one attempt."""

    def __init__(
        self, proxy: Proxy, request: web.Request, completion: Completion, ticket: Ticket, exchange: Exchange
    ) -> None:
        self._proxy = proxy
        self._core = proxy.core
        self._clock = proxy._clock
        self._request = request
        self._completion = completion
        self._ticket = ticket
        self._exchange = exchange
        self._watch = StreamWatch()
        self._response: web.StreamResponse | None = None
        self._attempt = ticket.num_sent

    @property
    def _evicted(self) -> bool:
        """Whether the request was taken off this replica, and the news has not yet come to this task."""
        return self._ticket.state is not State.SENT or self._ticket.num_sent != self._attempt

    async def answer(self, upstream: aiohttp.ClientResponse) -> web.StreamResponse | None:
        """Bring the replica's answer to the client; None when there is none and another replica may be tried."""
        if upstream.status in (429, 499) or upstream.status >= 500:
            return await self.failed(f"the replica answered {upstream.status}")
        if upstream.status != 200:
            return await self._pass_client_error(upstream)
        if upstream.content_type == "text/event-stream":
            return await self._pass_stream(upstream)
        return await self._pass_whole(upstream)

    async def failed(self, reason: str) -> web.StreamResponse | None:
        """The replica has failed: try another, or tell the client."""
        if self._evicted:
            return None
        log.warning("replica %s: %s", self._ticket.replica and self._ticket.replica.replica_id, reason)
        self._core.lose(self._ticket, self._clock(), reason)
        if self._response is None:
            return None  # it is queued, sent elsewhere, dropped or failed; the loop sees to that
        if not self._watch.error:
            await self._write(error_event("replica_failed", "the replica failed before the answer was complete"))
        await self._finish_writing()
        return self._response

    async def _pass_client_error(self, upstream: aiohttp.ClientResponse) -> web.StreamResponse | None:
        """The request is wrong in a way that only the engine could see."""
        body = await upstream.read()
        if self._evicted:
            return None
        self._core.cancel(self._ticket, self._clock(), f"the replica answered {upstream.status}")
        return web.Response(status=upstream.status, body=body, content_type=upstream.content_type)

    async def _pass_whole(self, upstream: aiohttp.ClientResponse) -> web.StreamResponse | None:
        body = await upstream.read()
        self._watch.see_json(body)
        if self._watch.error or self._watch.finish_reason == "abort":
            return await self.failed(self._watch.error or "the engine aborted the request")
        if self._evicted:
            return None
        self._core.keep(self._ticket)
        headers = {name: upstream.headers[name] for name in _RETURNED if name in upstream.headers}
        response = web.Response(body=body, content_type=upstream.content_type, headers=headers)
        await self._guarded(response.prepare(self._request))
        await self._guarded(response.write_eof())
        self._finish()
        return response

    async def _pass_stream(self, upstream: aiohttp.ClientResponse) -> web.StreamResponse | None:
        splitter, watch, content, turnstile = EventSplitter(), self._watch, upstream.content, self._proxy.turnstile
        held: list[bytes] = []
        last = b""
        while chunk := await content.readany():
            self._exchange.heard_s = self._clock()
            if self._response is not None:
                await turnstile.turn()
            ready = []
            for event in splitter.feed(chunk):
                if watch.see(event) is not Kind.USAGE or self._completion.wants_usage:
                    ready.append(event)
            if self._response is None:
                held += ready
                if self._watch.error:
                    return await self.failed(self._watch.error)
                if not self._watch.begun:
                    continue
                if self._evicted:
                    return None
                await self._open(upstream)
                ready, held = held, []
            if watch.complete and content.at_eof():
                last = b"".join(ready)
            elif ready:
                await self._write(ready[0] if len(ready) == 1 else b"".join(ready))
        if not self._watch.complete:
            return await self.failed(
                self._watch.error or "the replica closed the stream before the answer was complete"
            )
        assert self._response is not None, "a complete answer has begun"
        await self._finish_writing(last)
        self._finish()
        return self._response

    async def _open(self, upstream: aiohttp.ClientResponse) -> None:
        """The first token is here: from now on the client gets what comes."""
        headers = {name: upstream.headers[name] for name in _RETURNED if name in upstream.headers}
        headers |= {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        response = _Stream(headers=headers)
        self._core.see_token(self._ticket, self._clock())
        await self._guarded(response.prepare(self._request))
        self._response = response

    async def _write(self, data: bytes) -> None:
        assert self._response is not None
        self._exchange.writing_since_s = self._clock()
        try:
            await self._response.write(data)
        except ConnectionError:
            raise _ClientGone from None
        self._exchange.writing_since_s = None

    async def _finish_writing(self, last: bytes = b"") -> None:
        assert self._response is not None
        await self._guarded(self._response.write_eof(last))

    async def _guarded(self, writing: object) -> None:
        self._exchange.writing_since_s = self._clock()
        try:
            await writing  # type: ignore[misc]
        except ConnectionError:
            raise _ClientGone from None
        self._exchange.writing_since_s = None

    def _finish(self) -> None:
        watch = self._watch
        if watch.prompt_tokens is not None:
            self._proxy.estimator.correct(self._completion.size, watch.prompt_tokens)
        self._core.finish(self._ticket, watch.output_tokens, self._clock())
