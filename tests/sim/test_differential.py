"""The compiled engine and the SimPy reference give the same numbers, request by request and signal by signal."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.layout import DECODE, PREFILL, SCHEDULER_CODES, VLLM_PRIORITY, Outcome
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.sim.reference.request import Request
from rl_autoscale.sim.reference.schedulers import slos_serve
from rl_autoscale.sim.reference.sequences import Sequences
from rl_autoscale.workload.trace import Workload

TIMES = (
    "dispatched_s", "scheduled_s", "first_token_s", "last_token_s", "end_s", "read_s", "late_s", "read_from_s",
)  # fmt: skip
FATES = ("outcome", "replica", "slo_met", "num_preemptions", "num_evictions", "read_tokens")
POOL_COUNTS = (
    "preemptions", "evictions", "crashes", "cancelled_starts", "reclaimed", "num_starts", "prompt_tokens",
    "num_wakes", "notices", "taken_away", "prefix_queried_tokens", "prefix_hit_tokens", "cached_blocks_evicted",
    "released_tokens", "released_blocks", "moved_blocks", "migrations", "forwarded",
)  # fmt: skip


GAP_EDGES_S = np.geomspace(1e-3, 1e3, 181)


def run_both(case: Any) -> tuple[SimFleet, ReferenceFleet]:
    """Run engine and reference side by side and compare what a decision would read at every control step."""
    options = {"seed": case.seed, "speed": case.speed, "drain_limit_s": 12.0}
    engine = SimFleet(case.spec, case.workload, gap_edges_s=GAP_EDGES_S, **options)
    reference = ReferenceFleet(case.spec, case.workload, **options)
    step = 0
    going_on = True
    while going_on:
        assert_same_state(engine.observe(), reference.observe())
        for fleet in (engine, reference):
            fleet.apply(case.decision(step))
        going_on = engine.advance()
        assert going_on == reference.advance()
        step += 1
    return engine, reference


def assert_same_state(left: FleetState, right: FleetState) -> None:
    assert left.time_s == right.time_s
    assert left.window_s == right.window_s
    assert (left.stages is None) == (right.stages is None)
    for part in ("pools", "classes") if left.stages is None else ("pools", "classes", "stages"):
        for field in fields(getattr(left, part)):
            got, expected = getattr(getattr(left, part), field.name), getattr(getattr(right, part), field.name)
            np.testing.assert_allclose(
                got, expected, rtol=1e-9, atol=1e-12, err_msg=f"{part}.{field.name} at {float(left.time_s)} s"
            )


def assert_same_books(engine: SimFleet, reference: ReferenceFleet) -> None:
    result, expected_result = engine.result(), reference.result()
    got, expected = engine.batch.requests(), reference.request_records()
    assert len(got) == len(expected)
    for name in TIMES:
        np.testing.assert_allclose(got[name], expected[name], rtol=0.0, atol=1e-9, err_msg=name)
    for name in FATES:
        np.testing.assert_array_equal(got[name], expected[name], name)
    pools, expected_pools = engine.batch.pools(), reference.pool_records()
    for name in POOL_COUNTS:
        np.testing.assert_array_equal(pools[name], expected_pools[name], name)
    for name in ("replica_s", "ready_s", "sleep_s", "itl_sum_s", "itl_count"):
        np.testing.assert_allclose(pools[name], expected_pools[name], rtol=1e-9, atol=1e-9, err_msg=name)
    assert result.summary() == pytest.approx(expected_result.summary(), rel=1e-9, nan_ok=True)
    for gaps, pool in zip(engine.batch.token_gaps(), reference.pools, strict=True):
        expected_gaps = np.bincount(np.searchsorted(GAP_EDGES_S, pool.gaps_s), minlength=len(GAP_EDGES_S) + 1)
        np.testing.assert_array_equal(gaps, expected_gaps)
    for name, values in result.timeline.items():
        np.testing.assert_allclose(values, expected_result.timeline[name], rtol=1e-9, atol=1e-12, err_msg=name)


def hard_cases(engine: SimFleet, case: Any) -> Counter[str]:
    """How often the rare paths were taken."""
    requests, pools = engine.batch.requests(), engine.batch.pools()
    outcome = requests["outcome"]
    begun = ~np.isnan(requests["first_token_s"])
    which = np.searchsorted(pools["base"], requests["replica"], side="right") - 1
    world = engine.batch._world
    roles = np.where(requests["replica"] >= 0, pools["role"][which], -1)
    finished = pools["residence_count"]
    speculates = (requests["replica"] >= 0) & (pools["token_shift"][which] > 0)
    codes = SCHEDULER_CODES
    planned = pools["scheduler"][which] == codes["slos-serve"]
    seen = Counter(
        {
            "preempted": int(requests["num_preemptions"].sum()),
            "evicted": int(requests["num_evictions"].sum()),
            "evicted and finished": int(((requests["num_evictions"] > 0) & (outcome == Outcome.FINISHED)).sum()),
            "crashed": int(pools["crashes"].sum()),
            "crash lost a stream": int((outcome == Outcome.FAILED).sum()),
            "reclaimed": int(pools["reclaimed"].sum()),
            "start cancelled": int(pools["cancelled_starts"].sum()),
            "refused": int((outcome == Outcome.REFUSED).sum()),
            "timed out": int((outcome == Outcome.TIMED_OUT).sum()),
            "queue full": int((outcome == Outcome.QUEUE_FULL).sum()),
            "unfinished": int((outcome == Outcome.UNFINISHED).sum()),
            "woken": int(pools["num_wakes"].sum()),
            "slept": int((pools["sleep_s"] > 0).sum()),
            "notice given": int(pools["notices"].sum()),
            "drained in time": int((pools["notices"] - pools["taken_away"]).sum()),
            "taken away": int(pools["taken_away"].sum()),
            "beside a pool of its role": served_beside(engine, requests),
            "routed by prefix": int(case.spec.router == "prefix_affinity" and (pools["prefix_hit_tokens"] > 0).any()),
            "routed by freeness": int((case.spec.router == "freeness") * pools["preemptions"].sum()),
            "routed beside memory kept free": int(
                (case.spec.router == "freeness") * (finished * (pools["urgent_headroom"] > 0)).sum()
            ),
            "prefix found": int((pools["prefix_hit_tokens"] > 0).sum()),
            "cached prefix lost": int((pools["cached_blocks_evicted"] > 0).sum()),
            "preempted beside a prefix cache": int((pools["preemptions"] * pools["prefix_caching"]).sum()),
            "several tokens per iteration": int((requests["output_tokens"] > 1)[speculates].sum()),
            "preempted between drafts": int((requests["num_preemptions"] * speculates).sum()),
            "drafts beside a prefix cache": int((pools["prefix_hit_tokens"] * (pools["token_shift"] > 0)).sum()),
            "crashed between drafts": int(((outcome == Outcome.FAILED) & speculates).sum()),
            "transferred": int((roles == DECODE).sum()),
            "held by a full bridge": int(world.fleet["num_blockings"].sum()),
            "held by full post-processing": int(world.fleet["num_parkings"].sum()),
            "held beside a prefix cache": int(world.fleet["num_parkings"].sum() * pools["prefix_caching"].any()),
            "post-processed": int((case.spec.postprocess is not None) * (outcome == Outcome.FINISHED).sum()),
            "preempted after a transfer": int(requests["num_preemptions"][roles == DECODE].sum()),
            "drafts after a transfer": int(((roles == DECODE) & speculates).sum()),
            "prefix found before a transfer": int((pools["prefix_hit_tokens"] * (pools["role"] == PREFILL)).sum()),
            "lost with its prefill replica": int(((outcome == Outcome.FAILED) & (roles == PREFILL)).sum()),
            "lost with its decode replica": int(((outcome == Outcome.FAILED) & (roles == DECODE)).sum()),
            "preempted by others than vLLM": int((pools["preemptions"] * (pools["scheduler"] > VLLM_PRIORITY)).sum()),
            "drafts under slos-serve": int((requests["output_tokens"] > 1)[speculates & planned].sum()),
            "preempted between drafts under slos-serve": int(requests["num_preemptions"][speculates & planned].sum()),
            "crashed between drafts under slos-serve": int((outcome == Outcome.FAILED)[speculates & planned].sum()),
            "forwarded": int(pools["forwarded"].sum()),
            "swapped": int(pools["moved_blocks"].sum()),
            "swapped by andes": int((pools["moved_blocks"] * (pools["scheduler"] == codes["andes"])).sum()),
            "reserved": int((pools["residence_count"] * pools["reserves"]).sum()),
            "met": int(requests["slo_met"].sum()),
            "late": int((begun & (requests["slo_met"] == 0)).sum()),
        }
    )
    seen.update(
        {f"finished under {name}": int(finished[pools["scheduler"] == code].sum()) for name, code in codes.items()}
    )
    return seen


def served_beside(engine: SimFleet, requests: Any) -> int:
    """Requests that went to another pool of the same role than the first that serves their class."""
    roles = [pool.role for pool in engine.spec.pools]
    bases = engine.batch.pools()["base"]
    sent = requests[requests["replica"] >= 0]
    pools = np.searchsorted(bases, sent["replica"], side="right") - 1
    return sum(roles[p] in roles[:p] for p in pools)


def moving_cases_seen(engine: SimFleet, case: Any) -> Counter[str]:
    """How often sequences took their KV cache along."""
    requests, pools = engine.batch.requests(), engine.batch.pools()
    moved, caching, drafting = pools["moved_blocks"], pools["prefix_caching"], pools["token_shift"] > 0
    to_host = case.spec.eviction == "host"
    evicted = to_host * int(requests["num_evictions"].sum())
    finished = (requests["num_evictions"] > 0) & (requests["outcome"] == Outcome.FINISHED)
    return Counter(
        {
            "moved": int(moved.sum()),
            "moved beside a prefix cache": int((moved * caching).sum()),
            "moved between drafts": int((moved * drafting).sum()),
            "evicted between drafts": int((pools["evictions"] * drafting).sum()),
            "evicted to the host": evicted,
            "evicted to the host and finished": to_host * int(finished.sum()),
            "preempted beside moves": int(pools["preemptions"].sum()) * bool(moved.any()),
            "migrated": int(pools["migrations"].sum()),
            "migrated under notice": int((pools["migrations"] * (pools["notices"] > 0)).sum()),
            "migrated by priority": int((pools["migrations"] * (pools["scheduler"] == VLLM_PRIORITY)).sum()),
            "moved beside post-processing": int(moved.sum() * (case.spec.postprocess is not None)),
        }
    )


def balanced_cases_seen(engine: SimFleet, case: Any) -> Counter[str]:
    """How often sequences moved to a freer replica, and which."""
    pools = engine.batch.pools()
    given = pools["migrations"] * (case.spec.drain == "wait")
    priorities = {item.priority for item in case.spec.classes}
    return Counter(
        {
            "given": int(given.sum()),
            "given by freeness": int(given.sum() * (case.spec.router == "freeness")),
            "given beside a prefix cache": int((given * pools["prefix_caching"]).sum()),
            "given between drafts": int((given * (pools["token_shift"] > 0)).sum()),
            "given by priority": int((given * (pools["scheduler"] == VLLM_PRIORITY)).sum()),
            "given beside drains": int(pools["migrations"].sum() * (case.spec.drain == "migrate")),
            "given beside preemptions": int((given * (pools["preemptions"] > 0)).sum()),
            "given beside crashes": int((given * (pools["crashes"] > 0)).sum()),
            "given to a slow link": int((given * (pools["block_move_s"] > 0)).sum()),
            "given by urgency": int(given.sum() * (len(priorities) > 1)),
            "given beside memory kept free": int((given * (pools["urgent_headroom"] > 0)).sum()),
            "given beside post-processing": int(given.sum() * (case.spec.postprocess is not None)),
        }
    )


@pytest.fixture
def chosen_drafts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many drafts the reference of slos-serve has chosen, and when it chose others than before."""
    names = ("no drafts", "some drafts", "all drafts", "others for a prompt", "others for the same batch alone")
    seen = Counter(dict.fromkeys(names, 0))
    last_batch: weakref.WeakKeyDictionary[Sequences, list[Request]] = weakref.WeakKeyDictionary()
    choose = slos_serve._choose_drafts

    def choose_and_count(engine: Sequences, limit_s: float) -> int:
        drafts = choose(engine, limit_s)
        seen["no drafts"] += drafts == 0
        seen["some drafts"] += 0 < drafts < engine.pool.verified_tokens - 1
        seen["all drafts"] += drafts == engine.pool.verified_tokens - 1
        others = drafts != engine.num_drafts
        seen["others for a prompt"] += others and not all(request.decoding for request in engine.running)
        alone = not engine.waiting and last_batch.get(engine) == engine.running
        seen["others for the same batch alone"] += others and alone
        last_batch[engine] = list(engine.running) if not engine.waiting else []
        return drafts

    monkeypatch.setattr(slos_serve, "_choose_drafts", choose_and_count)
    return seen


NOW, NIGHTLY = {"derandomize": True}, {"derandomize": False}
"""By day the same fleets every time, so that none of the rare cases is missed by chance; new ones every night."""


def compare_many(
    strategy: st.SearchStrategy[Any], num_examples: int, draws: dict[str, bool], count: Any = None
) -> Counter[str]:
    seen: Counter[str] = Counter()

    @settings(max_examples=num_examples, database=None, **draws)
    @given(strategy)
    def compare(case: Any) -> None:
        engine, reference = run_both(case)
        assert_same_books(engine, reference)
        seen.update(hard_cases(engine, case) if count is None else count(engine, case))

    compare()
    return seen


@pytest.mark.usefixtures("exact_draws")
def test_engine_equals_reference(
    fleet_cases: st.SearchStrategy[Any],
    staged_cases: st.SearchStrategy[Any],
    slos_cases: st.SearchStrategy[Any],
    andes_cases: st.SearchStrategy[Any],
    chosen_drafts: Counter[str],
) -> None:
    seen = compare_many(fleet_cases, 200, NOW)
    for strategy, number in ((staged_cases, 200), (slos_cases, 50), (andes_cases, 50)):
        seen.update(compare_many(strategy, number, NOW))
    seen.update(chosen_drafts)
    assert all(seen[name] > 0 for name in seen), seen


@pytest.mark.slow
@pytest.mark.usefixtures("exact_draws")
def test_engine_equals_reference_nightly(
    fleet_cases: st.SearchStrategy[Any],
    staged_cases: st.SearchStrategy[Any],
    slos_cases: st.SearchStrategy[Any],
    andes_cases: st.SearchStrategy[Any],
    chosen_drafts: Counter[str],
) -> None:
    seen = compare_many(fleet_cases, 2000, NIGHTLY)
    for strategy, number in ((staged_cases, 1000), (slos_cases, 500), (andes_cases, 500)):
        seen.update(compare_many(strategy, number, NIGHTLY))
    seen.update(chosen_drafts)
    assert all(seen[name] > 10 for name in seen), seen


@pytest.mark.usefixtures("exact_draws")
@pytest.mark.parametrize(
    ("num_examples", "least", "draws"),
    [(200, 1, NOW), pytest.param(1000, 10, NIGHTLY, marks=pytest.mark.slow)],
    ids=["now", "nightly"],
)
@pytest.mark.parametrize(
    ("cases", "count"),
    [("moving_cases", moving_cases_seen), ("balanced_cases", balanced_cases_seen)],
    ids=["streams move", "pools are rebalanced"],
)
def test_engine_equals_reference_where_sequences_move(
    request: pytest.FixtureRequest, cases: str, count: Any, num_examples: int, least: int, draws: dict[str, bool]
) -> None:
    seen = compare_many(request.getfixturevalue(cases), num_examples, draws, count)
    assert all(seen[name] >= least for name in seen), seen


@dataclass(frozen=True)
class MeasuredCase:
    """A fleet with a shipped profile under heavy load, where no duration is a round number."""

    spec: FleetSpec
    workload: Workload
    seed: int
    speed: float = 1.1

    def decision(self, step: int) -> ScalingDecision:
        targets = np.array([1 + step % 3, (step // 2) % 3])
        return ScalingDecision(targets, self.spec.batch_limits, np.array([np.inf if step % 2 else 1.5, np.inf]))


@pytest.mark.parametrize("seed", range(4))
def test_engine_equals_reference_on_measured_times(seed: int) -> None:
    """Rounding stays far below 1e-9 s and decides nothing."""
    rng = np.random.default_rng(seed)
    number = 150
    pool = {"profile": "llama-3.1-8b_h100_tp1", "max_num_seqs": 48, "max_num_batched_tokens": 1024, "kv_blocks": 510}
    pool |= {"max_replicas": 3, "startup": [{"mean_s": 2.0}, {"mean_s": 3.0}], "mean_time_to_crash_s": 40.0}
    spec = FleetSpec.from_dict(
        {
            "pools": [{"name": "a", **pool}, {"name": "b", "role": "batch", "min_replicas": 0, **pool}],
            "classes": [
                {"name": "chat", "ttft_slo_s": 0.5, "tpot_slo_s": 0.02, "timeout_s": 6.0},
                {"name": "work", "kind": "batch", "ttft_slo_s": 60, "tpot_slo_s": 1, "deadline_s": 60, "priority": 1},
            ],
            "router": ("least_loaded", "power_of_two", "packing", "round_robin")[seed],
            "control_interval_s": 3.0,
        }
    )
    arrival_s = np.cumsum(rng.gamma(0.25, 0.6, size=number))
    prompt = np.minimum(rng.lognormal(6.3, 1.0, number), 6000).astype(int) + 1
    output = np.minimum(rng.lognormal(4.6, 0.8, number), 2000).astype(int) + 1
    classes = (rng.random(number) < 0.4).astype(int)
    workload = Workload(arrival_s, prompt, output, classes, ("chat", "work"), float(arrival_s[-1]))
    engine, reference = run_both(MeasuredCase(spec, workload, seed))
    assert_same_books(engine, reference)
    assert engine.batch.pools()["preemptions"].sum() > 0
