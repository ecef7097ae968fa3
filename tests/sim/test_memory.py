"""Room for traffic: each fleet of a batch has as much as its own episode needs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim import memory
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.sim.layout import REQUEST, TRACE, RecordArray
from rl_autoscale.sim.memory import SPARE, Rooms, allocate
from rl_autoscale.workload.trace import Workload


@pytest.fixture
def spec() -> FleetSpec:
    return FleetSpec.from_dict(
        {
            "pools": [
                {"name": "p", "role": "mixed", "profile": "llama-3.1-8b_h100_tp1", "max_replicas": 2,
                 "initial_replicas": 1, "startup": [{"name": "start", "mean_s": 10}]}
            ],
            "classes": [{"name": "c", "kind": "interactive", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}],
            "router": "least_loaded",
        }
    )  # fmt: skip


def traffic(number: int) -> Workload:
    tokens = np.full(number, 4, dtype=np.int32)
    classes = np.zeros(number, dtype=np.int16)
    return Workload(np.arange(number) / 10.0, tokens, tokens, classes, ("c",), span_s=max(number, 1) / 10.0)


def held_bytes(batch: FleetBatch) -> int:
    return sum(array.nbytes for mine in batch._rooms._arrays for array in mine.values())


def test_a_busy_fleet_does_not_widen_the_others(spec: FleetSpec) -> None:
    batch = FleetBatch(spec, 10)
    for e in range(10):
        batch.load(e, traffic(20_000 if e == 3 else 100), seed=e)
    assert held_bytes(batch) < 1.01 * (20_000 + 9 * 100) * (TRACE.itemsize + REQUEST.itemsize)


def test_what_a_busy_episode_took_is_given_back(spec: FleetSpec) -> None:
    batch = FleetBatch(spec, 1)
    batch.load(0, traffic(20_000), seed=0)
    batch.load(0, traffic(100), seed=0)
    assert held_bytes(batch) < SPARE * 101 * (TRACE.itemsize + REQUEST.itemsize)


def same(left: RecordArray, right: RecordArray) -> bool:
    names = REQUEST.names or ()
    return all(np.array_equal(left[n], right[n], equal_nan=left[n].dtype.kind == "f") for n in names)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda batch: pickle.loads(pickle.dumps(batch))])
def test_a_copy_has_memory_of_its_own(copied: Callable[[FleetBatch], FleetBatch], spec: FleetSpec) -> None:
    batch = FleetBatch(spec, 2)
    for e in range(2):
        batch.load(e, traffic(300), seed=e)
        batch.run(e, until_s=10.0)
    other, before = copied(batch), batch.requests(1).copy()
    other.run(1)
    assert same(batch.requests(1), before)
    batch.run(1)
    assert same(batch.requests(1), other.requests(1))
    assert len(batch.requests(1)) == 300


def test_memory_that_would_run_out_later_is_refused_now(spec: FleetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_most_bytes", lambda: 1.5 * 100_000 * REQUEST.itemsize)
    rooms = Rooms(allocate(spec, 2, None), 2)
    rooms.give(0, req=100_000)
    with pytest.raises(SpecError, match="run fewer fleets"):
        rooms.give(1, req=100_000)


def test_what_the_machine_has_left_is_more_than_this_process_has() -> None:
    assert memory._most_bytes() > 50e6


def test_an_episode_without_requests(spec: FleetSpec) -> None:
    batch = FleetBatch(spec, 1)
    batch.load(0, traffic(0), seed=0)
    batch.run(0)
    assert len(batch.requests()) == 0


@pytest.mark.parametrize("name", ["req", "trace"])
def test_too_much_traffic_says_what_to_do(name: str, spec: FleetSpec) -> None:
    rooms = Rooms(allocate(spec, 2, None), 2)
    before = rooms.give(1, req=1000, trace=1000)
    with pytest.raises(SpecError, match=r"no memory for an episode of .* requests .* 2 fleets hold: run fewer fleets"):
        rooms.give(1, **({"req": 10, "trace": 10} | {name: 1 << 42}))
    assert all(rooms.array(1, key, 1000).base is array.base for key, array in before.items())
