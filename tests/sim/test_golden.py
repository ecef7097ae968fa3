"""A time line of ten requests, computed by hand and demanded of both simulators.

The toy engine: an iteration lasts 1 s + 1/8 s per decode sequence + 1/4 s per prompt chunk. 32 tokens per iteration,
8 KV blocks of 16 tokens, at most 4 sequences. One replica; a second one is asked for at 20 s (start-up 3 s) and given
up at 30 s.

    0        r0 (40 -> 3) arrives and starts: chunk 32 of 40                            1 + 1/4        -> 1.25
    0.5      r1 (10 -> 2) arrives, waits for the iteration's end
    1.25     chunk 8 of r0, chunk 10 of r1                                              1 + 2/4        -> 2.75
    2.75     first tokens of r0 and r1; both decode                                     1 + 2/8        -> 4
    3        r2 (5 -> 1) arrives
    4        r1 ends; mixed: r0 decodes, chunk 5 of r2                                  1 + 1/8 + 1/4  -> 5.375
    5.375    r0 ends; r2's only token

    6        r3 (60 -> 8): chunk 32, 2 blocks                                           1 + 1/4        -> 7.25
    7.25     chunk 28, 4 blocks                                                         1 + 1/4        -> 8.5
    8.5      r3's 1st token (60 computed); decodes, the leap would be 7 iterations      1 + 1/8        -> 9.625
    9        r4 (60 -> 8) arrives and cuts the leap
    9.625    r3's 2nd; r4 fits (4 of 4 free blocks): chunk 31, the budget less r3       1 + 1/8 + 1/4  -> 11
    11       r3's 3rd; chunk 29: all 8 blocks taken                                     1 + 1/8 + 1/4  -> 12.375
    12.375   r3's 4th, r4's 1st; both decode                                            1 + 2/8        -> 13.625
    13.625   r3's 5th (64 computed), r4's 2nd. r3 needs a 5th block and none is free: r4, the tail, is preempted
             and loses its 61 computed tokens; r3 decodes alone, nobody is admitted     1 + 1/8        -> 14.75
    14.75    r3's 6th; r4 needs 4 blocks for its 62 tokens, 3 are free: it waits        2 (1 + 1/8)    -> 17
    15       r5 (10 -> 1) arrives behind r4
    17       r3's 8th, it ends; r4 recomputes: chunk 32 of 62, which is the budget      1 + 1/4        -> 18.25
    18.25    chunk 30 of r4 leaves 2 tokens: chunk 2 of r5                              1 + 2/4        -> 19.75
    19.75    r4's 3rd; it decodes beside chunk 8 of r5                                  1 + 1/8 + 1/4  -> 21.125
    20       a second replica is asked for; it is ready at 23
    21.125   r4's 4th; r5's only token; r4 decodes 4 more                               4 (1 + 1/8)    -> 25.625
    25.625   r4 ends

    24       r6 (20 -> 12) goes to the second replica, which is idle                    1 + 1/4        -> 25.25
    25.25    r6's 1st; 11 more                                                          11 (1 + 1/8)   -> 37.625
    26       r7 (20 -> 10) goes to the first, which is idle again                       1 + 1/4        -> 27.25
    27.25    r7's 1st; iterations end at 28.375, 29.5, 30.625, 31.75
    30       one replica is wanted; both have one request: the higher slot drains
    31       r8 (8 -> 1) can only go to the first replica
    31.75    r7's 5th; it decodes beside chunk 8 of r8                                  1 + 1/8 + 1/4  -> 33.125
    33.125   r7's 6th; r8's only token; r7 decodes 4 more                               4 (1 + 1/8)    -> 37.625
    37.625   r6 ends and the drained replica leaves; r7 ends; then r9 (4 -> 2) arrives  1 + 1/4        -> 38.875
    38.875   r9's 1st; decodes                                                          1 + 1/8        -> 40
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.layout import Outcome
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.workload.trace import Workload

PROFILE = """
{name: toy, model: toy, gpu: toy, gpus_per_replica: 1, kv_blocks: 8, max_num_seqs: 4, max_num_batched_tokens: 32,
 token_knots: [0, 1], token_knot_s: [1.0, 1.0], decode_context_s: 0, decode_seq_s: 0.125, prefill_pair_s: 0,
 prefill_context_s: 0, prefill_seq_s: 0.25, source: made up}
"""

# arrival, prompt, output | scheduled, first token, last token, preemptions, slot
TIMELINE = np.array(
    [
        [0.0, 40, 3, 0.0, 2.75, 5.375, 0, 0],
        [0.5, 10, 2, 1.25, 2.75, 4.0, 0, 0],
        [3.0, 5, 1, 4.0, 5.375, 5.375, 0, 0],
        [6.0, 60, 8, 6.0, 8.5, 17.0, 0, 0],
        [9.0, 60, 8, 9.625, 12.375, 25.625, 1, 0],
        [15.0, 10, 1, 18.25, 21.125, 21.125, 0, 0],
        [24.0, 20, 12, 24.0, 25.25, 37.625, 0, 1],
        [26.0, 20, 10, 26.0, 27.25, 37.625, 0, 0],
        [31.0, 8, 1, 31.75, 33.125, 33.125, 0, 0],
        [37.625, 4, 2, 37.625, 38.875, 40.0, 0, 0],
    ]
)


@pytest.fixture
def tpot_slo_s() -> float:
    return 1.3


@pytest.fixture(params=[SimFleet, ReferenceFleet], ids=["engine", "reference"])
def played(
    request: pytest.FixtureRequest, tmp_path: Path, tpot_slo_s: float
) -> tuple[SimFleet | ReferenceFleet, list[FleetState]]:
    """The fleet after the ten requests, and what was seen every 10 s."""
    profile = tmp_path / "toy.yaml"
    profile.write_text(PROFILE)
    spec = FleetSpec.from_dict(
        {
            "pools": [
                {"name": "toy", "profile": str(profile), "max_replicas": 2, "startup": [{"mean_s": 3.0, "cv": 0.0}]}
            ],
            "classes": [{"name": "chat", "ttft_slo_s": 3.0, "tpot_slo_s": tpot_slo_s}],
            "telemetry_age_s": 0.0,
        }
    )
    arrival_s, prompt, output = TIMELINE[:, 0], TIMELINE[:, 1].astype(int), TIMELINE[:, 2].astype(int)
    workload = Workload(arrival_s, prompt, output, np.zeros(10, dtype=int), ("chat",), 38.0)
    fleet = request.param(spec, workload)
    states = [fleet.observe()]
    for target in (1, 1, 2, 1):
        fleet.apply(ScalingDecision(np.array([target]), np.array([4]), np.array([np.inf])))
        going_on = fleet.advance()
        states.append(fleet.observe())
    assert not going_on
    return fleet, states


def test_ten_requests(played: tuple[SimFleet | ReferenceFleet, list[FleetState]]) -> None:
    fleet, _ = played
    records = fleet.batch.requests() if isinstance(fleet, SimFleet) else fleet.request_records()
    names = ("arrival_s", "prompt_tokens", "output_tokens", "scheduled_s", "first_token_s", "end_s",
             "num_preemptions", "replica")  # fmt: skip
    np.testing.assert_array_equal(np.stack([records[name] for name in names], axis=1), TIMELINE)
    np.testing.assert_array_equal(records["dispatched_s"], TIMELINE[:, 0])  # there was always room
    assert (records["outcome"] == Outcome.FINISHED).all()
    # Late first tokens: r4 (3.375 s) and r5 (6.125 s). Slow: r0 (2.625 / 2 = 1.3125). r3: 8.5 / 7 = 1.214 holds.
    np.testing.assert_array_equal(records["slo_met"], [0, 1, 1, 1, 0, 0, 1, 1, 1, 1])


def test_its_books(played: tuple[SimFleet | ReferenceFleet, list[FleetState]]) -> None:
    fleet, _ = played
    result = fleet.result()
    # The first replica from 0 to 40, the second from 20 to 37.625, of which it is ready from 23 to 30.
    assert result.gpu_hours * 3600 == pytest.approx(40 + 17.625)
    assert result.ready_share == pytest.approx((40 + 7) / 57.625)
    assert result.duration_s == 40.0
    assert (result.num_met, result.num_arrived, result.num_preemptions) == (7, 10, 1)
    np.testing.assert_array_equal(result.timeline["target"][:, 0], [1, 1, 2, 1])
    np.testing.assert_array_equal(result.timeline["missed"][:, 0], [1, 1, 1, 0])  # r0; r4's first token; r5's


def test_what_a_decision_sees(played: tuple[SimFleet | ReferenceFleet, list[FleetState]]) -> None:
    _, states = played
    at_20, at_30, at_40 = states[2].pools, states[3].pools, states[4].pools
    assert at_20.running[0] == 2  # r4 decodes, r5's chunk
    assert at_20.kv_usage[0] == 5 / 8  # 63 tokens of r4 in 4 blocks, 10 of r5 in 1
    assert at_20.preemptions[0] == 1
    # Tokens in (10, 20]: r3's 3rd to 8th and r4's first three.
    assert at_20.generation_tokens_per_s[0] == pytest.approx(0.9)
    # Gaps in (10, 20], decoding: r3 1.375 + 1.375 + 1.25 + 3 x 1.125, r4 1.25; r4's gap across its preemption is not
    # one.
    assert at_20.itl_s[0] == pytest.approx((1.375 + 1.375 + 1.25 + 3 * 1.125 + 1.25) / 7)
    assert at_20.pending_prompt_tokens[0] == 10  # r5
    assert (at_30.ready[0], at_30.starting[0], at_30.draining[0], at_30.asked_for[0]) == (2, 0, 0, 2)
    assert (at_40.ready[0], at_40.draining[0], at_40.in_flight[0]) == (1, 0, 0)
    classes = states[2].classes
    assert classes.first_tokens_per_s[0] == pytest.approx(0.1)  # r4
    assert classes.late_first_tokens_per_s[0] == pytest.approx(0.1)  # r4, after 3.375 s
    assert classes.ttft_mean_s[0] == pytest.approx(3.375)
    assert classes.ttft_p95_s[0] == pytest.approx(2.5 + 0.95 * 2.5)  # inside the bucket from 2.5 to 5 s
    assert classes.tpot_mean_s[0] == pytest.approx(8.5 / 7)  # r3
    assert classes.met_per_s[0] == pytest.approx(0.1)


@pytest.mark.parametrize("tpot_slo_s", [1.2])
def test_an_answer_of_a_few_tokens_is_late_but_not_slow(
    played: tuple[SimFleet | ReferenceFleet, list[FleetState]],
) -> None:
    """TPOT: r0 1.3125 s of 3 tokens, r1 1.25 of 2, r3 1.214 of 8, r4 more, but its first token was late already."""
    _, states = played
    seen = [state.classes for state in states[1:]]
    np.testing.assert_allclose([10 * classes.finished_per_s[0] for classes in seen], [3, 1, 2, 4])
    np.testing.assert_allclose([10 * classes.met_per_s[0] for classes in seen], [1, 0, 0, 4])
    np.testing.assert_allclose([10 * classes.slow_answers_per_s[0] for classes in seen], [0, 1, 0, 0])
    np.testing.assert_allclose([10 * classes.late_first_tokens_per_s[0] for classes in seen], [0, 1, 1, 0])
