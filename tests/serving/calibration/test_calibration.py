"""Calibration gives back the iteration times of the emulator that it measured.

The engine runs in virtual time, without sockets: nothing waits and nothing depends on the machine.
"""

from __future__ import annotations

import asyncio
from functools import cache

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="needs the serve extra")

from virtual_engine import VirtualServer, in_virtual_time

from rl_autoscale.experiments.calibration import (
    REGIMES,
    HoldOutLoad,
    draw_load,
    fit_rows,
    hold_out_errors,
    prompts_to_measure,
    startup_phase,
)
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.profile import LatencyProfile, load_profile
from rl_autoscale.serving.calibration.load import Bench, Limits, Plan, decode_points, prompt_lengths
from rl_autoscale.serving.calibration.server import HttpServer, read_page
from rl_autoscale.serving.emulator.server import Emulator, EmulatorConfig
from rl_autoscale.sim.fit import Hardware

POOL = PoolSpec(name="e", profile="llama-3.1-8b_a100_tp1", max_num_seqs=64, max_num_batched_tokens=2048, kv_blocks=8000)
LIMITS = Limits(64, 2048, 8192, 8000 * 16)
PLAN = Plan(prompts_to_measure(2048), repeats=2, tokens=12, max_batch=32)


def hardware(limits: Limits = LIMITS) -> Hardware:
    return Hardware("x", "m", "A100", 1, POOL.num_kv_blocks, limits.max_num_seqs, limits.max_num_batched_tokens, "test")


@cache
def calibrated(speed: float = 1.0) -> tuple[LatencyProfile, list[dict[str, float]]]:
    async def test():
        server = VirtualServer(POOL, speed)
        rows = await Bench(server, LIMITS, PLAN, np.random.default_rng(0)).measure()
        assert (await server.look()).running == 0  # what was not read to its end was taken back
        server.stop()
        return rows

    rows = in_virtual_time(test)
    return fit_rows(rows, hardware()), rows


@pytest.mark.parametrize("speed", [1.0, 20.0])
def test_the_rows_are_the_emulators_iterations_whatever_its_speed(speed) -> None:
    _, rows = calibrated(speed)
    assert sorted({row["prefill_kv_context"] for row in rows}) == [0, 2048, 4096]
    assert sorted({row["decode_batch_size"] for row in rows}) == [0, 1, 2, 4, 8, 16, 32]
    for row in rows:
        chunk, batch = int(row["prefill_chunk_tokens"]), int(row["decode_batch_size"])
        expected = POOL.hardware.iteration_s(
            num_decode=batch,
            decode_context_tokens=batch * row["mean_decode_context"],
            chunks=((chunk, int(row["prefill_kv_context"])),) if chunk else (),
        )
        assert row["iter_time_ms"] / 1e3 == pytest.approx(expected, rel=0.01)


def test_the_fitted_profile_gives_back_times_that_were_not_measured() -> None:
    profile, _ = calibrated()
    errors = []
    for batch, context, chunk in [(3, 300, 0), (12, 700, 0), (30, 1000, 0), (0, 0, 100), (0, 0, 1500), (10, 500, 700)]:
        asked = {"num_decode": batch, "decode_context_tokens": batch * context}
        asked["chunks"] = ((chunk, 0),) if chunk else ()
        errors.append(abs(profile.iteration_s(**asked) / POOL.hardware.iteration_s(**asked) - 1.0))
    assert np.median(errors) < 0.02
    assert max(errors) < 0.06
    assert profile.fit_error["decode_mean"] < 0.02


@pytest.mark.parametrize("regime", REGIMES)
def test_the_hold_out_is_predicted(regime) -> None:
    profile, _ = calibrated()
    load = draw_load(profile, REGIMES[regime], 8192, np.random.default_rng(1), span_s=20.0)

    async def test():
        server = VirtualServer(POOL)
        bench = Bench(server, LIMITS, PLAN, np.random.default_rng(2))
        served = await bench.random_load(
            load.arrival_s.tolist(), load.prompt_tokens.tolist(), load.output_tokens.tolist()
        )
        server.stop()
        return served

    served = in_virtual_time(test)
    columns = {name: np.array([getattr(item, name) for item in served]) for name in served[0].__slots__}
    sent = HoldOutLoad(columns["arrival_s"], columns["prompt_tokens"], columns["output_tokens"])
    errors = {e.metric: e for e in hold_out_errors(profile, sent, columns["first_token_s"], columns["end_s"])}
    assert errors["ttft_s"].num_requests == len(load.arrival_s) >= 12
    assert errors["ttft_s"].request_median < 0.1
    assert errors["tpot_s"].request_median < 0.05


def test_a_stranger_is_noticed() -> None:
    async def test():
        server = VirtualServer(POOL)
        bench = Bench(server, LIMITS, PLAN, np.random.default_rng(0))

        async def stranger():
            async for _ in server.stream([1] * 50, 3000):
                pass

        task = asyncio.create_task(stranger())
        await asyncio.sleep(0.1)
        try:
            with pytest.raises(SpecError, match="calibrate an idle replica"):
                await bench.measure()
        finally:
            task.cancel()
            server.stop()

    in_virtual_time(test)


def test_an_error_of_one_stream_ends_all_of_them() -> None:
    async def test():
        server = VirtualServer(POOL)
        whole = server.stream
        calls = 0

        async def failing(prompt, max_tokens):
            nonlocal calls
            calls += max_tokens > 1
            if calls == 4:
                raise SpecError("status 503")
            async for new in whole(prompt, max_tokens):
                yield new

        server.stream = failing
        with pytest.raises(SpecError, match="status 503"):
            await Bench(server, LIMITS, PLAN, np.random.default_rng(0)).measure()
        await asyncio.sleep(0)
        assert server.loop.num_open == 0
        server.stop()

    in_virtual_time(test)


def test_load_stays_within_the_engine() -> None:
    tight = Limits(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=600, kv_tokens=4000)
    assert prompt_lengths(tight, Plan((16, 100, 600))) == [16, 100, 512]
    points = decode_points(tight, Plan((16,)))
    assert max(batch for batch, _ in points) <= 7
    assert all(prompt == 64 for _, prompt in points)


@pytest.mark.parametrize("page", ["", "vllm:num_requests_running 0\n"])
def test_a_page_without_the_needed_series_is_refused(page) -> None:
    with pytest.raises(SpecError, match="request_prefill_time_seconds"):
        read_page(page, "http://x/metrics")


def test_start_times_make_a_phase() -> None:
    phase = startup_phase([50.0, 60.0, 70.0])
    assert (phase.mean_s, phase.cv) == (60.0, pytest.approx(1 / 6, abs=1e-3))
    with pytest.raises(SpecError, match="positive"):
        startup_phase([0.0])


def test_over_http() -> None:
    """The same against the emulator's web server, ten times faster than real time."""

    async def test():
        config = EmulatorConfig.from_dict(
            {"engine": POOL.model_dump(), "port": 0, "speed": 10.0, "max_model_len": 8192}
        )
        async with asyncio.timeout(30), Emulator(config) as emulator, HttpServer(emulator.url + "/v1") as server:
            assert (server.model, server.max_model_len) == ("emulated", 8192)
            assert (await server.look()).kv_blocks == 8000
            plan = Plan((16, 100, 600), repeats=1, tokens=8, max_chunks=1, max_batch=2, contexts=(64,))
            rows = await Bench(server, LIMITS, plan, np.random.default_rng(0)).measure()
            singles = [row for row in rows if not row["decode_batch_size"]]
            assert len(singles) == 4
            for row in singles:
                expected = load_profile(POOL.profile).iteration_s(chunks=((int(row["prefill_chunk_tokens"]), 0),))
                assert row["iter_time_ms"] / 1e3 == pytest.approx(expected, rel=0.01)
            with pytest.raises(SpecError, match="status 400"):
                async for _ in server.stream([1] * 9000, 1):
                    pass

    asyncio.run(test())


def test_nobody_there() -> None:
    async def test():
        with pytest.raises(SpecError, match="is the server up"):
            async with HttpServer("http://127.0.0.1:9"):
                pass

    asyncio.run(test())


def test_the_command_writes_a_profile_with_its_provenance(tmp_path, monkeypatch) -> None:
    """Against the emulator, ten times faster than real time; the hold-out needs real seconds and is left out."""
    from rl_autoscale.cli.calibrate import Settings, calibrate
    from rl_autoscale.experiments import calibration
    from rl_autoscale.sim.profile_file import write_profile

    monkeypatch.setattr(calibration, "prompts_to_measure", lambda _: (16, 128, 512))

    async def test():
        settings = {"engine": POOL.model_dump(), "port": 0, "speed": 10.0, "max_model_len": 8192, "model": "org/Tiny"}
        asked = {"gpu": "A100", "tensor_parallel": 1, "max_num_seqs": 64, "max_num_batched_tokens": 2048}
        async with asyncio.timeout(60), Emulator(EmulatorConfig.from_dict(settings)) as emulator:
            more = {"kv_blocks": None, "name": None, "max_batch": 4, "repeats": 1, "hold_out_s": 0.0, "seed": 0}
            return await calibrate(Settings(url=emulator.url, **asked, **more))

    profile, errors = asyncio.run(test())
    assert errors == {}
    write_profile(profile, tmp_path / "x.yaml")
    read = load_profile(str(tmp_path / "x.yaml"))
    assert (read.name, read.model, read.kv_blocks) == ("tiny_a100_tp1", "org/Tiny", 8000)
    assert "measured on a live server" in read.source
    asked = {"num_decode": 3, "decode_context_tokens": 900}
    assert read.iteration_s(**asked) == pytest.approx(POOL.hardware.iteration_s(**asked), rel=0.05)
