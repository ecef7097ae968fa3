"""What happens at one and the same moment: replicas first, lowest slot first, then arrivals, then the control step.

Every iteration of this engine lasts exactly 1 s, so whole seconds are crowded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.workload.trace import Workload

PROFILE = """
{name: metronome, model: toy, gpu: toy, gpus_per_replica: 1, kv_blocks: 100, max_num_seqs: 2, max_num_batched_tokens: 64,
 token_knots: [0, 1], token_knot_s: [1.0, 1.0], decode_context_s: 0, decode_seq_s: 0, prefill_pair_s: 0,
 prefill_context_s: 0, prefill_seq_s: 0, source: made up}
"""

both_simulators = pytest.mark.parametrize("simulator", [SimFleet, ReferenceFleet], ids=["engine", "reference"])


def play(simulator: Any, tmp_path: Path, pools: list[dict[str, Any]], rows: list[tuple[float, str, int]]) -> Any:
    """Run requests (arrival, class, output tokens) of one prompt token each; returns their records."""
    path = tmp_path / "metronome.yaml"
    path.write_text(PROFILE)
    spec = FleetSpec.from_dict(
        {
            "pools": [{"profile": str(path), "max_replicas": 1, **pool} for pool in pools],
            "classes": [
                {"name": "chat", "ttft_slo_s": 100, "tpot_slo_s": 100},
                {"name": "batch", "kind": "batch", "ttft_slo_s": 100, "tpot_slo_s": 100, "priority": 1},
            ],
        }
    )
    arrival_s, names, output = zip(*rows, strict=True)
    classes = [("chat", "batch").index(name) for name in names]
    workload = Workload(
        np.array(arrival_s), np.ones(len(rows), dtype=int), np.array(output), np.array(classes), ("chat", "batch"), 50.0
    )
    fleet = simulator(spec, workload)
    while fleet.advance():
        pass
    return fleet.batch.requests() if isinstance(fleet, SimFleet) else fleet.request_records()


@both_simulators
def test_of_two_arrivals_at_once_the_first_starts_alone(simulator: Any, tmp_path: Path) -> None:
    """The first wakes the replica, and replicas come before arrivals."""
    requests = play(simulator, tmp_path, [{"name": "p"}], [(0.0, "chat", 1), (0.0, "chat", 1)])
    assert requests["scheduled_s"].tolist() == [0.0, 1.0]


@both_simulators
def test_an_arrival_at_an_iterations_end_waits_for_the_next(simulator: Any, tmp_path: Path) -> None:
    """At 3 s the replica has begun its fourth iteration when the request arrives; inside a leap as outside of it."""
    requests = play(simulator, tmp_path, [{"name": "p"}], [(0.0, "chat", 9), (3.0, "chat", 1)])
    assert requests["scheduled_s"].tolist() == [0.0, 4.0]


@both_simulators
@pytest.mark.parametrize(("first", "end_s"), [("mixed", 10.0), ("batch", 11.0)])
def test_a_later_slot_still_takes_what_an_earlier_one_gave_up(
    simulator: Any, tmp_path: Path, first: str, end_s: float
) -> None:
    """A batch request is evicted at 5 s and sent on to the other replica, one of whose iterations ends at 5 s, too.

    If that replica has the higher slot, its turn is still to come and it takes the request at once; else its next
    iteration has begun. The request has 5 of its 10 tokens; its recomputation yields the 6th.
    """
    pools = {"mixed": {"name": "mixed", "max_num_seqs": 1}, "batch": {"name": "batch", "role": "batch"}}
    order = [pools[first], pools["batch" if first == "mixed" else "mixed"]]
    rows = [(0.0, "batch", 2), (0.0, "batch", 20), (0.0, "batch", 10), (4.5, "chat", 3)]
    requests = play(simulator, tmp_path, order, rows)
    assert requests["num_evictions"].tolist() == [0, 0, 1, 0]
    assert requests["scheduled_s"].tolist() == [0.0, 1.0, 0.0, 5.0]
    assert requests["end_s"][2] == end_s
