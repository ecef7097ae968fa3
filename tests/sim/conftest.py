"""What the simulator's tests run: toy profiles, hand-made requests, and random small fleets (random_fleets.py).

Every duration of the toy profile, every arrival and every draw is a multiple of a power of two, so all sums of times
are exact in float64: the engine and the reference must agree to the last bit, and simultaneous events are truly
simultaneous.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import strategies as st

from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NO_LIMIT, ScalingDecision
from rl_autoscale.sim import episode, fleet
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.sim.layout import COLD, LIFE, SPOT, WAKE
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.sim.reference import fleet as reference_fleet
from rl_autoscale.workload.trace import Workload
from tests.sim.random_fleets import ROLES, STAGED_ROLES, Case, cases, slow_profile

STARTUP_GRID_S = 2.0**-20
CRASH_GRID_S = 2.0**-30
"""Off the grid of iterations: which of a crash and a simultaneous iteration is first is nobody's law."""

EXACT_PROFILE = """
name: exact
model: toy
gpu: toy
gpus_per_replica: 2
kv_blocks: 64
kv_bytes_per_token: 1024
max_num_seqs: 8
max_num_batched_tokens: 64
token_knots: [0, 16, 32, 96]
token_knot_s: [0.03125, 0.03125, 0.0390625, 0.1015625]   # 2^-5, 2^-5, +2^-7, +2^-4
decode_context_s: 3.814697265625e-06                     # 2^-18
decode_seq_s: 6.103515625e-05                            # 2^-14
prefill_pair_s: 9.5367431640625e-07                      # 2^-20
prefill_context_s: 1.9073486328125e-06                   # 2^-19
prefill_seq_s: 0.00048828125                             # 2^-11
mixed_context_s: 1.9073486328125e-06                     # 2^-19
mixed_seq_s: 3.0517578125e-05                            # 2^-15
host_s: 0.000244140625                                   # 2^-12
source: made up; exact in binary
"""

METRONOME_PROFILE = """
name: metronome
model: toy
gpu: toy
gpus_per_replica: 1
kv_blocks: 100
kv_bytes_per_token: 1024
max_num_seqs: 2
max_num_batched_tokens: 64
token_knots: [0, 1]
token_knot_s: [1.0, 1.0]
decode_context_s: 0
decode_seq_s: 0
prefill_pair_s: 0
prefill_context_s: 0
prefill_seq_s: 0
source: made up; every iteration lasts exactly 1 s
"""


@pytest.fixture(scope="session")
def exact_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy profile whose times are exact in binary."""
    path = tmp_path_factory.mktemp("profiles") / "exact.yaml"
    path.write_text(EXACT_PROFILE)
    slow = yaml.safe_load(EXACT_PROFILE)
    for name, value in slow.items():
        if name.endswith("_s"):
            slow[name] = [2 * knot for knot in value] if isinstance(value, list) else 2 * value
    slow_profile(path).write_text(yaml.safe_dump(slow))
    return path


@pytest.fixture
def metronome_profile(tmp_path: Path) -> Path:
    """The toy profile whose iterations last exactly 1 s."""
    path = tmp_path / "metronome.yaml"
    path.write_text(METRONOME_PROFILE)
    return path


@pytest.fixture(params=[SimFleet, ReferenceFleet], ids=["engine", "reference"])
def play(request: pytest.FixtureRequest, metronome_profile: Path) -> Any:
    """Runs requests through pools whose iterations last 1 s, in either simulator; returns the requests' records.

    Each row is (arrival, class "chat" or "batch", prompt tokens, output tokens); SLOs are 100 s. ``chat`` and
    ``batch`` change that class, ``admission``, ``max_in_flight`` and ``selectivity`` are in force from the start;
    ``hashes`` are each prompt's, 16 tokens each; ``fleet`` is what else the fleet is given.
    """
    class_names = ("chat", "batch")
    promise = {"ttft_slo_s": 100, "tpot_slo_s": 100}

    def play(
        pools: list[dict[str, Any]],
        rows: list[tuple[float, str, int, int]],
        *,
        chat: dict[str, Any] | None = None,
        batch: dict[str, Any] | None = None,
        admission: tuple[float, float] = (np.inf, np.inf),
        max_in_flight: tuple[int, int] = (NO_LIMIT, NO_LIMIT),
        selectivity: tuple[float, float] = (0.0, 0.0),
        hashes: list[list[int]] | None = None,
        **fleet: Any,
    ) -> Any:
        spec = FleetSpec.from_dict(
            {
                "pools": [{"profile": str(metronome_profile), "max_replicas": 1, **pool} for pool in pools],
                "classes": [
                    {"name": "chat", **promise, **(chat or {})},
                    {"name": "batch", "kind": "batch", "priority": 1, **promise, **(batch or {})},
                ],
                **fleet,
            }
        )
        arrival_s, names, prompt, output = zip(*rows, strict=True)
        classes = np.array([class_names.index(name) for name in names])
        shared = {}
        if hashes is not None:
            offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in hashes])])
            shared = {
                "hash_offsets": offsets,
                "hash_ids": np.concatenate(hashes).astype(np.int64),
                "hash_block_tokens": 16,
            }
        workload = Workload(
            np.array(arrival_s), np.array(prompt), np.array(output), classes, class_names, 50.0, **shared
        )
        simulator = request.param(spec, workload)
        of_classes = (np.array(values) for values in (admission, max_in_flight, selectivity))
        simulator.apply(ScalingDecision(spec.initial_replicas, spec.batch_limits, *of_classes))
        while simulator.advance():
            pass
        return simulator.batch.requests() if isinstance(simulator, SimFleet) else simulator.request_records()

    return play


@pytest.fixture(scope="session")
def fleet_cases(exact_profile: Path) -> st.SearchStrategy[Case]:
    """Random small fleets under random control."""
    return cases(str(exact_profile), ROLES)


@pytest.fixture(scope="session")
def staged_cases(exact_profile: Path) -> st.SearchStrategy[Case]:
    """The same with prefill and decode pools, or post-processing, and always with traffic."""
    staged = cases(str(exact_profile), STAGED_ROLES, least_requests=20)
    return staged.filter(lambda case: case.spec.has_stages)


@pytest.fixture(scope="session")
def slos_cases(exact_profile: Path) -> st.SearchStrategy[Case]:
    """The same with `slos-serve` on several replicas, and always with traffic."""
    return cases(str(exact_profile), (["mixed"], ["mixed", "batch"]), least_requests=20, scheduler="slos-serve")


@pytest.fixture(scope="session")
def andes_cases(exact_profile: Path) -> st.SearchStrategy[Case]:
    """The same with `andes`, whose choices matter where several replicas' KV cache is short."""
    return cases(str(exact_profile), (["mixed"], ["mixed", "batch"]), least_requests=20, scheduler="andes")


@pytest.fixture(scope="session")
def moving_cases(exact_profile: Path) -> st.SearchStrategy[Case]:
    """The same where evicted sequences take their KV cache along, or draining replicas give theirs away."""
    return cases(str(exact_profile), (*ROLES[2:], ["mixed", "mixed", "mixed"]), least_requests=20, moving=True)


@pytest.fixture(scope="session")
def balanced_cases(exact_profile: Path) -> st.SearchStrategy[Case]:
    """The same where pools of several replicas are rebalanced."""
    roles = (["mixed"], ["mixed"], ["mixed", "batch"])
    return cases(str(exact_profile), roles, least_requests=30, moving=True, balanced=True)


@pytest.fixture(scope="session")
def all_cases(
    fleet_cases: st.SearchStrategy[Case],
    staged_cases: st.SearchStrategy[Case],
    moving_cases: st.SearchStrategy[Case],
    balanced_cases: st.SearchStrategy[Case],
) -> st.SearchStrategy[Case]:
    """All of them."""
    return st.one_of(fleet_cases, staged_cases, moving_cases, balanced_cases)


@pytest.fixture
def exact_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start-up times and lives are on a binary grid within the test, for both simulators."""
    for module in (fleet, reference_fleet):
        monkeypatch.setattr(module, "draw_replica_times", _times_on_grid)


def _times_on_grid(pool: PoolSpec, seed: int, startup_scale: float) -> Any:
    times = episode.draw_replica_times(pool, seed, startup_scale)
    startups, lives = times[[COLD, WAKE]], times[[LIFE, SPOT]]
    times[[COLD, WAKE]] = np.round(startups / STARTUP_GRID_S) * STARTUP_GRID_S
    times[[LIFE, SPOT]] = np.round(lives / CRASH_GRID_S) * CRASH_GRID_S + np.array([[3], [5]]) * CRASH_GRID_S
    return times
