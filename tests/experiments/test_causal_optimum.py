"""The planner's slots add up to the optimum of whole fleets, and it plans as one would expect."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.experiments.causal_optimum import (
    Capacity,
    CausalPlanner,
    MarkovLoad,
    Plan,
    measure_capacity,
    plan_fleet,
    solve_slots,
    start_progress,
)
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.state import FloatArray
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.workload.length_spec import resolve_lengths
from tests.envs.toy import toy_spec

LOAD = MarkovLoad((5.0, 40.0), (300.0, 60.0), 1.0, resolve_lengths("azure_conv"))


def whole_fleet_value(
    avoided: FloatArray, jumps: FloatArray, progress: FloatArray, gpu_s: float, num_steps: int
) -> dict[tuple[int, tuple[int, ...]], float]:
    """Optimal cost by rate and replicas by stage: any number may be started, any replica dropped."""
    num_slots, num_states = avoided.shape
    stages = len(progress)
    fleets = [f for f in product(range(num_slots + 1), repeat=stages) if sum(f) <= num_slots]
    value = {(k, f): 0.0 for k in range(num_states) for f in fleets}

    def after_step(fleet: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        """Where a fleet's replicas are a step later, each on its own."""
        found = {(0,) * stages: 1.0}
        for stage, count in enumerate(fleet):
            for _ in range(count):
                grown: dict[tuple[int, ...], float] = {}
                for have, chance in found.items():
                    for to, moved in enumerate(progress[stage]):
                        if moved > 0:
                            key = (*have[:to], have[to] + 1, *have[to + 1 :])
                            grown[key] = grown.get(key, 0.0) + chance * moved
                found = grown
        return found

    later = {fleet: after_step(fleet) for fleet in fleets}
    for _ in range(num_steps):
        chosen = {
            (k, fleet): gpu_s * sum(fleet)
            - avoided[: fleet[-1], k].sum()
            + sum(
                jumps[k, to] * chance * value[to, went]
                for to in range(num_states)
                for went, chance in later[fleet].items()
            )
            for k in range(num_states)
            for fleet in fleets
        }
        value = {
            (k, fleet): min(
                chosen[k, other]
                for other in fleets
                if all(a <= b for a, b in zip(other[1:], fleet[1:], strict=True))  # started anew as many as you like
            )
            for k in range(num_states)
            for fleet in fleets
        }
    return value


def slots_value(
    avoided: FloatArray, jumps: FloatArray, progress: FloatArray, gpu_s: float, num_steps: int, plan: Plan
) -> FloatArray:
    """Cost of following a stationary plan from an empty fleet, by rate: slot by slot."""
    num_slots, num_states = avoided.shape
    stages = len(progress) - 1
    off, on = np.zeros((num_slots, num_states)), np.zeros((num_slots, num_states, stages + 1))
    slot = np.arange(num_slots)[:, None]
    for _ in range(num_steps):
        go_on = gpu_s + np.einsum("kl,jlt,st->jks", jumps, on, progress)
        go_on[..., -1] -= avoided
        stay_off = off @ jumps.T
        kept = np.concatenate((slot[..., None] < plan.finish[None], (slot < plan.keep)[..., None]), axis=2)
        off = np.where(slot < plan.start, go_on[..., 0], stay_off)
        on = np.where(kept, go_on, stay_off[..., None])
    return off.sum(axis=0)


@pytest.mark.parametrize("seed", range(4))
def test_slots_add_up_to_the_optimum_of_whole_fleets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    avoided = np.sort(rng.uniform(0.0, 6.0, (3, 2)), axis=0)[::-1]
    jumps = rng.dirichlet((3.0, 1.0), 2)
    progress = np.array([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    # The plan is that of the first of many steps; judged as a stationary one it is measured against the best of them.
    plan = solve_slots(avoided, jumps, progress, 1.0, 60)
    best = whole_fleet_value(avoided, jumps, progress, 1.0, 60)
    longer = whole_fleet_value(avoided, jumps, progress, 1.0, 61)
    empty = (0, 0, 0)
    followed = slots_value(avoided, jumps, progress, 1.0, 400, plan)
    followed_longer = slots_value(avoided, jumps, progress, 1.0, 401, plan)
    gain = np.array([longer[k, empty] - best[k, empty] for k in range(2)])
    np.testing.assert_allclose(followed_longer - followed, gain, atol=1e-6)


def test_dear_misses_are_planned_for_ahead() -> None:
    jumps, progress = LOAD.jumps(10.0), start_progress(60.0, 0.25, 10.0)
    needed = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])  # one replica in the quiet state, three in the busy one
    cheap, dear = (solve_slots(price * needed, jumps, progress, 10.0, 2000) for price in (15.0, 400.0))
    assert cheap.start.tolist()[0] == 1  # in quiet hours no replica waits for the busy state
    assert dear.start.tolist() == [3, 3]
    assert (cheap.start <= cheap.keep).all()  # what is there is kept where it would not be started anew
    assert (np.diff(cheap.finish, axis=1) >= 0).all()  # the further a start, the more it is worth


def test_starts_take_their_mean() -> None:
    progress = start_progress(60.0, 0.25, 10.0)
    left = np.linalg.inv(np.eye(16) - progress[:16, :16]).sum(axis=1)  # expected steps until ready
    assert left[0] * 10.0 == pytest.approx(60.0, abs=10.0)
    np.testing.assert_allclose(progress.sum(axis=1), 1.0)


def test_what_cannot_be_planned_for_is_refused() -> None:
    with pytest.raises(SpecError, match="longer than 0"):
        start_progress(0.0, 0.25, 10.0)
    with pytest.raises(SpecError, match="one pool and one class, not 3 and 2"):
        measure_capacity(load_scenario("chiron").fleet, LOAD)


def test_the_planner_runs_a_fleet() -> None:
    spec = toy_spec(max_replicas=6)
    capacity = measure_capacity(spec, LOAD, span_s=60.0)
    assert (np.diff(capacity.missed, axis=1) <= 0).all()
    assert capacity.missed[:, 0].tolist() == [1.0, 1.0]
    assert capacity.missed[1, 1] > capacity.missed[0, 1]
    workload, curve = LOAD.draw(0, 900.0, spec.classes[0].name)
    attained = []
    for gpu_s_per_miss in (0.01, 100.0):
        plan = plan_fleet(spec, LOAD, capacity, gpu_s_per_miss, 900.0)
        fleet = SimFleet(spec, workload, seed=0)
        run_control_loop(fleet, CausalPlanner(LOAD, curve, capacity, plan))
        attained.append(fleet.result())
    assert attained[0].gpu_hours < attained[1].gpu_hours
    assert attained[0].slo_attainment < attained[1].slo_attainment


def test_a_replica_beyond_what_helps_is_not_started() -> None:
    spec = toy_spec(max_replicas=6)
    missed = np.array([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]])
    capacity = Capacity(missed, np.ones(missed.shape, dtype=np.int64), np.ones(missed.shape))
    plan = plan_fleet(spec, LOAD, capacity, 1e6, 3600.0)
    assert plan.start.tolist() == [2, 2]
