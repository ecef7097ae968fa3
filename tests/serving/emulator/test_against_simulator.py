"""The emulator's clockwork against the simulator: the same arrivals, the same times to first token and per token.

The event loop's time is virtual, so nothing waits and nothing depends on the machine.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from virtual_engine import VirtualServer, in_virtual_time

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.serving.emulator.loop import Job
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.sim.reference.request import Request
from rl_autoscale.workload.trace import FloatArray, Workload

SPEC = FleetSpec.from_dict(
    {
        "pools": [{"name": "pool", "profile": "llama-3.1-8b_a100_tp1", "max_num_seqs": 16, "kv_blocks": 400}],
        "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}],
    }
)


NUM_REQUESTS = 80
CACHING = FleetSpec.from_dict(
    {
        "pools": [{**SPEC.pools[0].model_dump(), "prefix_caching": True}],
        "classes": [SPEC.classes[0].model_dump()],
    }
)


def play(spec: FleetSpec, like: list[Request], arrival_s: FloatArray, speed: float) -> list[Request]:
    requests = [
        Request(r.index, 0, r.service_class, 0.0, r.prompt_tokens, r.output_tokens, (), r.shared_keys) for r in like
    ]

    async def client(server: VirtualServer, request: Request, at_s: float) -> None:
        await asyncio.sleep(at_s / speed)
        job = Job(request, request.output_tokens, True)
        async for _ in server.play(job):
            pass
        request.end_s = job.last_token_s

    async def main() -> None:
        server = VirtualServer(spec.pools[0], speed)
        await asyncio.gather(
            *(client(server, request, float(s)) for request, s in zip(requests, arrival_s, strict=True))
        )
        server.stop()

    in_virtual_time(main)
    return requests


@pytest.mark.parametrize("spec", [SPEC, CACHING], ids=["plain", "prefix caching"])
@pytest.mark.parametrize(("per_s", "speed"), [(2.0, 7.0), (8.0, 1.0)])
def test_times_are_the_simulators(spec, per_s, speed) -> None:
    rng = np.random.default_rng(5)
    arrival_s = np.cumsum(rng.exponential(1 / per_s, NUM_REQUESTS))
    prompt_tokens = rng.integers(50, 900, NUM_REQUESTS, dtype=np.int32)
    num_hashes = -(-prompt_tokens // 64)
    workload = Workload(
        arrival_s,
        prompt_tokens,
        rng.integers(2, 200, NUM_REQUESTS, dtype=np.int32),
        np.zeros(NUM_REQUESTS, dtype=np.int16),
        ("chat",),
        float(arrival_s[-1]) + 1.0,
        # one of three beginnings each, as far as the prompt goes
        hash_ids=np.concatenate([100 * (q % 3) + np.arange(n) for q, n in enumerate(num_hashes)]),
        hash_offsets=np.concatenate([[0], np.cumsum(num_hashes)]),
        hash_block_tokens=64,
    )
    fleet = ReferenceFleet(spec, workload)
    while fleet.advance():
        pass
    fleet.result()
    played = play(spec, fleet.requests, workload.arrival_s, speed)

    def times(requests):
        ttft_s = np.array([r.first_token_s - r.arrival_s for r in requests])
        tpot_s = np.array([(r.end_s - r.first_token_s) / (r.output_tokens - 1) for r in requests])
        return ttft_s, tpot_s

    for found, expected in zip(times(played), times(fleet.requests), strict=True):
        assert found.mean() == pytest.approx(expected.mean(), rel=0.01)
        assert np.median(np.abs(found / expected - 1.0)) < 0.01
        assert np.quantile(np.abs(found / expected - 1.0), 0.95) < 0.05
