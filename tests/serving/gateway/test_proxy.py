"""The gateway as clients and the controller see it, when nothing goes wrong."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess

import pytest

pytest.importorskip("aiohttp", reason="needs the serve extra")

from aiohttp import web
from serving_tools import ANSWER, BODY, DONE, FLEET, gateway_for, run, stand, token, usage

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.serving.gateway.config import GatewayConfig
from rl_autoscale.serving.gateway_api import GatewayDecision, GatewaySnapshot, ReplicaList
from rl_autoscale.serving.gateway_client import HttpGateway


async def good(_request, write):
    await write(ANSWER + usage(2, 3) + DONE)


def chat_event(delta: dict, finish_reason=None) -> bytes:
    data = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


@pytest.mark.parametrize("asked", [True, False])
def test_events_pass_as_they_were_written_and_usage_only_where_asked_for(asked) -> None:
    async def slow(_request, write):
        for byte in ANSWER[:40]:
            await write(bytes([byte]))
        await write(ANSWER[40:] + usage(2, 3) + DONE)

    async def test():
        async with stand(slow) as (gate, replicas):
            body = {**BODY, "stream_options": {"include_usage": True}} if asked else BODY
            assert await gate.post(body) == (200, ANSWER + (usage(2, 3) if asked else b"") + DONE)
            assert replicas[0].bodies[0]["stream_options"] == {"include_usage": True}
            assert gate.gateway.snapshot().classes["chat"].finished_output_tokens == 3

    run(test())


def test_tokens_reach_the_client_as_they_come() -> None:
    release = asyncio.Event()

    async def waits(_request, write):
        await write(token(" a"))
        await release.wait()
        await write(token(" b", "stop") + DONE)

    async def test():
        async with stand(waits) as (gate, _), gate.session.post(gate.url + "/v1/completions", json=BODY) as response:
            assert await response.content.readany() == token(" a")
            release.set()
            assert await response.content.read() == token(" b", "stop") + DONE

    run(test())


def test_a_role_is_not_a_token() -> None:
    release = asyncio.Event()

    async def chat(_request, write):
        await write(chat_event({"role": "assistant", "content": ""}))
        await release.wait()
        await write(chat_event({"content": "hi"}) + chat_event({}, "stop") + DONE)

    async def test():
        async with stand(chat) as (gate, _):
            body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
            task = asyncio.create_task(gate.post(body, "/v1/chat/completions"))
            await gate.until(lambda: gate.count("in_flight") == 1)
            await asyncio.sleep(0.02)
            assert gate.count("first_tokens") == 0
            release.set()
            _, answer = await task
            assert answer.startswith(chat_event({"role": "assistant", "content": ""}))
            assert gate.count("first_tokens") == 1

    run(test())


def test_the_class_comes_from_the_route_before_the_header_before_the_default() -> None:
    async def test():
        async with stand(good, class_routes={"/later": "bulk"}) as (gate, _):
            await gate.post()
            await gate.post(headers={"x-service-class": "bulk"})
            await gate.post(path="/later/v1/completions", headers={"x-service-class": "chat"})
            assert (gate.count("finished"), gate.count("finished", "bulk")) == (1, 2)
            assert (await gate.post(headers={"x-service-class": "bulky"}))[0] == 400

    run(test())


@pytest.mark.parametrize(
    ("scheduler", "whose", "expected"),
    [("vllm-priority", "class", 5), ("vllm-priority", "client", 1), ("vllm", "class", 1)],
)
def test_priority_is_the_classs_where_the_engine_has_priorities(scheduler, whose, expected) -> None:
    async def test():
        fleet = {**FLEET, "pools": [{**FLEET["pools"][0], "scheduler": scheduler}]}
        async with stand(good, fleet=fleet, priority=whose, default_class="bulk") as (gate, replicas):
            await gate.post({**BODY, "priority": 1})
            assert replicas[0].bodies[0]["priority"] == expected

    run(test())


def test_early_refusal_says_when_to_come_again() -> None:
    async def test():
        async with (
            gateway_for() as gate,
            gate.session.put(
                gate.control_url + "/control/decision", json={"max_batch_size": {}, "admission": {"chat": 1.0}}
            ) as answer,
        ):
            assert answer.status == 204
            async with gate.session.post(gate.url + "/v1/completions", json=BODY) as response:
                assert response.status == 429
                assert 55 <= int(response.headers["Retry-After"]) <= 61  # a start-up, less the SLO
            assert gate.count("refused") == 1

    run(test())


def test_caps_hold_and_held_requests_go_when_a_place_is_free() -> None:
    release = asyncio.Event()
    open_now = 0

    async def waits(_request, write):
        nonlocal open_now
        open_now += 1
        assert open_now <= 2
        await write(token(" a"))
        await release.wait()
        open_now -= 1
        await write(token(" b", "stop") + DONE)

    async def test():
        async with stand(waits) as (gate, replicas):
            tasks = [asyncio.create_task(gate.post()) for _ in range(5)]
            await gate.until(lambda: gate.count("queue_length") == 3 and len(replicas[0].bodies) == 2)
            release.set()
            assert {status for status, _ in await asyncio.gather(*tasks)} == {200}
            assert gate.count("met") == 5

    run(test())


def test_shutting_down_cuts_no_stream() -> None:
    release = asyncio.Event()

    async def waits(_request, write):
        await write(token(" a"))
        await release.wait()
        await write(token(" b", "stop") + DONE)

    async def test():
        async with stand(waits) as (gate, _):
            task = asyncio.create_task(gate.post())
            await gate.until(lambda: gate.count("first_tokens") == 1)
            draining = asyncio.create_task(gate.gateway.drain())
            await gate.until(lambda: gate.gateway.proxy.closing)
            assert (await gate.post())[0] == 503
            async with gate.session.get(gate.url + "/health") as health:
                assert health.status == 503
            assert not draining.done()
            release.set()
            assert await task == (200, token(" a") + token(" b", "stop") + DONE)
            assert await draining == 0

    run(test())


def test_the_controllers_routes(monkeypatch) -> None:
    monkeypatch.setenv("CONTROL_KEY", "c" * 32)

    async def test():
        async with stand(good, control_key="env:CONTROL_KEY", replicas=[]) as (gate, replicas):
            control = gate.control_url + "/control"
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                async with gate.session.get(control + "/snapshot", headers=headers) as answer:
                    assert answer.status == 401
            key = {"Authorization": "Bearer " + "c" * 32}
            async with replicas[0].serve() as url:
                listed = {"replicas": [{"replica_id": "a", "pool": "pool", "url": url, "phase": "ready"}]}
                async with gate.session.put(control + "/replicas", json=listed, headers=key) as answer:
                    assert answer.status == 204
                assert (await gate.post())[0] == 200
            async with gate.session.get(control + "/snapshot", headers=key) as answer:
                snapshot = GatewaySnapshot.model_validate_json(await answer.read())
            assert snapshot.in_flight_by_replica == {"a": 0}
            assert snapshot.classes["chat"].ttft.count == 1
            listed["replicas"][0]["pool"] = "poll"
            async with gate.session.put(control + "/replicas", json=listed, headers=key) as answer:
                assert answer.status == 422
                assert "did you mean 'pool'" in (await answer.json())["error"]
            async with gate.session.put(control + "/decision", data=b"{", headers=key) as answer:
                assert answer.status == 422
            async with gate.session.get(gate.control_url + "/metrics") as answer:
                page = await answer.text()
            assert 'rl_autoscale_gateway_ended_total{class="chat",outcome="finished"} 1.0' in page
            assert 'rl_autoscale_gateway_ttft_seconds_bucket{class="chat",le="+Inf"} 1.0' in page

    run(test())


def test_the_controllers_client_understands_the_gateway() -> None:
    async def test():
        async with gateway_for("http://127.0.0.1:1") as gate:
            client = HttpGateway(gate.control_url)
            snapshot = await asyncio.to_thread(client.snapshot)
            assert snapshot.in_flight_by_replica == {"r0": 0}
            decision = GatewayDecision(max_batch_size={"pool": 7}, admission={"chat": 0.5, "bulk": None})
            await asyncio.to_thread(client.put_decision, decision)
            await asyncio.to_thread(client.put_replicas, ReplicaList(replicas=()))
            snapshot = await asyncio.to_thread(client.snapshot)
            assert snapshot.pools["pool"].batch_cap == 7
            assert (snapshot.classes["chat"].admission, snapshot.classes["bulk"].admission) == (0.5, None)
            assert snapshot.in_flight_by_replica == {}

    run(test())


def test_models_come_from_a_replica() -> None:
    async def models(_request):
        return web.json_response({"data": [{"id": "m"}]})

    async def test():
        from serving_tools import listening

        app = web.Application()
        app.router.add_get("/v1/models", models)
        async with (
            listening(app) as url,
            gateway_for("http://127.0.0.1:1", url) as gate,
            gate.session.get(gate.url + "/v1/models") as answer,
        ):
            assert (answer.status, await answer.json()) == (200, {"data": [{"id": "m"}]})
        async with gateway_for() as gate, gate.session.get(gate.url + "/v1/models") as answer:
            assert answer.status == 503

    run(test())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls(tmp_path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=127.0.0.1", "-days", "2"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)

    async def test():
        tls = {"certificate": str(certificate), "private_key": str(key)}
        async with stand(good, tls=tls) as (gate, _):
            gate.url = gate.url.replace("http:", "https:")
            trusted = ssl.create_default_context(cafile=str(certificate))
            assert await gate.post(ssl=trusted) == (200, ANSWER + DONE)

    run(test())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"control_host": "0.0.0.0"}, "reachable from outside and has no control_key"),
        ({"default_class": "chatty"}, "is no class of the fleet"),
        ({"api_keys": [{"name": "a", "key": "plain"}]}, "a secret is named, not written"),
        ({"class_routes": {"later/": "bulk"}}, "must begin with /"),
    ],
)
def test_configurations_that_cannot_be(settings, message) -> None:
    with pytest.raises(SpecError, match=message):
        GatewayConfig.from_dict({"fleet": FLEET, **settings})


def test_a_config_file_may_name_a_scenario(tmp_path) -> None:
    import yaml

    (tmp_path / "scenario.yaml").write_text(yaml.safe_dump({"name": "s", "fleet": FLEET}))
    (tmp_path / "gateway.yaml").write_text("fleet: scenario.yaml\nport: 9000\n")
    config = GatewayConfig.from_file(tmp_path / "gateway.yaml")
    assert (config.port, config.fleet.class_names) == (9000, ("chat", "bulk"))
