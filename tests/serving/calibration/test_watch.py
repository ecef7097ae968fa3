"""Watching a server in use gives back the iteration times of the engine behind it; the load is somebody else's."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="needs the serve extra")

from virtual_engine import VirtualServer, in_virtual_time

from rl_autoscale.experiments.calibration import fit_watched
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.serving.calibration.server import HttpServer
from rl_autoscale.serving.calibration.watch import watch, watched_rows
from rl_autoscale.serving.emulator.server import Emulator, EmulatorConfig
from rl_autoscale.sim.fit import Hardware

POOL = PoolSpec(name="e", profile="llama-3.1-8b_a100_tp1", max_num_seqs=64, max_num_batched_tokens=2048, kv_blocks=8000)
HARDWARE = Hardware("x", "m", "A100", 1, POOL.num_kv_blocks, 64, 2048, "test")


async def traffic(server: VirtualServer, per_s: float, seconds: float, rng: np.random.Generator) -> None:
    """Poisson arrivals whose rate goes up and down, so that batches of many sizes occur."""

    async def one(prompt: int, output: int) -> None:
        async for _ in server.stream([1] * prompt, output):
            pass

    async with asyncio.TaskGroup() as group:
        clock = asyncio.get_running_loop().time
        while clock() < seconds:
            swing = 1.0 + 0.9 * np.sin(clock() / 20.0)
            await asyncio.sleep(rng.exponential(1.0 / (per_s * swing)))
            group.create_task(one(int(rng.lognormal(5.5, 0.9)) + 8, int(rng.lognormal(4.6, 0.7)) + 2))


@cache
def watched(per_s: float = 2.0, seconds: float = 100.0):
    async def test():
        server = VirtualServer(POOL)
        load = asyncio.create_task(traffic(server, per_s, seconds, np.random.default_rng(0)))
        seen = await watch(server, seconds, 0.25)
        sent = server.num_sent
        await load
        server.stop()
        return seen, sent

    return in_virtual_time(test)


def test_nothing_is_sent_and_looks_are_evenly_spaced() -> None:
    async def test():
        server = VirtualServer(POOL)
        seen = await watch(server, 10.0, 0.5)
        assert server.num_sent == 0
        server.stop()
        return seen

    seen = in_virtual_time(test)
    assert np.diff([item.at_s for item in seen]) == pytest.approx(0.5)
    assert watched_rows(seen, 2048) == []


def test_rows_are_the_engines_iterations() -> None:
    seen, num_requests = watched()
    rows = watched_rows(seen, 2048)
    decode = [row for row in rows if not row["prefill_chunk_tokens"]]
    prompts = [row for row in rows if row["prefill_chunk_tokens"]]
    assert len(decode) > 50
    assert len(prompts) > 0.05 * num_requests > 8
    errors = {}
    for kind, chosen in (("decode", decode), ("prompt", prompts)):
        found = []
        for row in chosen:
            chunk, batch = int(row["prefill_chunk_tokens"]), int(row["decode_batch_size"])
            chunks = ((chunk, int(row["prefill_kv_context"])),) if chunk else ()
            context = batch * row["mean_decode_context"]
            truth_s = POOL.hardware.iteration_s(num_decode=batch, decode_context_tokens=context, chunks=chunks)
            found.append(abs(row["iter_time_ms"] / 1e3 / truth_s - 1.0))
        errors[kind] = np.quantile(found, [0.5, 0.95])
    assert errors["decode"] == pytest.approx([0.0, 0.0], abs=0.02)
    assert errors["prompt"][0] < 0.01


def test_the_fitted_profile_is_the_engines_within_what_was_seen() -> None:
    seen, _ = watched()
    rows = watched_rows(seen, 2048)
    profile, num_left_out = fit_watched(rows, HARDWARE, np.random.default_rng(1))
    batches = [row["decode_batch_size"] for row in rows]
    longest = int(max(row["prefill_chunk_tokens"] for row in rows))
    errors = {}
    for batch in (1, 4, int(np.quantile(batches, 0.95))):
        for context in (200, 600):
            asked = {"num_decode": batch, "decode_context_tokens": batch * context}
            errors[batch, context, 0] = profile.iteration_s(**asked) / POOL.hardware.iteration_s(**asked) - 1.0
            for chunk in (50, 300, int(0.8 * longest), longest):
                more = asked | {"chunks": ((chunk, 0),)}
                errors[batch, context, chunk] = profile.iteration_s(**more) / POOL.hardware.iteration_s(**more) - 1.0
    print(len(rows), num_left_out, profile.fit_error, {key: f"{value:+.1%}" for key, value in errors.items()})
    assert np.median(np.abs(list(errors.values()))) < 0.02
    assert max(np.abs(list(errors.values()))) < 0.10


def test_moments_that_are_not_what_they_look_like_do_not_bend_the_fit() -> None:
    rng = np.random.default_rng(3)
    rows = [dict(row) for row in watched_rows(watched()[0], 2048)]
    for row in rows:
        if rng.random() < 0.08:
            row["iter_time_ms"] *= rng.uniform(1.3, 3.0)
    profile, num_left_out = fit_watched(rows, HARDWARE, rng)
    assert num_left_out > 0.03 * len(rows)
    for asked in ({"num_decode": 3, "decode_context_tokens": 900}, {"chunks": ((300, 0),)}):
        assert profile.iteration_s(**asked) == pytest.approx(POOL.hardware.iteration_s(**asked), rel=0.02)


def test_too_little_traffic_is_told_from_a_fit() -> None:
    with pytest.raises(SpecError, match="no moment showed a single iteration"):
        fit_watched([], HARDWARE, np.random.default_rng(0))


def test_a_server_that_falls_silent_ends_the_watch_and_one_missed_look_does_not() -> None:
    async def test():
        server = VirtualServer(POOL)
        whole, calls = server.look, 0

        async def failing():
            nonlocal calls
            calls += 1
            if calls == 3 or calls > 10:
                raise SpecError("status 503")
            return await whole()

        server.look = failing
        with pytest.raises(SpecError, match="503"):
            await watch(server, 100.0, 1.0)
        server.stop()
        return calls

    assert in_virtual_time(test) == 15


def test_the_command_watches_a_server_that_others_use() -> None:
    """Over HTTP in real seconds; the load is a few streams of somebody else."""
    from rl_autoscale.cli.calibrate import Settings
    from rl_autoscale.cli.calibrate_watch import calibrate_by_watching

    async def stranger(server: HttpServer, seconds: float) -> None:
        rng = np.random.default_rng(0)
        clock = asyncio.get_running_loop().time
        end_s = clock() + seconds
        while clock() < end_s:
            async for _ in server.stream([1] * int(rng.integers(20, 600)), int(rng.integers(4, 12))):
                pass

    async def test():
        config = EmulatorConfig.from_dict({"engine": POOL.model_dump(), "port": 0, "max_model_len": 8192})
        settings = Settings("", "A100", 1, 64, 2048, None, None, 4, 1, 0.0, 0)
        async with asyncio.timeout(60), Emulator(config) as emulator, HttpServer(emulator.url) as server:
            load = asyncio.create_task(stranger(server, 6.0))
            profile = await calibrate_by_watching(replace(settings, url=emulator.url), 5.0, 0.05)
            await load
        return profile

    profile = asyncio.run(test())
    assert profile.model == "emulated"
    assert "moments of decode (1 to 1 sequences)" in profile.notes
    asked = {"num_decode": 1, "decode_context_tokens": 300}
    assert profile.iteration_s(**asked) == pytest.approx(POOL.hardware.iteration_s(**asked), rel=0.05)
