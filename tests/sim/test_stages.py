"""Prefill and decode pools, the bridge between them, and post-processing: by hand, and when one stage is too slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.layout import Outcome
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.workload.trace import Workload

PREFILL, DECODE = {"name": "p", "role": "prefill"}, {"name": "d", "role": "decode"}
BLOCK_PER_S = 16 * 1024.0  # the toy profile's KV block is on the link for 1 s
FAST = {"link_bytes_per_s": 2.0**40, "latency_s": 0.0}


def test_a_prompt_is_computed_sent_and_decoded(play: Any) -> None:
    """One place in the bridge, 0.5 s and 1 s per block on the link.

    0 to 1 r0's prompt; 1 to 2.5 its block is sent; it decodes until 4.5. r1's prompt (2 blocks) is computed at 2,
    but the bridge has no place before r0 leaves it at 2.5: sent until 5, decodes until 6. Until 2.5 both have a place
    on the prefill replica, whose cap is 2, so r2's prompt is computed until 3.5; its only token ends it there.
    """
    transfer = {"link_bytes_per_s": BLOCK_PER_S, "latency_s": 0.5, "bridge_limit": 1}
    requests = play(
        [PREFILL, DECODE], [(0.0, "chat", 16, 3), (0.5, "chat", 32, 2), (0.75, "chat", 10, 1)], kv_transfer=transfer
    )
    assert (requests["outcome"] == Outcome.FINISHED).all()
    assert requests["first_token_s"].tolist() == [1.0, 2.0, 3.5]
    assert requests["last_token_s"].tolist() == requests["end_s"].tolist() == [4.5, 6.0, 3.5]
    assert requests["replica"].tolist() == [2, 2, 0]


@pytest.mark.parametrize(("most_seqs", "dispatched_s"), [(1, 20.0), (4, 0.0)], ids=["cap", "KV blocks"])
def test_a_full_bridge_stops_prefill(play: Any, most_seqs: int, dispatched_s: float) -> None:
    """r0 decodes alone until 20, r1 waits in the bridge, r2 keeps its place and 2 of 3 blocks where it was prefilled.

    So r3 waits until r2's blocks are sent at 20: at the gateway where the cap is 1, else in the engine for KV blocks.
    """
    prefill = PREFILL | {"max_num_seqs": most_seqs, "max_num_batched_tokens": 32, "kv_blocks": 3}
    rows = [(0.0, "chat", 32, output) for output in (20, 2, 2, 2)]
    requests = play([prefill, DECODE | {"max_num_seqs": 1}], rows, kv_transfer=FAST | {"bridge_limit": 1})
    assert requests["first_token_s"] == pytest.approx([1.0, 2.0, 3.0, 21.0], abs=1e-6)
    assert requests["end_s"] == pytest.approx([20.0, 21.0, 22.0, 23.0], abs=1e-6)
    assert requests["dispatched_s"][3] == pytest.approx(dispatched_s, abs=1e-6)


def test_a_preempted_request_recomputes_on_the_decode_replica(play: Any) -> None:
    """Both arrive there with 2 blocks of 5; at 48 tokens each needs a third, and the younger one has to give way."""
    pools = [PREFILL, DECODE | {"kv_blocks": 5}]
    requests = play(pools, [(0.0, "chat", 30, 10), (0.0, "chat", 30, 10)], kv_transfer=FAST | {"bridge_limit": 9})
    assert requests["num_preemptions"].tolist() == [0, 1]
    assert (requests["replica"] == 2).all()
    assert (requests["outcome"] == Outcome.FINISHED).all()


def test_a_full_stage_of_postprocessing_holds_streams_up(play: Any) -> None:
    """One worker takes 5 s. r1 and r2 have all their tokens at 3 and 4, but keep sequence and place until 7 and 12.

    So r3 cannot be sent before 7. Latency per token is that of the stream.
    """
    rows = [(0.0, "chat", 10, 2)] * 4
    requests = play(
        [{"name": "m"}], rows, postprocess={"num_workers": 1, "request_s": 4.5, "token_s": 0.25, "queue_limit": 0}
    )
    assert requests["last_token_s"].tolist() == [2.0, 3.0, 4.0, 9.0]
    assert requests["dispatched_s"].tolist() == [0.0, 0.0, 2.0, 7.0]
    assert requests["end_s"].tolist() == [7.0, 12.0, 17.0, 22.0]


def test_a_deadline_includes_postprocessing_and_tpot_does_not(play: Any) -> None:
    requests = play(
        [{"name": "m"}],
        [(0.0, "chat", 10, 2), (0.0, "batch", 10, 2)],
        chat={"tpot_slo_s": 1.0, "deadline_s": 6.0},
        batch={"tpot_slo_s": 1.0, "deadline_s": 8.0},
        postprocess={"num_workers": 2, "request_s": 5.0},
    )
    assert requests["last_token_s"].tolist() == [2.0, 3.0]
    assert requests["end_s"].tolist() == [7.0, 8.0]
    assert requests["slo_met"].tolist() == [0, 1]


STAGED_S = 40
ARRIVALS_PER_S, SLOWEST_PER_S = 15, 10


@pytest.fixture(params=[SimFleet, ReferenceFleet], ids=["engine", "reference"])
def staged(request: pytest.FixtureRequest, metronome_profile: Path) -> Any:
    """15 requests a second through three stages, of which one takes 10 a second; returns (states, requests).

    Prefill computes 15 prompts of 2 tokens per iteration of 1 s; decode generates 2 tokens more in 2 iterations.
    """

    def staged(decode_seqs: int, num_workers: int) -> tuple[list[FleetState], Any]:
        pool = {"profile": str(metronome_profile), "max_replicas": 1, "kv_blocks": 2000}
        spec = FleetSpec.from_dict(
            {
                "pools": [
                    PREFILL | pool | {"max_num_seqs": 30, "max_num_batched_tokens": 30},
                    DECODE | pool | {"max_num_seqs": decode_seqs},
                ],
                "classes": [{"name": "chat", "ttft_slo_s": 100, "tpot_slo_s": 100, "queue_limit": 5000}],
                "kv_transfer": FAST | {"bridge_limit": 40},
                "postprocess": {"num_workers": num_workers, "request_s": 1.0, "queue_limit": 5},
                "control_interval_s": 1.0,
                "telemetry_age_s": 0.0,
            }
        )
        ones = np.ones(STAGED_S * ARRIVALS_PER_S, dtype=np.int64)
        arrival_s = np.repeat(np.arange(STAGED_S), ARRIVALS_PER_S).astype(np.float64)
        fleet = request.param(spec, Workload(arrival_s, 2 * ones, 3 * ones, 0 * ones, ("chat",), float(STAGED_S)))
        decision = ScalingDecision(spec.initial_replicas, spec.batch_limits, np.array([np.inf]))
        states = [fleet.observe()]
        going_on = True
        while going_on:
            fleet.apply(decision)
            going_on = fleet.advance()
            states.append(fleet.observe())
        return states, fleet.batch.requests() if isinstance(fleet, SimFleet) else fleet.request_records()

    return staged


def first_step(states: list[FleetState], full: Any) -> int:
    """The first step at which something is full."""
    return next(step for step, state in enumerate(states) if full(state))


@pytest.mark.parametrize(
    ("decode_seqs", "num_workers"), [(20, 30), (40, 10)], ids=["decode is slow", "post-processing is slow"]
)
def test_a_full_stage_holds_up_the_one_before_it(staged: Any, decode_seqs: int, num_workers: int) -> None:
    """In 10 s 150 prompts reach prefill while 100 leave: stage after stage fills up, back to the gateway's queue."""
    states, requests = staged(decode_seqs, num_workers)
    assert (requests["outcome"] == Outcome.FINISHED).all()  # nothing is lost
    assert len(requests) == STAGED_S * ARRIVALS_PER_S
    filled = [
        first_step(states, lambda state: state.stages.bridge_used == 40),
        first_step(states, lambda state: state.stages.held_prompts > 15),
        first_step(states, lambda state: state.classes.queue_length[0] > 20),
    ]
    if num_workers == SLOWEST_PER_S:
        filled = [
            first_step(states, lambda state: state.stages.postprocess_queue == 5),
            first_step(states, lambda state: state.stages.held_streams > 0),
            *filled,
        ]
    assert filled == sorted(filled)
    steady = slice(filled[-1] + 1, STAGED_S)
    first_tokens = np.array([float(state.classes.first_tokens_per_s[0]) for state in states])
    finished = np.array([float(state.classes.finished_per_s[0]) for state in states])
    assert first_tokens[1 : filled[0]].max() == ARRIVALS_PER_S  # prefill could do more ...
    assert first_tokens[steady].mean() == pytest.approx(SLOWEST_PER_S, rel=0.05)  # ... and is held up
    assert finished[steady].mean() == pytest.approx(SLOWEST_PER_S, rel=0.02)


@pytest.mark.parametrize(
    ("roles", "fleet", "message"),
    [
        (("prefill",), {}, "roles prefill: prefill and decode pools come together"),
        (("prefill", "mixed"), {}, "roles mixed, prefill: prefill and decode pools come together"),
        (("prefill", "decode"), {}, "need kv_transfer"),
        (("mixed",), {"kv_transfer": {}}, "kv_transfer is for fleets of prefill and decode pools"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    roles: tuple[str, ...], fleet: dict[str, Any], message: str, metronome_profile: Path
) -> None:
    pools = [{"name": role, "role": role, "profile": str(metronome_profile)} for role in roles]
    with pytest.raises(SpecError, match=message):
        FleetSpec.from_dict(
            {"pools": pools, "classes": [{"name": "c", "ttft_slo_s": 1, "tpot_slo_s": 1}], **fleet}, where="fleet"
        )


def test_pools_must_run_one_model(metronome_profile: Path) -> None:
    other = metronome_profile.with_name("other.yaml")
    other.write_text(metronome_profile.read_text().replace("model: toy", "model: else"))
    without = metronome_profile.with_name("without.yaml")
    without.write_text(metronome_profile.read_text().replace("kv_bytes_per_token: 1024\n", ""))
    for profile, message in ((other, "must run one model"), (without, "lacks kv_bytes_per_token")):
        pools = [PREFILL | {"profile": str(metronome_profile)}, DECODE | {"profile": str(profile)}]
        classes = [{"name": "c", "ttft_slo_s": 1, "tpot_slo_s": 1}]
        with pytest.raises(SpecError, match=message):
            FleetSpec.from_dict({"pools": pools, "classes": classes, "kv_transfer": {}})
