"""The emulator's server: vLLM's routes, streams, names and habits."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("aiohttp", reason="needs the serve extra")

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from serving_tools import PATIENCE_S, gateway_for, run

from rl_autoscale.serving.emulator.server import Emulator, EmulatorConfig

ENGINE = {"name": "e", "profile": "llama-3.1-8b_h100_tp1"}

# What a scrape of a text server of vLLM 0.33 without optional features holds: name without _total -> type.
VLLM_SERIES = {
    "gauge": """num_requests_running num_requests_waiting num_requests_waiting_by_reason engine_sleep_state
        kv_cache_usage_perc cache_config_info""",
    "counter": """prefix_cache_queries prefix_cache_hits external_prefix_cache_queries external_prefix_cache_hits
        mm_cache_queries mm_cache_hits num_preemptions prompt_tokens prompt_tokens_by_source prompt_tokens_cached
        prompt_tokens_cached_by_source generation_tokens request_success admission_rejections""",
    "histogram": """request_prompt_tokens request_generation_tokens iteration_tokens_total
        request_max_num_generation_tokens request_params_n request_params_max_tokens time_to_first_token_seconds
        inter_token_latency_seconds request_time_per_output_token_seconds e2e_request_latency_seconds
        request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds
        request_decode_time_seconds request_num_preemptions request_prefill_kv_computed_tokens""",
}


class Stand:
    def __init__(self, emulator: Emulator, session: aiohttp.ClientSession) -> None:
        self.emulator = emulator
        self.session = session

    async def post(self, body: dict, path: str = "/v1/completions") -> tuple[int, bytes]:
        async with self.session.post(self.emulator.url + path, json=body) as response:
            return response.status, await response.read()

    async def metrics(self) -> dict:
        async with self.session.get(self.emulator.url + "/metrics") as response:
            return {f.name: f for f in text_string_to_metric_families(await response.text())}

    async def value(self, name: str, **labels: str) -> float:
        families = await self.metrics()
        return next(
            sample.value
            for family in families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@asynccontextmanager
async def emulating(**settings):
    config = EmulatorConfig.from_dict({"engine": ENGINE, "port": 0, "speed": 50.0, **settings})
    async with asyncio.timeout(PATIENCE_S), Emulator(config) as emulator, aiohttp.ClientSession() as session:
        yield Stand(emulator, session)


def events(body: bytes) -> list[dict]:
    assert body.endswith(b"data: [DONE]\n\n")
    return [json.loads(event[6:]) for event in body.split(b"\n\n")[:-2]]


def test_series_have_vllms_names_and_types() -> None:
    async def test():
        async with emulating() as stand:
            await stand.post({"prompt": "x", "max_tokens": 3})
            found = {name: family.type for name, family in (await stand.metrics()).items()}
            made = {name for name in found if name.endswith("_created")}
            expected = {f"vllm:{name}": kind for kind, names in VLLM_SERIES.items() for name in names.split()}
            assert {name: kind for name, kind in found.items() if name not in made} == expected
            assert all(found[name] == "gauge" for name in made)

    run(test())


def test_counts_after_one_request() -> None:
    async def test():
        async with emulating() as stand:
            await stand.post({"prompt": [7] * 100, "max_tokens": 20, "ignore_eos": True})
            assert await stand.value("vllm:prompt_tokens_total") == 100
            assert await stand.value("vllm:generation_tokens_total") == 20
            assert await stand.value("vllm:request_success_total", finished_reason="length") == 1
            assert await stand.value("vllm:inter_token_latency_seconds_count") == 19
            assert await stand.value("vllm:time_to_first_token_seconds_count") == 1
            assert await stand.value("vllm:iteration_tokens_total_sum") == 119
            assert await stand.value("vllm:num_requests_running") == 0
            assert await stand.value("vllm:kv_cache_usage_perc") == 0
            ttft_s = await stand.value("vllm:time_to_first_token_seconds_sum")
            assert ttft_s == pytest.approx(stand.emulator.engine.pool.hardware.iteration_s(chunks=((100, 0),)))

    run(test())


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_and_its_usage(chat) -> None:
    async def test():
        async with emulating() as stand:
            prompt = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": [1, 2, 3]}
            body = {
                **prompt,
                "max_tokens": 5,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            status, answer = await stand.post(body, "/v1/chat/completions" if chat else "/v1/completions")
            said = events(answer)
            texts = [c["delta"]["content"] if chat else c["text"] for event in said for c in event["choices"]]
            assert (status, "".join(texts)) == (200, " word" * 5)
            assert said[-2]["choices"][0]["finish_reason"] == "length"
            assert said[-1]["choices"] == []
            assert said[-1]["usage"]["completion_tokens"] == 5

    run(test())


def test_without_ignore_eos_answers_end_by_themselves() -> None:
    async def test():
        async with emulating(mean_output_tokens=5, speed=1000) as stand:
            tokens = []
            for _ in range(20):
                _, answer = await stand.post({"prompt": "x", "max_tokens": 500})
                said = json.loads(answer)
                assert said["choices"][0]["finish_reason"] == "stop"
                tokens.append(said["usage"]["completion_tokens"])
            assert len(set(tokens)) > 3
            _, answer = await stand.post({"prompt": "x", "max_tokens": 1})
            assert json.loads(answer)["choices"][0]["finish_reason"] == "length"

    run(test())


def test_what_does_not_fit_is_refused_or_cut() -> None:
    async def test():
        async with emulating(max_model_len=50, speed=1000) as stand:
            assert (await stand.post({"prompt": [1] * 50}))[0] == 400
            _, answer = await stand.post({"prompt": [1] * 40, "max_tokens": 100, "ignore_eos": True})
            assert json.loads(answer)["usage"]["completion_tokens"] == 10
            for wrong in ({"n": 2}, {"max_tokens": 0}, {"max_tokens": "3"}, {"priority": 1.5}):
                assert (await stand.post({"prompt": "x", **wrong}))[0] == 400
            assert (await stand.post({"prompt": "x", "model": "another"}))[0] == 404

    run(test())


def test_a_client_that_goes_away_frees_its_place() -> None:
    async def test():
        async with emulating(speed=1.0) as stand:
            body = {"prompt": "x", "max_tokens": 10_000, "ignore_eos": True, "stream": True}
            async with stand.session.post(stand.emulator.url + "/v1/completions", json=body) as response:
                await response.content.readany()
                assert stand.emulator.engine.num_running == 1
                response.close()
            while stand.emulator.engine.num_running:
                await asyncio.sleep(0.005)
            assert stand.emulator.loop.num_open == 0
            assert await stand.value("vllm:request_success_total", finished_reason="length") == 0

    run(test())


def test_a_full_engine_says_503() -> None:
    async def test():
        async with emulating(max_queued=1, speed=1.0) as stand:
            body = {"prompt": "x", "max_tokens": 10_000, "ignore_eos": True, "stream": True}
            async with stand.session.post(stand.emulator.url + "/v1/completions", json=body):
                assert (await stand.post(body))[0] == 503
            assert await stand.value("vllm:admission_rejections_total", reason="max_num_queued_reqs") == 1

    run(test())


def test_a_draining_engine_looks_healthy_and_gives_new_streams_nothing() -> None:
    async def test():
        async with emulating(drain_s=1000, speed=2.0) as stand:
            body = {"prompt": "x", "max_tokens": 30, "ignore_eos": True, "stream": True}
            running = asyncio.create_task(stand.post(body))
            while not stand.emulator.engine.num_running:
                await asyncio.sleep(0.005)
            draining = asyncio.create_task(stand.emulator.drain())
            await asyncio.sleep(0)
            async with stand.session.get(stand.emulator.url + "/health") as health:
                assert health.status == 200
            assert await stand.post(body) == (200, b"data: [DONE]\n\n")
            assert len(events((await running)[1])) == 30
            await draining

    run(test())


def test_priority_goes_first() -> None:
    async def test():
        engine = {**ENGINE, "scheduler": "vllm-priority", "max_num_seqs": 1}
        async with emulating(engine=engine, speed=20.0) as stand:
            order = []

            async def ask(priority):
                await stand.post({"prompt": "x", "max_tokens": 20, "ignore_eos": True, "priority": priority})
                order.append(priority)

            tasks = [asyncio.create_task(ask(priority)) for priority in (0, 9, 5, 1)]
            await asyncio.gather(*tasks)
            assert order == [0, 1, 5, 9]

    run(test())


def test_a_prompt_that_begins_as_another_is_partly_cached() -> None:
    async def test():
        engine = {**ENGINE, "prefix_caching": True}
        async with emulating(engine=engine) as stand:
            for prompt in ([1] * 100, [1] * 100, [1] * 50 + [2] * 50, [3] * 100):
                await stand.post({"prompt": prompt, "max_tokens": 3, "ignore_eos": True})
            hits = 6 * 16 + 3 * 16  # six full blocks of the same prompt, three of the one that differs after 50 tokens
            for name, found in {
                "vllm:prefix_cache_queries_total": 400,
                "vllm:prefix_cache_hits_total": hits,
                "vllm:prompt_tokens_total": 400,
                "vllm:prompt_tokens_cached_total": hits,
                "vllm:request_prefill_kv_computed_tokens_sum": 400 - hits,
            }.items():
                assert await stand.value(name) == found, name
            assert await stand.value("vllm:prompt_tokens_by_source_total", source="local_compute") == 400 - hits
            assert await stand.value("vllm:prompt_tokens_cached_by_source_total", source="device") == hits
            assert await stand.value("vllm:cache_config_info", enable_prefix_caching="True") == 1
            assert await stand.value("vllm:kv_cache_usage_perc") == 0
            assert stand.emulator.engine.cached_tokens == {}

    run(test())


def test_through_the_gateway() -> None:
    async def test():
        async with emulating() as stand, gateway_for(stand.emulator.url) as gate:
            body = {"prompt": [1] * 40, "max_tokens": 6, "ignore_eos": True, "stream": True}
            answers = await asyncio.gather(*(gate.post(body) for _ in range(8)))
            assert [len(events(answer)) for _, answer in answers] == [6] * 8
            assert gate.count("finished") == 8
            assert gate.gateway.snapshot().classes["chat"].finished_output_tokens == 48
            assert await stand.value("vllm:request_success_total", finished_reason="length") == 8

    run(test())


@pytest.mark.live
def test_the_command_starts_serves_and_leaves_on_sigterm() -> None:
    async def test():
        import sys

        code = "from rl_autoscale.cli.root import main; main()"
        options = ["emulate", "--profile", "llama-3.1-8b_h100_tp1", "--port", "0", "--speed", "50", "--startup-s", "1"]
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, *options, stderr=-1)
        line = (await process.stderr.readline()).decode()
        assert line.startswith("Application startup complete")
        async with aiohttp.ClientSession() as session, session.get(line.split()[-1] + "/health") as health:
            assert health.status == 200
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0

    run(test())
