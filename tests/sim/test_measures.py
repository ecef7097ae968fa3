"""Figures of an episode that can be worked out by hand, or the slow way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import ScalingDecision
from rl_autoscale.sim import measures
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.layout import NONE, POOL, REQUEST, Outcome
from rl_autoscale.workload.trace import Workload

SPEC = FleetSpec.from_dict(
    {
        "pools": [
            {"name": "a", "profile": "llama-3.1-8b_a100_tp1", "max_replicas": 2},
            {"name": "b", "profile": "llama-3.1-70b_a100_tp4", "max_replicas": 2},
        ],
        "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}],
    }
)


def records(*rows: dict[str, float]) -> np.ndarray:
    """Finished requests of ten tokens, dispatched and scheduled as they arrive, unless a row says otherwise."""
    found = np.zeros(len(rows), dtype=REQUEST)
    for record, row in zip(found, rows, strict=True):
        arrival_s = row.get("arrival_s", 0.0)
        usual = {"dispatched_s": arrival_s, "scheduled_s": arrival_s, "first_token_s": arrival_s + 1.0}
        usual |= {"end_s": arrival_s + 2.0, "output_tokens": 10, "prompt_tokens": 10, "outcome": Outcome.FINISHED}
        usual["last_token_s"] = row.get("end_s", usual["end_s"])
        for name, value in {**usual, **row}.items():
            record[name] = value
    return found


def two_pools() -> np.ndarray:
    pools = np.zeros(2, dtype=POOL)
    pools["base"] = [0, 4]
    return pools


def test_busy_time_is_the_union_of_stays_on_each_replica() -> None:
    requests = records(
        {"replica": 0, "dispatched_s": 0.0, "end_s": 4.0},
        {"replica": 0, "dispatched_s": 1.0, "end_s": 2.0},  # inside the first
        {"replica": 0, "dispatched_s": 3.0, "end_s": 5.0},
        {"replica": 0, "dispatched_s": 7.0, "end_s": 8.0},
        {"replica": 1, "dispatched_s": 0.0, "end_s": 1.0},
        {"replica": 5, "dispatched_s": 0.0, "end_s": 3.0, "outcome": Outcome.FAILED},
        {"replica": 5, "dispatched_s": 0.0, "end_s": 90.0, "outcome": Outcome.UNFINISHED, "num_evictions": 1},
        {"replica": NONE, "dispatched_s": np.nan, "end_s": 90.0, "outcome": Outcome.REFUSED},
    )
    assert measures.busy_replica_s(requests, two_pools()).tolist() == [7.0, 3.0]


def test_work_is_priced_on_the_pool_that_did_it() -> None:
    requests = records(
        {"replica": 3}, {"replica": 4}, {"replica": NONE, "dispatched_s": np.nan, "outcome": Outcome.REFUSED}
    )
    used = measures.pools_used(SPEC, requests, two_pools())
    assert used.tolist() == [0, 1, 0]
    work = measures.work_gpu_s(SPEC, requests, used)
    assert work[0] == work[2]
    assert work[1] > 4 * work[0]  # four GPUs, each slower than the one


def test_provisioning_gap() -> None:
    over, under = measures.provisioning_gap(np.array([2.0, 4.0, 0.0, 2.0]), np.array([3.0, 2.0, 1.0, 2.0]))
    assert (over, under) == (2 / 8, 2 / 8)
    assert np.isnan(measures.provisioning_gap(np.zeros(2), np.ones(2))).all()


def test_token_rates_spread_tokens_between_first_and_last() -> None:
    requests = records(
        {"first_token_s": 5.0, "end_s": 25.0, "output_tokens": 21},
        {"first_token_s": 12.0, "end_s": 12.0, "output_tokens": 1},
        {"arrival_s": 31.0, "outcome": Outcome.UNFINISHED},
    )
    assert measures.token_rates(requests, 10.0) == pytest.approx([1 + 5, 1 + 10, 5])
    assert len(measures.token_rates(requests[:1], 10.0)) == 0


@given(
    first_s=st.floats(0.01, 5.0),
    gap_s=st.floats(0.0, 1.0),
    tokens=st.integers(1, 40),
    ttft_s=st.floats(0.1, 4.0),
    token_s=st.floats(0.01, 1.0),
)
def test_qoe_is_andes_definition_token_by_token(
    first_s: float, gap_s: float, tokens: int, ttft_s: float, token_s: float
) -> None:
    end_s = first_s + (tokens - 1) * gap_s
    done = records({"first_token_s": first_s, "end_s": end_s, "output_tokens": tokens})
    delivered = [first_s + i * gap_s for i in range(tokens)]
    expected = [ttft_s + i * token_s for i in range(tokens)]
    read = [max(delivered[0], expected[0])]
    for i in range(1, tokens):
        read.append(max(delivered[i], read[-1] + token_s))
    late = sum(read) - sum(expected)
    whole = sum(read[-1] + token_s - due for due in expected)
    (qoe,) = measures.quality_of_experience(done, ttft_s, token_s)
    assert qoe == pytest.approx(1.0 - late / whole, abs=1e-6)
    assert 0.0 <= qoe <= 1.0 + 1e-9


def test_qoe_of_the_ideal_and_of_the_refused() -> None:
    requests = records(
        {"first_token_s": 0.5, "end_s": 0.6},  # far ahead of the reader: waits in the client
        {"first_token_s": 0.5, "end_s": 9.5},
        {"outcome": Outcome.REFUSED, "first_token_s": np.nan},
    )
    qoe = measures.quality_of_experience(requests, 1.0, 0.1)
    assert qoe[0] == 1.0
    assert 0.0 < qoe[1] < 1.0
    assert qoe[2] == 0.0


def test_blocking_counts_waits_behind_longer_requests_on_the_same_replica() -> None:
    requests = records(
        {"arrival_s": 0.0, "end_s": 10.0, "output_tokens": 100},
        {"arrival_s": 1.0, "scheduled_s": 6.0, "end_s": 7.0},  # waits 5 s, all of them behind the long one
        {"arrival_s": 2.0, "scheduled_s": 9.0, "end_s": 12.0, "output_tokens": 200},  # is longer itself
        {"arrival_s": 8.0, "scheduled_s": 20.0, "end_s": 21.0},  # behind both until the second ends at 12
        {"arrival_s": 8.5, "scheduled_s": 20.0, "end_s": 21.0, "replica": 1},  # another replica
        {"arrival_s": 9.0, "scheduled_s": np.nan, "outcome": Outcome.TIMED_OUT, "replica": NONE},
    )
    blocked = measures.head_of_line_blocking_s(requests)
    np.testing.assert_allclose(blocked, [0.0, 5.0, 0.0, 4.0, 0.0, np.nan])


@given(st.integers(0, 2**32 - 1))
def test_blocking_equals_a_search_over_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    number = int(rng.integers(1, 30))
    arrival_s = np.sort(rng.uniform(0.0, 10.0, number))
    scheduled_s = arrival_s + rng.exponential(2.0, number)
    rows = zip(arrival_s, scheduled_s, scheduled_s + rng.exponential(3.0, number), strict=True)
    requests = records(*({"arrival_s": a, "scheduled_s": s, "end_s": e} for a, s, e in rows))
    requests["replica"] = rng.integers(0, 3, number)
    requests["output_tokens"] = rng.integers(1, 6, number)
    expected = []
    for k, mine in enumerate(requests):
        ahead = [
            h["end_s"]
            for h in requests[:k]
            if h["replica"] == mine["replica"] and h["output_tokens"] > mine["output_tokens"]
        ]
        expected.append(max(min(max(ahead, default=-np.inf), mine["scheduled_s"]) - mine["arrival_s"], 0.0))
    np.testing.assert_allclose(measures.head_of_line_blocking_s(requests), expected)


def test_an_idle_replica_halves_what_is_used() -> None:
    number = 200
    workload = Workload(
        np.arange(number) * 0.5,
        np.full(number, 500, dtype=np.int32),
        np.full(number, 100, dtype=np.int32),
        np.zeros(number, dtype=np.int16),
        ("chat",),
        100.0,
    )
    pool = {"name": "a", "profile": "llama-3.1-8b_a100_tp1", "max_replicas": 2}
    usages = {}
    for replicas in (1, 2):
        spec = FleetSpec.from_dict(
            {
                "pools": [{**pool, "initial_replicas": replicas}],
                "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}],
                "router": "packing",
            }
        )
        fleet = SimFleet(spec, workload)
        fleet.apply(ScalingDecision(np.array([replicas]), spec.batch_limits, np.array([np.inf])))
        while fleet.advance():
            pass
        usages[replicas] = fleet.result().usage
    assert usages[1].gpu_utilisation > 0.9  # some request is always there; the last control step is cut off
    assert usages[2].gpu_utilisation == pytest.approx(usages[1].gpu_utilisation / 2)
    assert usages[2].gpu_efficiency == pytest.approx(usages[1].gpu_efficiency / 2)
    assert usages[1].gpu_efficiency < usages[1].gpu_utilisation  # batches are far from full
    assert usages[2].over_provisioned > usages[1].over_provisioned + 1
    assert usages[1].under_provisioned == 0.0
