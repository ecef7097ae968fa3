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
from rl_autoscale.workload.trace import Workload

SPEC = FleetSpec.from_dict(
    {
        "pools": [{"name": "pool", "profile": "llama-3.1-8b_a100_tp1", "max_num_seqs": 16, "kv_blocks": 400}],
        "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}],
    }
)


def play(workload: Workload, speed: float) -> list[Request]:
    requests = [
        Request(q, 0, SPEC.classes[0], 0.0, int(workload.prompt_tokens[q]), int(workload.output_tokens[q]))
        for q in range(workload.num_requests)
    ]

    async def client(server: VirtualServer, request: Request, arrival_s: float) -> None:
        await asyncio.sleep(arrival_s / speed)
        job = Job(request, request.output_tokens, True)
        async for _ in server.play(job):
            pass
        request.end_s = job.last_token_s

    async def main() -> None:
        server = VirtualServer(SPEC.pools[0], speed)
        await asyncio.gather(
            *(client(server, request, float(s)) for request, s in zip(requests, workload.arrival_s, strict=True))
        )
        server.stop()

    in_virtual_time(main)
    return requests


@pytest.mark.parametrize("speed", [1.0, 7.0])
@pytest.mark.parametrize("per_s", [2.0, 8.0])
def test_times_are_the_simulators(speed, per_s) -> None:
    rng = np.random.default_rng(5)
    arrival_s = np.cumsum(rng.exponential(1 / per_s, 150))
    workload = Workload(
        arrival_s,
        rng.integers(50, 900, 150, dtype=np.int32),
        rng.integers(2, 200, 150, dtype=np.int32),
        np.zeros(150, dtype=np.int16),
        ("chat",),
        float(arrival_s[-1]) + 1.0,
    )
    fleet = ReferenceFleet(SPEC, workload)
    while fleet.advance():
        pass
    fleet.result()
    played = play(workload, speed)

    def times(requests):
        ttft_s = np.array([r.first_token_s - r.arrival_s for r in requests])
        tpot_s = np.array([(r.end_s - r.first_token_s) / (r.output_tokens - 1) for r in requests])
        return ttft_s, tpot_s

    for found, expected in zip(times(played), times(fleet.requests), strict=True):
        assert found.mean() == pytest.approx(expected.mean(), rel=0.01)
        assert np.median(np.abs(found / expected - 1.0)) < 0.01
        assert np.quantile(np.abs(found / expected - 1.0), 0.95) < 0.05
