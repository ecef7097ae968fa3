"""Andes' choice: who reads what is behind, who has read ahead pauses. Both simulators; iterations last 1 s."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.measures import quality_of_experience
from rl_autoscale.sim.schedulers.andes import HORIZON_S, qoe_gain
from rl_autoscale.workload.trace import Workload

PROFILE = "llama-3.1-8b_a100_tp1"
READER = {"ttft_slo_s": 3.0, "tpot_slo_s": 4.0}
"""Reads a token in 4 s, of which a replica delivers one per second."""


def test_without_contention_it_is_first_come_first_served(play: Any) -> None:
    rng = np.random.default_rng(3)
    rows = [(float(t), "chat", int(p), int(n)) for t, p, n in zip(
        np.sort(rng.integers(0, 60, 30) / 2), rng.integers(1, 150, 30), rng.integers(1, 30, 30), strict=True
    )]  # fmt: skip
    pool = {"name": "p", "max_num_seqs": 8, "kv_blocks": 400}
    fcfs, andes = (play([{**pool, "scheduler": name}], rows, chat=READER) for name in ("vllm", "andes"))
    assert np.nanmax(fcfs["scheduled_s"] - fcfs["arrival_s"]) > 5  # there was a queue, in front of the batch limit
    for field in ("scheduled_s", "first_token_s", "end_s"):
        np.testing.assert_array_equal(andes[field], fcfs[field])


CROWD = [(0.0, "chat", 14, 30), (0.0, "chat", 14, 30), (11.5, "chat", 40, 10)]
"""The first two grow to 3 KV blocks each, the third begins with 3; two fit at a time."""


def test_who_is_ahead_of_its_reader_pauses_for_who_waits(play: Any) -> None:
    """After 20 s the first two have 19 or 20 tokens, of which 5 are read; the third has had none for 8.5 s."""
    pool = {"name": "p", "max_num_seqs": 4, "kv_blocks": 6, "block_move_s": 0.0}
    fcfs = play([pool], CROWD, chat=READER)
    assert fcfs["first_token_s"].tolist() == [1.0, 2.0, 31.0]
    andes = play([{**pool, "scheduler": "andes"}], CROWD, chat=READER)
    assert andes["first_token_s"].tolist() == [1.0, 2.0, 21.0]
    assert andes["end_s"].tolist() == [40.0, 41.0, 30.0]  # ten iterations from look to look
    assert not andes["num_preemptions"].any()  # nothing is computed again
    in_turn, chosen = (quality_of_experience(requests, 3.0, 4.0) for requests in (fcfs, andes))
    assert chosen[:2].tolist() == in_turn[:2].tolist() == [1.0, 1.0]  # they never ran out of tokens to read
    assert chosen[2] > in_turn[2] + 0.2


def serve(workload: Workload, pool: dict[str, Any], promise: dict[str, float]) -> SimFleet:
    """One replica serves all of it."""
    spec = {"pools": [{"name": "p", "profile": PROFILE, "max_replicas": 1, **pool}]}
    fleet = SimFleet(FleetSpec.from_dict({**spec, "classes": [{"name": "chat", **promise}]}), workload)
    while fleet.advance():
        pass
    return fleet


def test_a_batch_that_is_slower_than_its_readers_is_cut() -> None:
    """200 sequences decode in 39 ms, 128 in 25 ms, which is what a reader takes: not all of them run at first."""
    number = 200
    lengths = np.full(number, 1000), np.full(number, 400)
    workload = Workload(np.linspace(0.0, 2.0, number), *lengths, np.zeros(number, int), ("chat",), 2.0)
    first_s, end_s, qoe = {}, {}, {}
    for name in ("vllm-priority", "andes"):
        fleet = serve(workload, {"scheduler": name}, {"ttft_slo_s": 1.0, "tpot_slo_s": 0.025})
        requests = fleet.batch.requests()
        first_s[name], end_s[name] = np.sort(requests["first_token_s"]), np.sort(requests["end_s"])
        qoe[name] = fleet.result().classes[0].qoe
    assert first_s["andes"][-1] > first_s["vllm-priority"][-1] + 5
    assert end_s["andes"][50] < end_s["vllm-priority"][0]
    assert qoe == {"vllm-priority": pytest.approx(0.51, abs=0.005), "andes": pytest.approx(0.44, abs=0.005)}  # a loss


def test_it_beats_fcfs_on_mean_qoe_under_overload() -> None:
    """The KV cache holds half of those that would run at once; tokens come several times as fast as they are read."""
    rng = np.random.default_rng(0)
    number = 300
    arrival_s = np.cumsum(rng.exponential(0.25, number))
    output = np.clip(rng.lognormal(6.5, 0.6, number), 50, 4000).astype(int)
    workload = Workload(
        arrival_s, rng.integers(100, 400, number), output, np.zeros(number, int), ("chat",), float(arrival_s[-1])
    )
    qoe = {}
    for name in ("vllm-priority", "andes"):
        pool = {"kv_blocks": 1000, "max_num_seqs": 256, "scheduler": name}
        (chat,) = serve(workload, pool, {"ttft_slo_s": 1.0, "tpot_slo_s": 0.1}).result().classes
        qoe[name] = chat.qoe
    assert qoe["vllm-priority"] < 0.6
    assert qoe["andes"] > 0.95


@given(
    read_s=st.floats(-60.0, 80.0),
    begins_s=st.floats(0.0, 20.0),
    gap_s=st.floats(0.01, 1.0),
    expected_s=st.floats(-100.0, 40.0),
    token_s=st.floats(0.01, 1.0),
)
def test_the_gain_is_the_area_that_serving_adds_over_the_area_expected(
    read_s: float, begins_s: float, gap_s: float, expected_s: float, token_s: float
) -> None:
    time_s = np.linspace(0.0, HORIZON_S, 100_001)
    delivered = np.maximum(time_s - begins_s, 0.0) / gap_s
    read = np.minimum(delivered, np.maximum(time_s - max(read_s, begins_s), 0.0) / token_s)
    area = np.trapezoid(read, time_s)
    expected_area = (HORIZON_S - expected_s) ** 2 / (2.0 * token_s)
    gain = qoe_gain(0.0, read_s, begins_s, gap_s, expected_s, token_s)
    assert gain == pytest.approx(area / expected_area, rel=1e-4, abs=1e-6)


def test_nothing_is_gained_where_nothing_is_expected_or_read_by_the_horizon() -> None:
    assert qoe_gain(0.0, 60.0, 0.0, 0.1, 60.0, 0.1) == 0.0  # its first token is due later
    assert qoe_gain(0.0, 60.0, 0.0, 0.1, -60.0, 0.1) == 0.0  # its reader is busy for longer
