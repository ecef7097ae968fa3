"""Batch work makes room for interactive requests; iterations last 1 s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import ScalingDecision
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.workload.trace import Workload


def test_the_youngest_running_one_leaves_when_its_iteration_ends(play: Any) -> None:
    rows = [(0.0, "batch", 1, 9), (0.5, "batch", 1, 9), (3.5, "chat", 1, 2)]
    requests = play([{"name": "p"}], rows)
    assert requests["num_evictions"].tolist() == [0, 1, 0]
    assert requests["scheduled_s"].tolist() == [0.0, 1.0, 4.0]
    assert requests["end_s"][2] == 6.0
    # Back at 6 s with 3 of its 9 tokens: its recomputation gives the 4th at 7 s, the 9th follows at 12 s.
    assert requests["dispatched_s"].tolist() == [0.0, 6.0, 3.5]
    assert requests["end_s"].tolist() == [9.0, 12.0, 6.0]


def test_a_stream_that_was_set_aside_is_the_youngest_when_it_is_back(play: Any) -> None:
    """The second prompt needs the whole token budget: the first stream makes way at 2 s and joins it again at 3 s."""
    rows = [(0.0, "batch", 10, 20), (0.5, "batch", 64, 20), (3.5, "chat", 1, 2)]
    requests = play([{"name": "p", "scheduler": "fastserve"}], rows)
    assert requests["scheduled_s"].tolist() == [0.0, 2.0, 4.0]
    assert requests["num_evictions"].tolist() == [1, 0, 0]


def test_one_that_waits_in_the_engine_leaves_at_once_and_goes_where_there_is_room(play: Any) -> None:
    """It arrived at 1.75 s when the batch pool was full; at 2 s a place became free there; at 2.25 s it is evicted."""
    pools = [{"name": "batch", "role": "batch"}, {"name": "mixed"}]
    rows = [(0.0, "batch", 1, 2), (0.0, "batch", 1, 20), (0.5, "batch", 1, 20), (1.75, "batch", 1, 2)]
    requests = play(pools, [*rows, (2.25, "chat", 1, 1)])
    assert requests["num_evictions"].tolist() == [0, 0, 0, 1, 0]
    assert requests["replica"][3] == requests["replica"][1]
    assert requests["dispatched_s"][3] == 2.25
    assert requests["scheduled_s"].tolist() == [0.0, 1.0, 0.5, 3.0, 2.5]


def test_an_evicted_head_of_line_makes_way_for_those_behind_it(play: Any) -> None:
    """The second request's 7 blocks do not fit beside the first's 4 of 8; when it leaves, the next ones do.

    The running decode batch is in the middle of a leap of 29 iterations that the waiting ones could not have joined.
    """
    rows = [(0.0, "batch", 60, 30), (1.5, "batch", 100, 1), (2.5, "chat", 10, 1), (4.5, "chat", 10, 1)]
    requests = play([{"name": "p", "max_num_seqs": 3, "kv_blocks": 8}], rows)
    assert requests["num_evictions"].tolist() == [0, 1, 0, 0]
    assert requests["scheduled_s"].tolist()[2:] == [5.0, 5.0]


def test_interactive_work_is_never_evicted(play: Any) -> None:
    rows = [(0.0, "chat", 1, 9), (0.5, "chat", 1, 9), (3.5, "chat", 1, 2)]
    requests = play([{"name": "p"}], rows)
    assert not requests["num_evictions"].any()
    assert requests["dispatched_s"][2] == 9.0


def test_an_evicted_stream_whose_kv_cache_is_on_the_host_goes_on_without_computing_it_again(play: Any) -> None:
    """As the first test, but back at 6 s with 3 of its 9 tokens the iteration gives it the 4th from where it was.

    With prompts of 40 tokens and a budget of 16, computing prompt and output again would take three iterations.
    """
    rows = [(0.0, "batch", 1, 9), (0.5, "batch", 40, 9), (5.5, "chat", 1, 2)]
    pool = {"name": "p", "max_num_batched_tokens": 16}
    again = play([pool], rows)
    host = play([pool], rows, eviction="host")
    assert again["num_evictions"].tolist() == host["num_evictions"].tolist() == [0, 1, 0]
    assert again["dispatched_s"].tolist() == host["dispatched_s"].tolist() == [0.0, 8.0, 5.5]
    assert host["first_token_s"][1] == 4.0  # 16 + 15 + 9 tokens beside the other's decode
    assert host["end_s"][1] == 8.0 + (9 - 3)
    assert again["end_s"][1] == host["end_s"][1] + 2


def test_moving_a_kv_cache_to_the_host_and_back_lasts_as_its_blocks_do(play: Any) -> None:
    """Three blocks out beside the next iteration, three in beside the first one back: 1.5 s instead of 1 s each."""
    rows = [(0.0, "batch", 1, 9), (0.5, "batch", 40, 9), (5.5, "chat", 1, 2)]
    requests = play([{"name": "p", "max_num_batched_tokens": 64, "block_move_s": 0.5}], rows, eviction="host")
    assert requests["first_token_s"][2] == 7.5
    assert requests["dispatched_s"][1] == 8.5
    assert requests["end_s"][1] == 8.5 + 1.5 + (9 - 5) - 1


@pytest.mark.parametrize("simulator", [SimFleet, ReferenceFleet])
def test_a_draining_replica_gives_its_streams_away_with_their_kv_cache(simulator: Any, metronome_profile: Path) -> None:
    """Two replicas with a stream of 30 tokens each; from 10 s on one is enough, and it gets the other's at 10.5 s.

    Its own iteration has just begun then, so the stream that moves pauses for one.
    """
    gpu_s = []
    for drain, end_s in (("wait", 36.5), ("migrate", 37.5)):
        pool = {"name": "p", "profile": str(metronome_profile), "min_replicas": 0, "max_replicas": 2}
        promise = {"name": "chat", "ttft_slo_s": 100, "tpot_slo_s": 100}
        spec = FleetSpec.from_dict({"pools": [pool | {"initial_replicas": 2}], "classes": [promise], "drain": drain})
        workload = Workload(np.full(2, 6.5), np.array([1, 1]), np.array([30, 30]), np.array([0, 0]), ("chat",), 50.0)
        fleet = simulator(spec, workload)
        for replicas in (2, 1, 1, 1, 1):
            fleet.apply(ScalingDecision(np.array([replicas]), spec.batch_limits, np.array([np.inf])))
            fleet.advance()
        gpu_s.append(3600 * fleet.result().gpu_hours)
        requests = fleet.batch.requests() if isinstance(fleet, SimFleet) else fleet.request_records()
        assert requests["end_s"].tolist() == [36.5, end_s]
    assert gpu_s == pytest.approx([50.0 + 36.5, 50.0 + 10.5])
