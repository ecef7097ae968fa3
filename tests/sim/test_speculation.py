"""Speculative decoding, by hand-made examples in both simulators; the random ones are in test_differential.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.pool import PoolSpec, SpeculationSpec
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.workload.trace import Workload

HALF = {"draft_tokens": 1, "acceptance": 0.5}  # 1.5 tokens per iteration
ALL = {"draft_tokens": 3, "acceptance": 1.0}  # 4
PROFILE = "llama-3.1-8b_h100_tp1"


def drawn_tokens(draft_tokens: int, acceptance: float, num_iterations: int) -> float:
    """Mean tokens per iteration where every acceptance is drawn."""
    accepted = np.random.default_rng(0).random((num_iterations, draft_tokens)) < acceptance
    return 1.0 + float(np.cumprod(accepted, axis=1).sum(axis=1).mean())


@pytest.mark.parametrize(("draft_tokens", "acceptance"), [(1, 0.5), (3, 0.7), (5, 0.9), (8, 0.3), (15, 1.0), (4, 0.0)])
def test_the_average_is_that_of_drawn_acceptances(draft_tokens: int, acceptance: float) -> None:
    spec = SpeculationSpec(draft_tokens=draft_tokens, acceptance=acceptance)
    drawn = drawn_tokens(draft_tokens, acceptance, 200_000)
    assert spec.tokens_per_iteration == pytest.approx(drawn, abs=1 / 64 + 0.02)


@given(st.integers(1, 15), st.floats(0, 1))
def test_an_iteration_keeps_between_one_and_all_of_its_tokens(draft_tokens: int, acceptance: float) -> None:
    kept = SpeculationSpec(draft_tokens=draft_tokens, acceptance=acceptance).tokens_per_iteration
    assert 1.0 <= kept <= draft_tokens + 1
    assert (32 * kept).is_integer()


@pytest.mark.parametrize(
    ("speculation", "output_tokens", "iterations"),
    [(None, 9, 9), (HALF, 1, 1), (HALF, 2, 2), (HALF, 3, 3), (HALF, 4, 3), (HALF, 9, 7), (ALL, 9, 3), (ALL, 6, 3)],
)
def test_iterations_of_one_request(play: Any, speculation: Any, output_tokens: int, iterations: int) -> None:
    """One iteration of 1 s for the prompt and its token; then 1.5 or 4 tokens each, the last of which may be cut."""
    requests = play([{"name": "a", "speculation": speculation}], [(0.0, "chat", 10, output_tokens)])
    assert (requests["first_token_s"][0], requests["end_s"][0]) == (1.0, float(iterations))


def test_drafts_use_up_the_token_budget(play: Any) -> None:
    """Two sequences fit 64 tokens; one that decodes with 3 drafts leaves 60 of them to the other's prompt of 61."""
    rows = [(0.0, "chat", 10, 9), (1.5, "chat", 61, 1)]
    assert play([{"name": "a", "speculation": ALL}], rows)["first_token_s"].tolist() == [1.0, 4.0]
    assert play([{"name": "a"}], rows)["first_token_s"].tolist() == [1.0, 3.0]


def test_a_preempted_sequence_keeps_its_whole_tokens(play: Any) -> None:
    """Four blocks for two sequences: at 3 s both need a third one, and the younger leaves with 2.5 tokens, so with 2.

    The older ends at 11 s with 1 + 10 * 1.5 tokens. The younger computes 32 tokens again, which yields its third, and
    has 12 to go: 8 iterations.
    """
    rows = [(0.0, "chat", 29, 16), (0.0, "chat", 30, 15)]
    requests = play([{"name": "a", "kv_blocks": 4, "speculation": HALF}], rows)
    assert requests["num_preemptions"].tolist() == [0, 1]
    assert requests["end_s"].tolist() == [11.0, 11.0 + 1 + 8]


def test_verifying_and_drafting_take_time(metronome_profile: Path, tmp_path: Path) -> None:
    """Linear layers see four tokens instead of one, attention reads three more, and drafting comes on top."""
    profile = yaml.safe_load(metronome_profile.read_text())
    profile |= {"token_knots": [0, 4], "token_knot_s": [1.0, 5.0], "decode_context_s": 0.5}
    path = tmp_path / "linear.yaml"
    path.write_text(yaml.safe_dump(profile))
    speculation = {"draft_tokens": 3, "acceptance": 0.0, "draft_s": 0.25}
    times_s = {}
    for name, pool in {"plain": {}, "drafts": {"speculation": speculation}}.items():
        spec = FleetSpec.from_dict(
            {
                "pools": [{"name": "a", "profile": str(path), **pool}],
                "classes": [{"name": "chat", "ttft_slo_s": 100, "tpot_slo_s": 100}],
            }
        )
        one = np.array([1])
        fleet = SimFleet(spec, Workload(np.array([0.0]), one, 3 * one, 0 * one, ("chat",), 50.0))
        while fleet.advance():
            pass
        request = fleet.batch.requests()[0]
        times_s[name] = float(request["end_s"] - request["first_token_s"])
    assert times_s["plain"] == (2.0 + 0.5 * 2) + (2.0 + 0.5 * 3)
    assert times_s["drafts"] == (5.25 + 0.5 * 5) + (5.25 + 0.5 * 6)


def mean_tpot_s(rate_per_s: float, speculation: dict[str, Any] | None) -> Any:
    """Of 500 requests that one replica serves."""
    rng = np.random.default_rng(0)
    number = 500
    arrival_s = np.cumsum(rng.exponential(1 / rate_per_s, number))
    zeros = np.zeros(number, dtype=np.int64)
    workload = Workload(
        arrival_s, rng.integers(100, 1000, number), rng.integers(50, 300, number), zeros, ("chat",), arrival_s[-1] + 1
    )
    pool = {"name": "a", "profile": PROFILE, "max_replicas": 1, "speculation": speculation}
    spec = FleetSpec.from_dict({"pools": [pool], "classes": [{"name": "chat", "ttft_slo_s": 9, "tpot_slo_s": 1}]})
    fleet = SimFleet(spec, workload)
    while fleet.advance():
        pass
    requests = fleet.batch.requests()
    return ((requests["end_s"] - requests["first_token_s"]) / (requests["output_tokens"] - 1)).mean()


def test_drafts_pay_while_the_batch_is_small() -> None:
    """On one GPU: a small batch has compute to spare, a large one has not."""
    drafts = {"draft_tokens": 5, "acceptance": 0.6}
    assert mean_tpot_s(0.5, drafts) < 0.6 * mean_tpot_s(0.5, None)
    hopeless = {"draft_tokens": 5, "acceptance": 0.0}
    assert mean_tpot_s(0.5, hopeless) < 1.1 * mean_tpot_s(0.5, None)
    assert mean_tpot_s(40.0, hopeless) > 1.3 * mean_tpot_s(40.0, None)


def test_demand_knows_the_drafts() -> None:
    """Full batches are bound by compute: what is verified in vain costs replicas."""

    def demand(speculation: dict[str, Any] | None) -> float:
        pool = {"name": "a", "profile": PROFILE, "speculation": speculation}
        spec = FleetSpec.from_dict({"pools": [pool], "classes": [{"name": "c", "ttft_slo_s": 1, "tpot_slo_s": 1}]})
        ones = np.ones(1)
        return float(DemandEstimator(spec).request_work_s(0 * ones, 100 * ones, np.array([0]))[0])

    assert demand({"draft_tokens": 3, "acceptance": 0.0}) > demand(None)
    assert demand({"draft_tokens": 3, "acceptance": 1.0}) < demand(None)


def test_a_batch_with_its_drafts_must_fit_an_iteration(metronome_profile: Path) -> None:
    pool = {"name": "a", "profile": str(metronome_profile), "max_num_seqs": 9, "speculation": {"draft_tokens": 7}}
    pool["speculation"] |= {"acceptance": 0.5}
    with pytest.raises(SpecError, match=r"max_num_seqs=9 sequences of 8 tokens .* exceed max_num_batched_tokens=64"):
        PoolSpec.from_dict(pool)
