"""What clients and replicas do to a gateway, and what becomes of the requests: each in one counted state."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("aiohttp", reason="needs the serve extra")

from aiohttp import web
from serving_tools import ANSWER, BODY, BUSY, DONE, gateway_for, run, stand, token, usage


async def good(_request, write):
    await write(ANSWER + usage(2, 3) + DONE)


async def crash_mid_stream(request, write):
    await write(token(" a") + token(" b"))
    await asyncio.sleep(0.01)
    request.transport.abort()
    await asyncio.sleep(1)


async def crash_before_a_token(request, write):
    await write(b": comment\n\n")
    await asyncio.sleep(0.01)
    request.transport.abort()
    await asyncio.sleep(1)


async def busy_inside_a_200(_request, write):
    await write(BUSY + DONE)


async def empty_200(_request, write):
    await write(DONE)


async def closed_200(_request, _write):
    pass


async def unavailable(_request, _write):
    return web.json_response({"error": {"message": "busy"}}, status=503)


async def aborted_before_a_token(_request, write):
    await write(token("", "abort") + DONE)


async def half_an_event(request, write):
    await write(token(" a") + b'data: {"choi')
    await asyncio.sleep(0.01)
    request.transport.abort()
    await asyncio.sleep(1)


def test_a_replica_that_dies_mid_stream_ends_it_with_an_error_event() -> None:
    async def test():
        async with stand(crash_mid_stream) as (gate, _):
            status, body = await gate.post()
            assert status == 200
            events = body.split(b"\n\n")
            assert [json.loads(event[6:])["choices"][0]["text"] for event in events[:2]] == [" a", " b"]
            assert json.loads(events[2][6:])["error"]["type"] == "replica_failed"
            assert gate.count("failed") == 1

    run(test())


def test_half_an_event_never_reaches_the_client() -> None:
    async def test():
        async with stand(half_an_event) as (gate, _):
            _, body = await gate.post()
            assert b"choi\n" not in body
            assert b"choi{" not in body
            assert all(json.loads(event[6:]) for event in body.split(b"\n\n")[:-2])
            assert gate.count("failed") == 1

    run(test())


@pytest.mark.parametrize(
    "fault", [crash_before_a_token, busy_inside_a_200, empty_200, closed_200, unavailable], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("streams", [True, False])
def test_what_fails_before_a_token_is_tried_elsewhere(fault, streams) -> None:
    async def whole(_request, _write):
        choice = {"index": 0, "text": " a b c", "finish_reason": "length"}
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 2, "completion_tokens": 3}})

    async def test():
        async with stand(fault, good if streams else whole) as (gate, replicas):
            status, body = await gate.post({**BODY, "stream": streams})
            assert status == 200
            assert (body == ANSWER + DONE) if streams else json.loads(body)["usage"]["completion_tokens"] == 3
            assert [len(replica.bodies) for replica in replicas] == [1, 1]
            assert gate.count("finished") == 1
            assert gate.gateway.snapshot().classes["chat"].finished_output_tokens == 3

    run(test())


def test_a_replica_that_cannot_be_reached_costs_a_request_nothing() -> None:
    async def test():
        from serving_tools import ScriptedReplica

        replica = ScriptedReplica(good)
        async with replica.serve() as url, gateway_for("http://127.0.0.1:1", url) as gate:
            assert await gate.post() == (200, ANSWER + DONE)
            assert gate.count("finished") == 1

    run(test())


def test_tries_end_and_the_client_hears_why() -> None:
    async def test():
        async with stand(unavailable, unavailable, unavailable) as (gate, replicas):
            status, body = await gate.post()
            assert status == 502
            assert "503" in json.loads(body)["error"]["message"]
            assert sum(len(replica.bodies) for replica in replicas) == 3
            assert gate.count("failed") == 1

    run(test())


def test_an_error_event_mid_stream_reaches_the_client_once() -> None:
    async def script(_request, write):
        await write(token(" a"))
        await asyncio.sleep(0.02)
        await write(BUSY + DONE)

    async def test():
        async with stand(script) as (gate, _):
            status, body = await gate.post()
            assert (status, body.count(b'"error"')) == (200, 1)
            assert gate.count("failed") == 1

    run(test())


def test_an_aborted_answer_is_not_a_finished_one() -> None:
    async def test():
        async with stand(aborted_before_a_token) as (gate, _):
            await gate.post()
            assert gate.count("failed") == 1

    run(test())


def test_what_an_engine_finds_wrong_is_the_clients_doing() -> None:
    async def script(_request, _write):
        return web.json_response({"error": {"message": "too long", "code": 400}}, status=400)

    async def test():
        async with stand(script) as (gate, replicas):
            status, body = await gate.post()
            assert (status, json.loads(body)["error"]["message"]) == (400, "too long")
            assert len(replicas[0].bodies) == 1
            assert gate.count("cancelled") == 1

    run(test())


def test_a_client_that_goes_away_takes_its_request_off_the_replica() -> None:
    async def endless(_request, write):
        while True:
            await write(token())
            await asyncio.sleep(0.005)

    async def test():
        async with stand(endless) as (gate, replicas):
            async with gate.session.post(gate.url + "/v1/completions", json=BODY) as response:
                await response.content.readany()
                response.close()
            await gate.until(lambda: replicas[0].num_disconnects == 1)
            await gate.until(lambda: gate.count("cancelled") == 1)
            assert gate.gateway.snapshot().pools["pool"].in_flight == 0

    run(test())


def test_a_client_that_goes_away_while_it_is_held_is_forgotten() -> None:
    async def test():
        async with gateway_for() as gate:
            task = asyncio.create_task(gate.post())
            await gate.until(lambda: gate.count("queue_length") == 1)
            task.cancel()
            await gate.until(lambda: gate.count("cancelled") == 1)
            assert gate.count("queue_length") == 0

    run(test())


def test_a_client_that_does_not_read_is_cut_off() -> None:
    async def flood(_request, write):
        while True:
            await write(token(" w" * 20_000))

    async def test():
        async with stand(flood, limits={"client_stall_s": 0.2}) as (gate, replicas):
            _, writer = await asyncio.open_connection("127.0.0.1", gate.gateway.port, limit=1024)
            raw = json.dumps(BODY).encode()
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
            await gate.until(lambda: gate.count("cancelled") == 1)
            await gate.until(lambda: replicas[0].num_disconnects == 1)
            writer.transport.abort()

    run(test())


def test_a_silent_replica_is_given_up() -> None:
    async def silent(_request, write):
        await write(token(" a"))
        await asyncio.sleep(60)

    async def test():
        async with stand(silent, limits={"replica_silence_s": 0.2}) as (gate, replicas):
            _, body = await gate.post()
            assert b"replica_failed" in body
            assert gate.count("failed") == 1
            await gate.until(lambda: replicas[0].num_disconnects == 1)

    run(test())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"x" * 3000, 413),
        (b'{"prompt": "x", ', 400),
        (b'["prompt"]', 400),
        (b'{"max_tokens": 3}', 400),
        (b'{"prompt": "x", "stream": "yes"}', 400),
        (b'{"prompt": "x", "messages": []}', 400),
        (b'{"prompt": "x", "stream_options": 3}', 400),
        (b"[" * 2000, 400),
        (b"\xff\xfe", 400),
    ],
)
def test_bodies_that_no_replica_should_see(body, status) -> None:
    async def test():
        async with stand(good, limits={"body_bytes": 2048}) as (gate, replicas):
            assert (await gate.post(body))[0] == status
            assert replicas[0].bodies == []
            assert gate.gateway.snapshot().classes["chat"].arrivals == 0
            assert sum(gate.gateway.proxy.turned_away.values()) == 1

    run(test())


def test_wrong_keys_are_refused_and_the_right_one_decides_the_class(monkeypatch) -> None:
    monkeypatch.setenv("TEAM_KEY", "k" * 32)

    async def test():
        keys = [{"name": "team", "key": "env:TEAM_KEY", "service_class": "bulk"}]
        async with stand(good, api_keys=keys) as (gate, replicas):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic " + "k" * 32}):
                status, body = await gate.post(headers=headers)
                assert status == 401
                assert b"kkk" not in body
            headers = {"Authorization": "Bearer " + "k" * 32, "x-service-class": "chat"}
            assert (await gate.post(headers=headers))[0] == 200
            assert gate.count("finished", "bulk") == 1
            assert "Authorization" not in replicas[0].headers[0]

    run(test())


async def say(port: int, data: bytes) -> bytes:
    """Send raw bytes and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 9000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: a\r\n" % n for n in range(500)) + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"\x16\x03\x01\x02\x00 this is not HTTP\r\n\r\n",
    ],
    ids=["long", "many", "two lengths", "negative length", "tls"],
)
def test_abused_headers_get_400(head) -> None:
    async def test():
        async with stand(good) as (gate, replicas):
            assert (await say(gate.gateway.port, head)).startswith(b"HTTP/1.0 400") or b" 400 " in (
                await say(gate.gateway.port, head)
            )
            assert replicas[0].bodies == []
            assert (await gate.post())[0] == 200

    run(test())


def test_headers_and_bodies_that_never_end_are_cut_off() -> None:
    async def test():
        async with stand(good, limits={"idle_connection_s": 0.2, "body_s": 0.2}) as (gate, _):
            assert await say(gate.gateway.port, b"POST /v1/completions HTTP/1.1\r\nHost: ") == b""
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{"
            assert b" 408 " in await say(gate.gateway.port, head)

    run(test())
