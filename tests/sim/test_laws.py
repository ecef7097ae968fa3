"""Laws that hold for every fleet, workload and control; docs/laws.md lists them by these tests' names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_autoscale.fleet.state import ScalingDecision
from rl_autoscale.sim.fleet import FleetBatch, SimFleet
from rl_autoscale.sim.layout import DRAINING, OFF, PER_REQUEST, READY, SLEEPING, Outcome

pytestmark = pytest.mark.usefixtures("exact_draws")

LEDGER = ("arrived", "met", "missed", "finished", "refused", "queue_full", "timed_out", "failed")
NUM_EXAMPLES = 40
LOOK_S = 0.0625
FULL_DRAIN_S = 1000.0


def for_all(strategy: st.SearchStrategy[Any], check: Any, num_examples: int = NUM_EXAMPLES) -> None:
    """Run a check on random cases."""
    settings(max_examples=num_examples, database=None)(given(strategy)(check))()


def looks(case: Any, *, drain_limit_s: float = 12.0, caps: Any = None) -> Iterator[tuple[SimFleet, ScalingDecision]]:
    """Run a case with a look at the fleet every LOOK_S; decisions still change at the case's own interval."""
    spec = case.spec.model_copy(update={"control_interval_s": LOOK_S, "telemetry_age_s": 0.0})
    fleet = SimFleet(spec, case.workload, seed=case.seed, speed=case.speed, drain_limit_s=drain_limit_s)
    going_on = True
    while going_on:
        decision = case.decision(int(float(fleet.observe().time_s) / case.spec.control_interval_s))
        if caps is not None:
            decision = replace(decision, max_batch_size=caps)
        fleet.apply(decision)
        going_on = fleet.advance()
        yield fleet, decision


def run(case: Any, *, drain_limit_s: float = 12.0) -> SimFleet:
    """Run a case at its own control interval and close the books."""
    fleet = SimFleet(case.spec, case.workload, seed=case.seed, speed=case.speed, drain_limit_s=drain_limit_s)
    step, going_on = 0, True
    while going_on:
        fleet.apply(case.decision(step))
        going_on = fleet.advance()
        step += 1
    fleet.result()
    return fleet


def world_bytes(batch: FleetBatch, e: int = 0) -> dict[str, bytes]:
    """All memory of one fleet, wherever it lies; request rows only as far as requests have arrived."""
    world = batch._world
    shared = ("class_pools", "class_order", "gap_edges", "periods_s", "kept_tokens")
    parts = {name: array if name in shared else array[e] for name, array in world._asdict().items()}
    parts |= {name: batch._rooms.array(e, name, int(parts[name][1])) for name in PER_REQUEST if parts[name][1]}
    parts["req"] = batch.requests(e)
    return {name: _bytes(array) for name, array in parts.items()}


def _bytes(array: Any) -> bytes:
    """Memory of an array; of records field by field, without the padding between them."""
    columns = [array] if array.dtype.names is None else [array[name] for name in array.dtype.names]
    return b"".join(np.ascontiguousarray(column).tobytes() for column in columns)


def test_every_request_ends_once(all_cases: st.SearchStrategy[Any]) -> None:
    def check(case: Any) -> None:
        fleet = run(case)
        requests = fleet.batch.requests()
        assert len(requests) == case.workload.num_requests
        assert (requests["outcome"] != Outcome.PENDING).all()
        assert np.isfinite(requests["end_s"]).all()
        for c in range(len(case.spec.classes)):
            mine = requests[requests["class_index"] == c]
            ledger = {name: int(fleet.batch.ledger(name)[0, c]) for name in LEDGER}
            assert ledger["met"] + ledger["missed"] == ledger["arrived"] == len(mine)
            assert ledger["met"] == mine["slo_met"].sum()
            for name in ("finished", "refused", "queue_full", "timed_out", "failed"):
                assert ledger[name] == (mine["outcome"] == Outcome[name.upper()]).sum(), name

    for_all(all_cases, check)


def test_times_are_in_order(all_cases: st.SearchStrategy[Any]) -> None:
    def check(case: Any) -> None:
        fleet = run(case)
        requests = fleet.batch.requests()
        pools = fleet.batch.pools()
        lost_or_moved = pools["crashes"] + pools["taken_away"] + pools["migrations"]
        requeued = (requests["num_evictions"] > 0) | (lost_or_moved.sum() > 0)
        arrival, dispatched = requests["arrival_s"], requests["dispatched_s"]
        scheduled, first, end = requests["scheduled_s"], requests["first_token_s"], requests["end_s"]
        last = requests["last_token_s"]
        # A comparison with NaN, a moment that never came, is False: each law is written as "nothing violates it".
        assert not (dispatched < arrival).any()
        assert not (scheduled < arrival).any()
        assert not (dispatched > scheduled)[~requeued].any()  # dispatched_s is the last dispatch, scheduled_s the first
        assert not (first <= scheduled).any()
        assert not (last < first).any()
        assert not (end < last).any()
        assert not (end < first).any()
        assert not (end < scheduled).any()
        assert not (end < dispatched).any()
        assert not (end < arrival).any()
        assert not np.isnan(last[requests["outcome"] == Outcome.FINISHED]).any()

    for_all(all_cases, check)


def test_slos_are_judged_from_the_times(all_cases: st.SearchStrategy[Any]) -> None:
    def check(case: Any) -> None:
        requests = run(case).batch.requests()
        for q in range(len(requests)):
            request, promise = requests[q], case.spec.classes[int(requests["class_index"][q])]
            gaps = max(int(request["output_tokens"]) - 1, 1)
            met = (
                request["outcome"] == Outcome.FINISHED
                and request["first_token_s"] - request["arrival_s"] <= promise.ttft_slo_s
                and (request["last_token_s"] - request["first_token_s"]) / gaps <= promise.tpot_slo_s
                and request["end_s"] - request["arrival_s"] <= (promise.deadline_s or np.inf)
            )
            assert bool(request["slo_met"]) == met

    for_all(all_cases, check)


def test_kv_blocks_never_exceed_capacity(all_cases: st.SearchStrategy[Any]) -> None:
    fullest = 0.0

    def check(case: Any) -> None:
        nonlocal fullest
        for fleet, _ in looks(case):
            replicas = fleet.batch.replicas()
            residue = fleet.batch._world.residue[0]
            # What vLLM has allocated: the books, and the blocks that the iteration in progress will fill.
            pools = fleet.batch.pools()[replicas["pool"]]
            current = np.array(
                [
                    residue[r, (replicas["iteration"][r] + np.arange(step)) & pools["phase_mask"][r]].sum()
                    for r, step in enumerate(replicas["step_units"])
                ]
            )
            capacity = pools["kv_blocks"]
            assert (replicas["kv_used"] >= 0).all()
            assert (replicas["kv_used"] + current <= capacity).all()
            fullest = max(fullest, float((replicas["kv_used"] / capacity).max()))

    for_all(all_cases, check)
    assert fullest == 1.0  # the hard case was reached


def test_everything_returns_to_zero(all_cases: st.SearchStrategy[Any]) -> None:
    complete = 0

    def check(case: Any) -> None:
        nonlocal complete
        batch = run(case, drain_limit_s=FULL_DRAIN_S).batch
        if (batch.requests()["outcome"] == Outcome.UNFINISHED).any():
            return  # no replica was allowed to serve what is left
        complete += 1
        for name in ("kv_used", "decode_units", "pending_tokens", "seen_tokens", "num_decode", "num_prefill",
                     "num_waiting", "in_flight", "in_flight_interactive", "num_seen", "heap_size",
                     "num_evict_marked", "num_held", "sending", "num_parked", "num_parked_batch"):  # fmt: skip
            assert not batch.replicas()[name].any(), name
        assert not batch._world.residue.any()
        for name in ("in_flight", "in_flight_interactive", "busy_interactive", "draining"):
            assert not batch.pools()[name].any(), name
        for name in ("queued", "bridge_used", "bridge_length", "num_transfers", "num_blocked", "num_working",
                     "post_length", "num_parked"):  # fmt: skip
            assert not batch._world.fleet[name].any(), name
        for name in ("queue_length", "queue_tokens", "in_flight"):
            assert not batch.ledger(name).any(), name

    for_all(all_cases, check)
    assert complete > NUM_EXAMPLES // 2


def test_clock_is_monotone(all_cases: st.SearchStrategy[Any]) -> None:
    def check(case: Any) -> None:
        last_s, last_events, ended = 0.0, 0, 0
        for fleet, _ in looks(case):
            now_s = float(fleet.batch._world.fleet["now_s"][0, 0])
            requests = fleet.batch.requests()
            assert now_s == pytest.approx(last_s + LOOK_S)
            assert fleet.batch.num_events() >= last_events
            assert not (requests["end_s"] > now_s).any()
            assert (requests["outcome"] != Outcome.PENDING).sum() >= ended
            pending_events = fleet.batch.replicas()["event_s"]
            assert (pending_events > now_s).all()
            last_s, last_events = now_s, fleet.batch.num_events()
            ended = int((requests["outcome"] != Outcome.PENDING).sum())

    for_all(all_cases, check)


def test_no_idling_with_runnable_work(all_cases: st.SearchStrategy[Any]) -> None:
    queued, bridged, held_up = 0, 0, 0

    def check(case: Any) -> None:
        nonlocal queued, bridged, held_up
        for fleet, _ in looks(case):
            world = fleet.batch._world
            replicas, pools, classes = world.rep[0], world.pool[0], world.cls[0]
            serving = (replicas["state"] == READY) | (replicas["state"] == DRAINING)
            staying = replicas["num_held"] + replicas["num_parked"]  # until another stage takes them
            stalled = serving & (replicas["in_flight"] > staying) & np.isinf(replicas["event_s"])
            for r in np.flatnonzero(stalled):
                held_up += 1
                assert head_has_no_room(fleet, r)
            room = (replicas["state"] == READY) & (replicas["in_flight"] < pools["cap"][replicas["pool"]])
            for c in np.flatnonzero((classes["queue_length"] > 0) & (classes["in_flight"] < classes["max_in_flight"])):
                queued += 1
                assert not room[np.isin(replicas["pool"], case.spec.pools_serving(int(c)))].any()
            if world.fleet[0]["bridge_length"]:
                bridged += 1
                assert not room[np.isin(replicas["pool"], case.spec.decode_pools)].any()

    for_all(all_cases, check, num_examples=80)
    assert queued > 0
    assert bridged > 0
    assert held_up > 0


def head_has_no_room(fleet: SimFleet, r: int) -> bool:
    """Whether what another stage has not taken yet leaves no sequence or no KV blocks for the waiting queue's head."""
    world = fleet.batch._world
    replica, pool = world.rep[0, r], world.pool[0, world.rep[0, r]["pool"]]
    head = fleet.batch.requests()[replica["wait_head"]]
    if replica["num_held"] + replica["num_parked"] == 0:
        return False
    tokens = head["prompt_tokens"] + head["generated_tokens"]
    if head["kv_in_bridge"]:
        tokens = head["computed_tokens"] + (pool["step_units"] >> pool["token_shift"])
    # A cached prefix would need fewer blocks; that is the differential test's to know.
    full = -(-tokens // 16) > pool["kv_blocks"] - replica["kv_used"] or pool["prefix_caching"]
    return bool(full or replica["num_parked"] >= pool["batch_limit"])


def test_in_flight_stays_within_the_cap(fleet_cases: st.SearchStrategy[Any]) -> None:
    """Except for a hand-over: an interactive request is sent while the batch request it evicts ends its iteration."""
    handed_over = 0

    def check(case: Any) -> None:
        nonlocal handed_over
        caps = case.decision(0).max_batch_size
        for fleet, _ in looks(case, caps=caps):
            replicas = fleet.batch.replicas()
            assert (replicas["in_flight"] - replicas["num_evict_marked"] <= caps[replicas["pool"]]).all()
            handed_over += int((replicas["in_flight"] > caps[replicas["pool"]]).sum())

    for_all(fleet_cases.filter(may_hand_over), check, num_examples=100)
    assert handed_over > 0


def test_of_a_class_no_more_is_in_flight_than_its_limit_ever_allowed(all_cases: st.SearchStrategy[Any]) -> None:
    """A limit that is lowered takes nothing back: the surplus runs out, and crashes and moves add nothing."""
    limited = 0

    def check(case: Any) -> None:
        nonlocal limited
        allowed = np.zeros(len(case.spec.classes), dtype=np.int64)
        for fleet, decision in looks(case):
            allowed = np.maximum(allowed, decision.in_flight_limits)
            classes = fleet.batch._world.cls[0]
            assert (classes["in_flight"] <= allowed).all()
            limited += int(((classes["in_flight"] == allowed) & (classes["queue_length"] > 0)).sum())

    for_all(all_cases, check)
    assert limited > 0


def may_hand_over(case: Any) -> bool:
    """Whether interactive and batch requests meet on a replica where one may evict the other."""
    kinds = {item.kind for item in case.spec.classes}
    return case.spec.evict_batch and len(kinds) == 2 and any(pool.role == "mixed" for pool in case.spec.pools)


def test_same_seed_same_bytes(all_cases: st.SearchStrategy[Any]) -> None:
    def check(case: Any) -> None:
        assert world_bytes(run(case).batch) == world_bytes(run(case).batch)

    for_all(all_cases, check)


def test_a_reused_batch_is_a_fresh_one(all_cases: st.SearchStrategy[Any]) -> None:
    """An episode leaves nothing behind that the next one in the same memory could see."""

    def check(case: Any) -> None:
        fresh, used = FleetBatch(case.spec), FleetBatch(case.spec)
        used.load(0, case.workload, seed=case.seed + 1, speed=1.25)
        for step in range(3):
            used.step(_batched(case.decision(step), 1))
        for batch in (fresh, used):
            batch.load(0, case.workload, seed=case.seed, speed=case.speed)
            for step in range(5):
                batch.step(_batched(case.decision(step), 1))
        left, right = world_bytes(fresh), world_bytes(used)
        for name in ("heap", "kv", "table", "worker"):  # beyond what is in use lies what was there before
            del left[name], right[name]
        assert left == right

    for_all(all_cases, check)


def _batched(decision: ScalingDecision, num_fleets: int) -> ScalingDecision:
    return ScalingDecision(
        np.tile(decision.target_replicas, (num_fleets, 1)),
        np.tile(decision.max_batch_size, (num_fleets, 1)),
        np.tile(decision.admission, (num_fleets, 1)),
    )


@pytest.mark.parametrize("num_threads", [1, 2])
def test_batch_size_and_threads_change_nothing(all_cases: st.SearchStrategy[Any], num_threads: int) -> None:
    def check(case: Any) -> None:
        alone = [FleetBatch(case.spec) for _ in range(3)]
        together = FleetBatch(case.spec, 3, num_threads=num_threads)
        for e in range(3):
            alone[e].load(0, case.workload, seed=case.seed + e, speed=case.speed)
            together.load(e, case.workload, seed=case.seed + e, speed=case.speed)
        for step in range(6):
            together.step(_batched(case.decision(step), 3))
            for e in range(3):
                alone[e].step(_batched(case.decision(step), 1))
        for e in range(3):
            assert world_bytes(together, e) == world_bytes(alone[e])

    for_all(all_cases, check, num_examples=20)


def test_gpu_seconds_are_the_integral_of_replicas(all_cases: st.SearchStrategy[Any]) -> None:
    """Checked against a Riemann sum: a change between two looks is worth at most one look's width."""

    def check(case: Any) -> None:
        total_s, changes = 0.0, 0.0
        for fleet, _ in looks(case):
            replicas, pools = fleet.batch.replicas(), fleet.batch.pools()
            price = np.where(replicas["state"] == SLEEPING, pools["sleep_price"][replicas["pool"]], 1.0)
            total_s += LOOK_S * 2 * float(price[replicas["state"] != OFF].sum())  # the toy replica has two GPUs
            changes = float((2 * pools["num_starts"] + pools["crashes"] + pools["notices"]).sum())
        assert abs(fleet.batch.gpu_s().sum() - total_s) <= LOOK_S * 2 * changes + 1e-9

    for_all(all_cases, check)


def test_every_prefix_of_the_workload_is_served_alike(all_cases: st.SearchStrategy[Any]) -> None:
    """No request is treated by what arrives after its end: nothing reads the future."""

    def check(case: Any) -> None:
        whole = run(case).batch.requests()
        half = case.workload.num_requests // 2
        if half == 0:
            return
        prefix = run(replace(case, workload=case.workload.take(np.arange(half)))).batch.requests()
        next_arrival_s = case.workload.arrival_s[half]
        done = whole[:half]["end_s"] < next_arrival_s
        assert (whole[:half]["end_s"][done] == prefix["end_s"][done]).all()

    for_all(all_cases, check)
