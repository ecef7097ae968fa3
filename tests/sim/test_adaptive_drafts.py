"""Speculation under slos-serve: how many drafts an iteration verifies; the choice itself is in test_slos_plan.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.workload.trace import Workload

ALL = {"draft_tokens": 3, "acceptance": 1.0}
HALF = {"draft_tokens": 1, "acceptance": 0.5}
PROFILE = "llama-3.1-8b_h100_tp1"


def pool(**options: Any) -> dict[str, Any]:
    return {"name": "a", "scheduler": "slos-serve", "max_num_seqs": 8, **options}


def test_drafts_keep_a_pace_that_is_tighter_than_an_iteration(play: Any) -> None:
    """Iterations last 1 s, and an answer of 9 tokens may take 0.5 s for each: 2 s with 4 tokens per iteration."""
    rows = [(0.0, "chat", 10, 9)]
    for speculation, end_s, met in ((None, 9.0, 0), (ALL, 3.0, 1)):
        requests = play([pool(speculation=speculation)], rows, chat={"tpot_slo_s": 0.5})
        assert (requests["end_s"][0], requests["slo_met"][0]) == (end_s, met)


def test_drafts_make_room_for_a_prompt(play: Any) -> None:
    """A stream with 0.5 s per token leaves no room for a prompt; what it gains with drafts by 2 s is 1 s for one.

    That iteration has none, since all 60 tokens of the prompt fit it. Without drafts the stream is promised nothing.
    """
    rows = [(0.0, "chat", 10, 13), (0.5, "chat", 60, 1)]
    for speculation, end_s, met in ((None, [13.0, 2.0], [0, 1]), (ALL, [5.0, 3.0], [1, 1])):
        requests = play([pool(speculation=speculation)], rows, chat={"tpot_slo_s": 0.5, "ttft_slo_s": 4.0})
        assert requests["end_s"].tolist() == end_s
        assert requests["slo_met"].tolist() == met


def test_drafts_begin_when_reading_the_context_takes_long_enough(
    play: Any, metronome_profile: Path, tmp_path: Path
) -> None:
    """A second per token and a 16th per token read: one draft, of which half are kept, pays from 14 tokens on.

    1.5 * (1.25 + (n + 1) / 16) > 2.25 + (n + 2) / 16 for n > 13. It is chosen while the batch does not change.
    """
    profile = yaml.safe_load(metronome_profile.read_text())
    profile |= {"token_knots": [0, 64], "token_knot_s": [0.25, 64.25], "decode_context_s": 1 / 16}
    path = tmp_path / "linear.yaml"
    path.write_text(yaml.safe_dump(profile))
    context, now_s, left = 10.0, 10.25, 19.0
    while left > 0:
        drafts = int(context > 13)
        now_s += 1.25 + drafts + (context + 1 + drafts) / 16
        context, left = context + 1 + 0.5 * drafts, left - 1 - 0.5 * drafts
    requests = play([pool(profile=str(path), max_num_seqs=2, speculation=HALF)], [(0.0, "chat", 10, 20)])
    assert requests["end_s"][0] == now_s
    fixed = pool(profile=str(path), max_num_seqs=2, speculation=HALF, slos_serve={"adaptive_drafts": False})
    assert play([fixed], [(0.0, "chat", 10, 20)])["end_s"][0] > now_s


def served(rate_per_s: float, speculation: dict[str, Any] | None, *, tpot_slo_s: float, **options: Any) -> Any:
    """Records of 400 requests that one replica serves."""
    rng = np.random.default_rng(0)
    number = 400
    arrival_s = np.cumsum(rng.exponential(1 / rate_per_s, number))
    zeros = np.zeros(number, dtype=np.int64)
    workload = Workload(
        arrival_s, rng.integers(100, 1500, number), rng.integers(20, 300, number), zeros, ("chat",), arrival_s[-1] + 1
    )
    data = pool(profile=PROFILE, max_replicas=1, speculation=speculation, slos_serve=options, max_num_seqs=1024)
    classes = [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": tpot_slo_s}]
    fleet = SimFleet(FleetSpec.from_dict({"pools": [data], "classes": classes}), workload)
    while fleet.advance():
        pass
    return fleet.batch.requests()


def test_hopeless_drafts_are_not_verified() -> None:
    """Where no draft is ever accepted, all is as without speculation."""
    plain = served(20.0, None, tpot_slo_s=0.03)
    hopeless = served(20.0, {"draft_tokens": 4, "acceptance": 0.0}, tpot_slo_s=0.03)
    for name in ("first_token_s", "end_s"):
        np.testing.assert_allclose(hopeless[name], plain[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("rate_per_s", "tpot_slo_s"), [(60.0, 0.03), (10.0, 0.006)])
def test_adaptive_drafts_serve_no_fewer_than_all_or_none(rate_per_s: float, tpot_slo_s: float) -> None:
    """Under load, where drafts cost prompts their room, and where the pace is tighter than an iteration."""
    drafts = {"draft_tokens": 4, "acceptance": 0.7, "draft_s": 0.001}
    none, fixed, adaptive = (
        served(rate_per_s, speculation, tpot_slo_s=tpot_slo_s, **options)["slo_met"].mean()
        for speculation, options in ((None, {}), (drafts, {"adaptive_drafts": False}), (drafts, {}))
    )
    assert adaptive >= max(none, fixed) - 0.01
    assert adaptive > min(none, fixed) + 0.03
