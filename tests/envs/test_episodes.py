"""How episodes begin and end: within the GPUs there are, with one seed per fleet, in whole steps, with requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rl_autoscale.envs.faults import TelemetryFaults
from rl_autoscale.envs.fleet_env import FleetEnv, FleetVectorEnv
from rl_autoscale.envs.mdp import EpisodeSetup, FleetMdp
from rl_autoscale.envs.sampler import MOST_DRAWS, ScenarioSampler, first_with_requests
from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.fleet.errors import SilenceError
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.workload.store import TraceStore
from tests.envs.toy import SHIELD, poisson_workload, sampler, toy_spec

IDLE = np.zeros(3, np.float32)


def varied(seed: int) -> EpisodeSetup:
    """Episodes of other lengths and levels."""
    return EpisodeSetup(poisson_workload(5.0 + seed % 20, 20.0 + seed % 30, seed), 10.0, initial_headroom=3.0)


def rollout(seed: Any, *, num_envs: int = 3, steps: int = 12, **options: Any) -> list[np.ndarray]:
    """Observations, shape (steps + 1, num_envs, num_features)."""
    env = FleetVectorEnv(toy_spec(), SHIELD, varied, num_envs=num_envs, **options)
    first, _ = env.reset(seed=seed)
    return [first, *(env.step(np.tile(IDLE, (num_envs, 1)))[0] for _ in range(steps))]


def test_no_episode_begins_with_gpus_that_are_not_there() -> None:
    pools = [
        {"name": name, "profile": "llama-3.1-8b_a100_tp1", "role": role, "max_replicas": 20, "max_num_seqs": 4}
        for name, role in (("a", "interactive"), ("b", "batch"))
    ]
    classes = [
        {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1},
        {"name": "jobs", "kind": "batch", "ttft_slo_s": 60.0, "tpot_slo_s": 1.0},
    ]
    spec = FleetSpec.from_dict({"pools": pools, "classes": classes, "gpu_budget": 5})

    def crowded(seed: int) -> EpisodeSetup:
        one = poisson_workload(60.0, 60.0, seed)
        two = type(one)(one.arrival_s, one.prompt_tokens, one.output_tokens, np.arange(len(one.arrival_s)) % 2,
                        ("chat", "jobs"), 60.0)  # fmt: skip
        return EpisodeSetup(two, 10.0, initial_headroom=3.0)

    mdp = FleetMdp(spec, SHIELD, crowded)
    mdp.reset(0)
    assert mdp.batch.observe().pools.ready.tolist() == [[4.0, 1.0]]
    shared = load_scenario("model-swapping")
    mdp = FleetMdp(shared.fleet, SHIELD, ScenarioSampler(shared, TraceStore()), num_fleets=4)
    mdp.reset(4)
    assert mdp.batch.observe().pools.ready.sum(axis=-1).max() == 4.0


def test_whoever_sees_nothing_at_first_removes_nothing() -> None:
    env = FleetEnv(toy_spec(), SHIELD, varied, faults=TelemetryFaults(missing=1.0))
    env.reset(seed=0)
    ready = int(env.mdp.batch.observe().pools.ready[0, 0])
    assert ready != toy_spec().initial_replicas[0]
    assert env.step(-np.ones(3, np.float32))[4]["target_replicas"] >= ready


def test_a_seed_for_each_fleet() -> None:
    one, other = rollout([1, 2, 3]), rollout([1, 9, 3])
    assert all(np.array_equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(one, other, strict=True))
    assert not all(np.array_equal(a[1], b[1]) for a, b in zip(one, other, strict=True))
    alone = FleetEnv(toy_spec(), SHIELD, varied)
    assert np.array_equal(alone.reset(seed=2)[0], one[0][1])
    same = rollout([7, 7, 7])
    assert all(np.array_equal(a[0], a[2]) for a in same)
    assert rollout([None, 1, 1])[0].shape == one[0].shape
    with pytest.raises(ValueError, match="got 2 seeds for 3 fleets"):
        rollout([1, 2])


def test_faults_of_a_fleet_do_not_depend_on_the_others() -> None:
    faults = TelemetryFaults(missing=0.3, frozen=0.3)
    alone, together = rollout(7, num_envs=1, faults=faults), rollout(7, num_envs=2, faults=faults)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(("interval_s", "span_s", "steps"), [(1.1, 11.0, 10), (0.1, 10.0, 100), (0.1, 0.3, 3)])
def test_an_episode_has_whole_steps(interval_s: float, span_s: float, steps: int) -> None:
    spec = toy_spec().model_copy(update={"control_interval_s": interval_s, "telemetry_age_s": 0.0})
    env = FleetEnv(spec, SHIELD, sampler(span_s=span_s))
    env.reset(seed=0)
    taken = 1
    while not env.step(IDLE)[3]:
        taken += 1
    assert taken == steps


def test_a_fleet_that_begins_anew_has_no_reward_and_no_cost() -> None:
    env = FleetVectorEnv(toy_spec(), SHIELD, varied, num_envs=3)
    env.reset(seed=0)
    finished, begun = np.zeros(3, dtype=bool), 0
    for _ in range(40):
        _, reward, _, truncated, info = env.step(np.tile(IDLE, (3, 1)))
        assert set(info) == {"cost", "misses"}
        begun += int(finished.sum())
        assert not np.any([reward[finished], info["cost"][finished], info["misses"][finished]])
        finished = truncated
    assert begun > 3


def test_silent_draws_are_drawn_again() -> None:
    tried: list[int] = []

    def build(seed: int) -> Any:
        tried.append(seed)
        if len(tried) < 3:
            raise SilenceError("nobody comes")
        return "traffic"

    assert first_with_requests(build, 5) == "traffic"
    assert tried[0] == 5
    assert len(set(tried)) == 3

    def never(seed: int) -> Any:
        raise SilenceError("nobody comes")

    with pytest.raises(SilenceError, match=rf"nobody comes \(in {MOST_DRAWS} draws\)"):
        first_with_requests(never, 5)
