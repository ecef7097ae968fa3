"""Batch requests that give their places to interactive ones: whom it meets, and that nothing is lost by it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import numpy as np
import pytest
from aiohttp import web
from serving_tools import ANSWER, BODY, DONE, FLEET, PROFILE, run, stand, token
from virtual_fleet import VirtualFleet

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.serving.gateway.core import GatewayCore
from rl_autoscale.serving.gateway.tickets import State
from rl_autoscale.serving.gateway_api import GatewayDecision, ReplicaAddress
from rl_autoscale.sim.episode import draw_routing
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.workload.trace import Workload

CHAT, SOON, LATER = 0, 1, 2


def spec(**settings) -> FleetSpec:
    return FleetSpec.from_dict(
        {
            "pools": [
                {"name": "shared", "role": "mixed", "profile": PROFILE, "max_num_seqs": 2},
                {"name": "rest", "role": "batch", "profile": PROFILE, "max_num_seqs": 1},
            ],
            "classes": [
                {"name": "chat", "ttft_slo_s": 0.5, "tpot_slo_s": 0.1},
                {"name": "soon", "kind": "batch", "ttft_slo_s": 60, "tpot_slo_s": 1, "priority": 1, "timeout_s": 30.0},
                {"name": "later", "kind": "batch", "ttft_slo_s": 600, "tpot_slo_s": 1, "priority": 2},
            ],
            **settings,
        }
    )


def core_with(*names: str, max_evictions: int = 3, **settings) -> GatewayCore:
    core = GatewayCore(spec(**settings), random.Random(1).random, max_evictions=max_evictions)
    core.set_replicas([address(name) for name in names], 0.0)
    return core


def address(name: str, pool: str = "shared", phase: str = "ready") -> ReplicaAddress:
    return ReplicaAddress(replica_id=name, pool=pool, url=f"http://{name}", phase=phase)


def test_the_youngest_batch_request_is_held_again_before_those_that_wait() -> None:
    core, told = core_with("a"), []
    old, young, waiting = (core.arrive(LATER, 10, float(k), on_evict=lambda k=k: told.append(k)) for k in range(3))
    chat = core.arrive(CHAT, 10, 3.0)
    assert (old.state, chat.state, told) == (State.SENT, State.SENT, [1])
    assert list(core.classes[LATER].queue) == [young, waiting]
    assert (core.pools[0].evictions, young.num_evictions, core.pools[0].in_flight) == (1, 1, 2)


def test_the_least_urgent_class_comes_first() -> None:
    core = core_with("a")
    later, soon = core.arrive(LATER, 10, 0.0), core.arrive(SOON, 10, 1.0)
    core.arrive(CHAT, 10, 2.0)
    assert (later.state, soon.state) == (State.QUEUED, State.SENT)


def test_the_replica_with_the_most_batch_work_gives_it_up() -> None:
    core = core_with("a", "b")
    chat, *batch = (core.arrive(c, 10, 0.0) for c in (CHAT, LATER, LATER, LATER))
    newcomer = core.arrive(CHAT, 10, 1.0)
    assert newcomer.replica is not chat.replica
    assert [ticket.state for ticket in batch].count(State.QUEUED) == 1


def test_a_stream_whose_client_has_a_token_stays_and_so_does_an_answer_on_its_way() -> None:
    core = core_with("a")
    stream, whole = core.arrive(LATER, 10, 0.0), core.arrive(LATER, 10, 0.0, streams=False)
    core.see_token(stream, 0.5)
    core.keep(whole)
    assert core.arrive(CHAT, 10, 1.0).state is State.QUEUED
    assert {stream.state, whole.state} == {State.SENT}


def test_an_answer_in_one_piece_is_evicted_however_far_it_is() -> None:
    core = core_with("a")
    tickets = [core.arrive(LATER, 10, 0.0, streams=False) for _ in range(2)]
    core.tick(60.0)  # taken to have begun
    assert not any(ticket.awaited for ticket in tickets)
    core.arrive(CHAT, 10, 61.0)
    assert [ticket.state for ticket in tickets] == [State.SENT, State.QUEUED]


def test_interactive_requests_evict_nobody_who_is_interactive_and_batch_evicts_nobody() -> None:
    core = core_with("a")
    core.arrive(CHAT, 10, 0.0)
    core.arrive(CHAT, 10, 0.0)
    assert core.arrive(CHAT, 10, 0.0).state is State.QUEUED
    core = core_with("a")
    for _ in range(2):
        core.arrive(LATER, 10, 0.0)
    assert core.arrive(SOON, 10, 0.0).state is State.QUEUED


def test_a_place_elsewhere_is_taken_at_once() -> None:
    core, told = core_with("a"), []
    core.set_replicas([address("a"), address("b", "rest")], 0.0)
    batch = [core.arrive(LATER, 10, 0.0, on_evict=lambda: told.append(1)) for _ in range(3)]
    core.finish(next(ticket for ticket in batch if ticket.replica.replica_id == "b"), 5, 1.0)
    core.arrive(CHAT, 10, 2.0)
    assert sorted(t.replica.replica_id for t in batch if t.state is State.SENT) == ["a", "b"]
    assert (core.classes[LATER].queue, told) == (core.classes[SOON].queue, [1])


def test_evictions_of_one_request_are_bounded_and_are_no_failures() -> None:
    core = core_with("a", max_evictions=2)
    core.decide(GatewayDecision(max_batch_size={"shared": 1}, admission={}), 0.0)
    batch = core.arrive(LATER, 10, 0.0)
    for k in range(2):
        chat = core.arrive(CHAT, 10, float(k))
        assert batch.state is State.QUEUED
        core.finish(chat, 5, k + 0.5)
        assert batch.state is State.SENT
    assert core.arrive(CHAT, 10, 3.0).state is State.QUEUED
    core.lose(batch, 4.0, "reset")  # sent three times, lost once
    assert batch.state is State.QUEUED


def test_who_is_refused_evicts_nobody() -> None:
    core = core_with("a")
    core.decide(GatewayDecision(max_batch_size={}, admission={"chat": 1.0}), 0.0)
    for _ in range(2):
        core.arrive(LATER, 50_000, 0.0)
    assert core.arrive(CHAT, 10, 0.1).state is State.REFUSED
    assert core.pools[0].evictions == 0


def test_who_has_waited_too_long_is_not_held_again() -> None:
    core = core_with("a")
    for _ in range(2):
        batch = core.arrive(SOON, 10, 0.0)
    core.arrive(CHAT, 10, 31.0)
    assert (batch.state, core.classes[SOON].ended[State.DROPPED]) == (State.DROPPED, 1)


@pytest.mark.parametrize("settings", [{"evict_batch": False}, {"max_evictions": 0}])
def test_it_can_be_switched_off(settings) -> None:
    core = core_with("a", **settings)
    for _ in range(2):
        core.arrive(LATER, 10, 0.0)
    assert core.arrive(CHAT, 10, 0.0).state is State.QUEUED


@pytest.mark.parametrize("phase", ["draining", "suspended"])
def test_replicas_that_get_nothing_evict_nothing(phase) -> None:
    core = core_with("a")
    batch = [core.arrive(LATER, 10, 0.0) for _ in range(2)]
    if phase == "suspended":
        core.replicas["a"].suspended_until_s = 9.0
    else:
        core.set_replicas([address("a", phase=phase)], 0.5)
    assert core.arrive(CHAT, 10, 1.0).state is State.QUEUED
    assert all(ticket.state is State.SENT for ticket in batch)


# -- as the simulator does ---------------------------------------------------------------------------------------------


class _Found(Exception):
    """The first eviction of a run."""


def first_eviction_simulated(fleet: FleetSpec, workload: Workload, seed: int) -> tuple[str, int] | None:
    """(replica, request) of the reference simulator."""
    simulated = ReferenceFleet(fleet, workload, seed=seed)
    evict = simulated.gateway._evict_from

    def spy(replica) -> None:
        on_it = list(replica.in_flight)
        evict(replica)
        victim = next(r for r in on_it if r.marked_for_eviction or r.num_evictions)
        raise _Found(f"{replica.pool.spec.name}-{replica.pool.slots.index(replica)}", victim.index)

    simulated.gateway._evict_from = spy
    try:
        while simulated.advance():
            pass
    except _Found as found:
        return found.args
    return None


def first_eviction_live(fleet: FleetSpec, workload: Workload, seed: int) -> tuple[str, int] | None:
    routing = iter(draw_routing(seed, workload.num_requests))
    live = VirtualFleet(fleet, workload, routing.__next__, batch_streams=False)
    evict = live.core._evict_from

    def spy(replica, now_s) -> None:
        evict(replica, now_s)
        raise _Found(replica.replica_id, next(k for k, t in enumerate(live.tickets) if t.num_evictions))

    live.core._evict_from = spy
    try:
        live.run()
    except _Found as found:
        return found.args
    return None


def test_the_first_to_go_is_the_simulators() -> None:
    """After it the two differ: the simulator's engine keeps the tokens of whom it gives back, a live one cannot."""
    seen: Counter[object] = Counter()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        pools = [
            {
                "name": f"p{k}",
                "role": "mixed",
                "profile": PROFILE,
                "initial_replicas": int(rng.integers(1, 4)),
                "max_num_seqs": int(rng.integers(1, 5)),
            }
            for k in range(int(rng.integers(1, 3)))
        ]
        classes = [
            {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1},
            {"name": "bulk", "kind": "batch", "ttft_slo_s": 60, "tpot_slo_s": 1, "priority": 1},
        ]
        router = ("round_robin", "least_loaded", "power_of_two", "packing")[seed % 4]
        fleet = FleetSpec.from_dict({"pools": pools, "classes": classes, "router": router})
        num = 24
        kinds = (rng.uniform(size=num) > 0.3).astype(np.int16)
        workload = Workload(
            np.sort(rng.uniform(0.0, 1.0, num)),
            rng.integers(1, 200, num, dtype=np.int32),
            rng.integers(20, 60, num, dtype=np.int32),
            kinds,
            fleet.class_names,
            2.0,
        )
        expected = first_eviction_simulated(fleet, workload, seed)
        assert first_eviction_live(fleet, workload, seed) == expected, f"seed {seed}"
        seen["evicted" if expected else "nobody"] += 1
    assert seen["evicted"] > 6


# -- on the wire -------------------------------------------------------------------------------------------------------


WHOLE = {**BODY, "stream": False}
BULK = {"x-service-class": "bulk"}
ONE_PLACE = {**FLEET, "pools": [{**FLEET["pools"][0], "max_num_seqs": 1}]}


def answer_in_one_piece(text: str) -> web.Response:
    choices = [{"index": 0, "text": text, "finish_reason": "stop"}]
    return web.json_response({"choices": choices, "usage": {"prompt_tokens": 2, "completion_tokens": 3}})


@pytest.mark.parametrize("streams", [False, True])
def test_the_engine_drops_it_and_its_client_notices_nothing(streams) -> None:
    release = asyncio.Event()

    async def script(request, write):
        body = await request.json()
        if body["prompt"] != "bulk":
            await write(ANSWER + DONE)
            return None
        await release.wait()
        if not streams:
            return answer_in_one_piece("good")
        await write(ANSWER + DONE)
        return None

    async def test():
        async with stand(script, fleet=ONE_PLACE) as (gate, replicas):
            body = {**(BODY if streams else WHOLE), "prompt": "bulk"}
            batch = asyncio.create_task(gate.post(body, headers=BULK))
            await gate.until(lambda: len(replicas[0].bodies) == 1)
            assert await gate.post() == (200, ANSWER + DONE)
            await gate.until(lambda: replicas[0].num_disconnects == 1)
            await gate.until(lambda: len(replicas[0].bodies) == 3)
            release.set()
            status, said = await batch
            assert status == 200
            assert said == ANSWER + DONE if streams else b"good" in said
            snapshot = gate.gateway.snapshot()
            assert snapshot.pools["pool"].evictions == 1
            assert (snapshot.classes["chat"].met, snapshot.classes["bulk"].met) == (1, 1)
            assert (gate.count("finished", "bulk"), gate.count("failed", "bulk")) == (1, 0)
            assert gate.gateway.core.replicas["r0"].num_failures == 0

    run(test())


def test_a_stream_that_has_begun_is_not_cut() -> None:
    release = asyncio.Event()

    async def script(request, write):
        if (await request.json())["prompt"] == "bulk":
            await write(token(" a"))
            await release.wait()
            await write(token(" b", "stop") + DONE)
        else:
            await write(ANSWER + DONE)

    async def test():
        async with stand(script, fleet=ONE_PLACE) as (gate, replicas):
            batch = asyncio.create_task(gate.post({**BODY, "prompt": "bulk"}, headers=BULK))
            await gate.until(lambda: gate.count("first_tokens", "bulk") == 1)
            chat = asyncio.create_task(gate.post())
            await gate.until(lambda: gate.count("queue_length") == 1)
            release.set()
            assert await batch == (200, token(" a") + token(" b", "stop") + DONE)
            assert (await chat)[0] == 200
            assert replicas[0].num_disconnects == 0

    run(test())


def test_a_client_that_goes_away_while_it_is_evicted_is_cancelled_once() -> None:
    async def script(request, write):
        if (await request.json())["prompt"] == "bulk":
            await asyncio.Event().wait()
        await write(ANSWER + DONE)

    async def test():
        async with stand(script, fleet=ONE_PLACE) as (gate, replicas):
            batch = asyncio.create_task(gate.post({**WHOLE, "prompt": "bulk"}, headers=BULK))
            await gate.until(lambda: len(replicas[0].bodies) == 1)
            exchange = next(iter(gate.gateway.proxy._exchanges))
            now_s = gate.gateway._clock()
            gate.gateway.core.arrive(0, 10, now_s)  # evicts; the task has not run since
            exchange.task.cancel()  # what the server does when the client hangs up
            with pytest.raises(Exception, match=r"disconnected|closed|reset"):
                await batch
            await gate.until(lambda: gate.count("cancelled", "bulk") == 1)
            assert gate.gateway.proxy.num_open == 0

    run(test())


def test_many_of_both_end_in_one_outcome_each() -> None:
    """Six waves of batch work that interactive requests push aside, a third of all clients hanging up on the way."""
    rng = random.Random(3)
    release = asyncio.Event()

    async def script(request, write):
        body = await request.json()
        if body["prompt"] == "bulk":
            await release.wait()
        if not body["stream"]:
            return answer_in_one_piece("good")
        await write(token(" a"))
        await write(token(" b", "stop") + DONE)
        return None

    async def client(gate, service_class):
        body = {**BODY, "prompt": service_class, "stream": rng.random() < 0.5}
        status, said = await gate.post(body, headers={"x-service-class": service_class})
        whole = said == token(" a") + token(" b", "stop") + DONE if body["stream"] else b"good" in said
        return "whole" if status == 200 and whole else f"{status} {said!r}"

    async def wave(gate):
        release.clear()
        tasks = [asyncio.create_task(client(gate, "bulk")) for _ in range(8)]
        await gate.until(lambda: (gate.count("in_flight", "bulk"), gate.count("queue_length", "bulk")) == (4, 4))
        before = gate.count("arrivals")
        tasks += [asyncio.create_task(client(gate, "chat")) for _ in range(4)]
        await gate.until(lambda: gate.count("arrivals") == before + 4)
        for task in rng.sample(tasks, 4):
            task.cancel()
        release.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    async def test():
        async with stand(script, script) as (gate, _):
            ends = [end for _ in range(6) for end in await wave(gate)]
            seen = Counter("hung up" if isinstance(end, asyncio.CancelledError) else end for end in ends)
            assert set(seen) == {"whole", "hung up"}, seen
            await gate.until(lambda: gate.gateway.proxy.num_open == 0)
            finished = gate.count("finished") + gate.count("finished", "bulk")
            cancelled = gate.count("cancelled") + gate.count("cancelled", "bulk")
            assert finished + cancelled == 6 * 12
            assert finished >= seen["whole"]
            assert gate.gateway.snapshot().pools["pool"].evictions >= 6

    run(test())
