"""Real processes: a replica is killed in the middle of its work, and every client hears how its request ended."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter

import pytest

pytest.importorskip("aiohttp", reason="needs the serve extra")

from serving_tools import gateway_for

pytestmark = pytest.mark.live

RUN = "from rl_autoscale.cli.root import main; main()"
NUM_CLIENTS = 24


async def start_emulator() -> tuple[asyncio.subprocess.Process, str]:
    options = ["emulate", "--profile", "llama-3.1-8b_a100_tp1", "--port", "0", "--max-num-seqs", "4"]
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", RUN, *options, stderr=-1)
    return process, (await process.stderr.readline()).decode().split()[-1]


def test_kill_9_mid_stream_loses_no_request_silently() -> None:
    async def client(gate) -> str:
        body = {"prompt": [1] * 50, "max_tokens": 100, "ignore_eos": True, "stream": True}
        status, answer = await gate.post(body)
        assert status == 200
        assert answer.endswith(b"data: [DONE]\n\n")
        events = [json.loads(event[6:]) for event in answer.split(b"\n\n")[:-2]]
        if "error" in events[-1]:
            assert len(events) > 1, "a request without a token is tried elsewhere"
            return "failed"
        assert sum(choice["text"].count("word") for event in events for choice in event["choices"]) == 100
        return "finished"

    async def test() -> None:
        (doomed, first_url), (other, second_url) = await asyncio.gather(start_emulator(), start_emulator())
        fleet_cap = {"max_batch_size": {"pool": 6}, "admission": {}}  # more than the engine's batch: some wait inside
        try:
            async with gateway_for(first_url, second_url) as gate:
                async with gate.session.put(gate.control_url + "/control/decision", json=fleet_cap) as answer:
                    assert answer.status == 204
                clients = [asyncio.create_task(client(gate)) for _ in range(NUM_CLIENTS)]
                await gate.until(lambda: gate.count("first_tokens") >= 8)
                await asyncio.sleep(0.2)
                doomed.kill()
                ends = Counter(await asyncio.gather(*clients))
                assert ends == {"failed": 4, "finished": NUM_CLIENTS - 4}
                assert (gate.count("failed"), gate.count("finished")) == (4, NUM_CLIENTS - 4)
        finally:
            for process in (doomed, other):
                if process.returncode is None:
                    process.kill()
                await process.wait()

    asyncio.run(asyncio.wait_for(test(), 120.0))
