"""Every rule of the shield by hand, and what holds for any decision in any state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import fleet_specs, fleet_states, scaling_decisions

from rl_autoscale.fleet.shield import Shield
from rl_autoscale.fleet.spec import FleetSpec, ShieldSpec
from rl_autoscale.fleet.state import FleetState, ScalingDecision


@pytest.fixture
def clip(a_spec: Any, a_state: Any, a_decision: Any) -> Any:
    """Targets after the shield, for one step from (ready, asked for)."""

    def clip(
        wanted: Any,
        *,
        asked_for: Any,
        ready: Any = None,
        spec: FleetSpec | None = None,
        draining: Any = 0,
        **limits: Any,
    ) -> list[int]:
        spec = spec or a_spec()
        state = a_state(spec, asked_for=asked_for, ready=asked_for if ready is None else ready, draining=draining)
        shield = Shield(spec, ShieldSpec(**limits))
        decision = shield.clip(a_decision(wanted, num_classes=len(spec.classes)), state)
        return [int(target) for target in decision.target_replicas]

    return clip


def test_targets_stay_between_min_and_max(clip: Any, a_spec: Any, a_pool: Any) -> None:
    spec = a_spec(a_pool("gpu", min_replicas=2, max_replicas=5, initial_replicas=3))
    assert clip([9], asked_for=[3], spec=spec) == [5]
    assert clip([0], asked_for=[3], spec=spec) == [2]
    assert clip([4], asked_for=[3], spec=spec) == [4]


def test_caps_and_admission_are_clipped(a_spec: Any, a_pool: Any, a_state: Any, a_decision: Any) -> None:
    spec = a_spec(a_pool("gpu", max_num_seqs=16))
    shield = Shield(spec, ShieldSpec())
    state = a_state(spec, ready=1, asked_for=1, admission=0.75)
    assert shield.clip(a_decision([1], caps=[99], admission=-1.0), state).max_batch_size.tolist() == [16]
    assert shield.clip(a_decision([1], caps=[0], admission=-1.0), state).max_batch_size.tolist() == [1]
    assert shield.clip(a_decision([1], admission=-1.0), state).admission.tolist() == [0.0]
    assert shield.clip(a_decision([1], admission=np.nan), state).admission.tolist() == [0.75]  # as in force
    assert shield.clip(a_decision([1], admission=np.inf), state).admission.tolist() == [np.inf]
    unseen = a_state(spec, ready=1, asked_for=1, admission=np.nan)
    assert shield.clip(a_decision([1], admission=np.nan), unseen).admission.tolist() == [np.inf]


def test_steps_are_bounded(clip: Any) -> None:
    assert clip([9], asked_for=[4], max_step_up=2) == [6]
    assert clip([1], asked_for=[8], max_step_down=3) == [5]
    assert clip([5], asked_for=[4], max_step_up=2, max_step_down=3) == [5]


def test_pending_starts_are_bounded(clip: Any) -> None:
    # 4 ready, 2 starting: at most one more may be pending.
    assert clip([9], asked_for=[6], ready=[4], max_pending_starts=3) == [7]
    # 5 pending already: none is added, none is taken away.
    assert clip([9], asked_for=[6], ready=[1], max_pending_starts=3) == [6]


def test_scale_down_waits_for_the_window(a_spec: Any, a_state: Any, a_decision: Any) -> None:
    """Kubernetes HPA v2: the highest recommendation of the last 30 s, here of four steps, holds."""
    spec = a_spec()
    shield = Shield(spec, ShieldSpec(down_stabilisation_s=30.0))
    current, seen = 6, []
    for wanted in (6, 5, 3, 2, 2, 2, 2, 7, 1):
        decision = shield.clip(a_decision([wanted]), a_state(spec, ready=current, asked_for=current))
        current = int(decision.target_replicas[0])
        seen.append(current)
    assert seen == [6, 6, 6, 6, 5, 3, 2, 7, 7]


def test_reset_forgets_recommendations(a_spec: Any, a_state: Any, a_decision: Any) -> None:
    spec = a_spec()
    shield = Shield(spec, ShieldSpec(down_stabilisation_s=30.0))
    state = a_state(spec, ready=6, asked_for=6)
    shield.clip(a_decision([6]), state)
    shield.reset()
    assert shield.clip(a_decision([2]), state).target_replicas.tolist() == [2]


def test_the_gpu_budget_goes_to_interactive_pools_first(clip: Any, a_spec: Any, a_pool: Any) -> None:
    pools = [a_pool("b", "batch"), a_pool("m", "mixed"), a_pool("i", "interactive")]
    spec = a_spec(*pools, kinds=("interactive", "batch"), gpu_budget=8)
    assert clip([4, 4, 4], asked_for=[1, 1, 1], spec=spec) == [1, 3, 4]
    # What one pool gives up is free only when it is gone: two draining replicas still hold their GPUs.
    assert clip([4, 4, 4], asked_for=[1, 1, 1], draining=[2, 0, 0], spec=spec) == [1, 1, 4]


def test_models_take_turns_on_shared_gpus_and_one_leaves_before_the_next_comes(
    clip: Any, a_spec: Any, a_pool: Any
) -> None:
    spec = a_spec(a_pool("a"), a_pool("b"), a_pool("own"), shared_gpus=[{"pools": ["a", "b"], "gpus": 2}])
    assert clip([5, 0, 5], asked_for=[1, 0, 1], spec=spec) == [2, 0, 5]
    assert clip([0, 2, 1], asked_for=[2, 0, 1], spec=spec) == [0, 0, 1]
    assert clip([0, 2, 1], asked_for=[0, 0, 1], draining=[1, 0, 0], spec=spec) == [0, 1, 1]
    assert clip([0, 2, 1], asked_for=[0, 0, 1], draining=[np.nan, 0, 0], spec=spec) == [0, 0, 1]


def test_the_last_replica_of_a_class_may_leave_only_where_models_take_turns(
    a_spec: Any, a_pool: Any, clip: Any
) -> None:
    pools = [a_pool("a", model="a"), a_pool("b", model="b"), a_pool("c", model="c")]
    promise = {"ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
    classes = [{"name": name, "model": name, **promise} for name in "abc"]
    shared = [{"pools": ["a", "b"], "gpus": 1}]
    spec = FleetSpec.from_dict({"pools": pools, "classes": classes, "shared_gpus": shared})
    assert clip([0, 1, 0], asked_for=[1, 0, 1], spec=spec) == [0, 0, 1]


def test_gpus_are_counted_not_replicas(clip: Any, a_spec: Any, a_pool: Any) -> None:
    spec = a_spec(a_pool("big", profile="llama-3.1-70b_a100_tp4"), gpu_budget=10)
    assert clip([5], asked_for=[1], spec=spec) == [2]  # 3 would take 12 GPUs


def test_the_last_ready_replica_of_a_class_stays(clip: Any, a_spec: Any, a_pool: Any) -> None:
    assert clip([0], asked_for=[1]) == [1]
    assert clip([0], asked_for=[3], ready=[0]) == [0]  # nothing is ready: starts may be cancelled
    spec = a_spec(a_pool("i", "interactive"), a_pool("m", "mixed"), kinds=("interactive",))
    assert clip([0, 0], asked_for=[1, 4], spec=spec) == [0, 1]  # the pool with more of them keeps one
    assert clip([1, 0], asked_for=[1, 4], spec=spec) == [1, 0]
    # The one target of pool i would be met by a replica that has not started yet.
    assert clip([1, 0], asked_for=[1, 4], ready=[0, 4], spec=spec) == [1, 1]


def test_a_blind_pool_may_grow_but_not_shrink(clip: Any) -> None:
    assert clip([1], asked_for=[4], ready=[np.nan]) == [4]
    assert clip([6], asked_for=[4], ready=[np.nan]) == [6]
    assert clip([6], asked_for=[99], ready=[np.nan]) == [10]  # the bounds hold whatever was asked for by others


def test_the_last_target_stands_in_for_a_missing_one(a_spec: Any, a_state: Any, a_decision: Any) -> None:
    spec = a_spec()
    shield = Shield(spec, ShieldSpec(max_step_up=1))
    shield.clip(a_decision([5]), a_state(spec, ready=4, asked_for=4))
    missing = a_state(spec, ready=np.nan, asked_for=np.nan)
    assert shield.clip(a_decision([9]), missing).target_replicas.tolist() == [6]


LIMITS = st.builds(
    ShieldSpec,
    max_step_up=st.none() | st.integers(1, 3),
    max_step_down=st.none() | st.integers(1, 3),
    down_stabilisation_s=st.sampled_from([0.0, 10.0, 35.0]),
    max_pending_starts=st.none() | st.integers(1, 3),
)


@settings(max_examples=40)
@given(st.data())
def test_whatever_is_asked_the_limits_hold(data: st.DataObject) -> None:
    spec = data.draw(fleet_specs())
    limits = data.draw(LIMITS)
    shield = Shield(spec, limits)
    for _ in range(3):
        state = data.draw(fleet_states(spec))
        got = shield.clip(data.draw(scaling_decisions(spec)), state)
        # Below the minimum only on the way up to it: the pending-start guard delays starts that others undid.
        asked_for = np.nan_to_num(state.pools.asked_for, nan=0.0)
        assert (got.target_replicas >= np.minimum(spec.min_replicas, asked_for)).all()
        assert (got.target_replicas <= spec.max_replicas).all()
        assert (got.max_batch_size >= 1).all()
        assert (got.max_batch_size <= spec.batch_limits).all()
        assert (got.admission >= 0.0).all()
        if limits.max_step_up is not None:
            known = ~np.isnan(state.pools.asked_for)
            beyond = known & (got.target_replicas > np.maximum(asked_for + limits.max_step_up, spec.min_replicas))
            assert not (beyond & (got.target_replicas > 1)).any()  # 1: the last ready replica stays


@settings(max_examples=15)
@given(st.data())
def test_a_batch_is_clipped_like_its_members(data: st.DataObject) -> None:
    spec, limits, number = data.draw(fleet_specs()), data.draw(LIMITS), 3
    together = Shield(spec, limits, (number,))
    alone = [Shield(spec, limits) for _ in range(number)]
    for _ in range(3):
        states = [data.draw(fleet_states(spec)) for _ in range(number)]
        decisions = [data.draw(scaling_decisions(spec)) for _ in range(number)]
        got = together.clip(_stack_decisions(decisions), _stack_states(states))
        for e in range(number):
            expected = alone[e].clip(decisions[e], states[e])
            for name in ("target_replicas", "max_batch_size", "admission"):
                np.testing.assert_array_equal(getattr(got, name)[e], getattr(expected, name), name)


def _stack_decisions(items: list[ScalingDecision]) -> ScalingDecision:
    return ScalingDecision(
        np.stack([item.target_replicas for item in items]),
        np.stack([item.max_batch_size for item in items]),
        np.stack([item.admission for item in items]),
    )


def _stack_states(items: list[FleetState]) -> FleetState:
    first = items[0]
    return FleetState(
        np.stack([item.time_s for item in items]),
        np.stack([item.window_s for item in items]),
        type(first.pools).from_matrix(np.stack([item.pools.to_matrix() for item in items])),
        type(first.classes).from_matrix(np.stack([item.classes.to_matrix() for item in items])),
    )


def test_a_primed_shield_scales_down_no_sooner_than_after_a_scale_up(a_spec, a_state, a_decision):
    spec = a_spec(a_pool_with_limits())
    shield = Shield(spec, ShieldSpec(down_stabilisation_s=30.0))
    shield.prime(np.array([6]))
    state = a_state(spec, ready=6, asked_for=6)
    targets = [int(shield.clip(a_decision([1]), state).target_replicas[0]) for _ in range(5)]
    assert targets == [6, 6, 6, 1, 1]


def a_pool_with_limits():
    return {"name": "gpu", "profile": "llama-3.1-8b_a100_tp1", "min_replicas": 0, "max_replicas": 10}
