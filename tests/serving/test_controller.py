"""Who may act and when: modes, other writers, failing calls, restarts and jumps of time."""

from __future__ import annotations

import os

import numpy as np
import pytest
from live_world import World, world_spec

from rl_autoscale.agents.registry import make_policy
from rl_autoscale.fleet.spec import ShieldSpec
from rl_autoscale.serving.config import read_mode
from rl_autoscale.serving.modes import ModeSwitch, Reread
from rl_autoscale.serving.protocols import BackendError

# -- modes -------------------------------------------------------------------------------------------------------------


def test_shadow_decides_and_touches_nothing(stage):
    show = stage(target=7, mode="shadow")
    record = show.steps(3)
    assert record.final.target_replicas.tolist() == [7]
    assert (record.applied, record.source, show.backend.calls) == (False, "policy", [])


def test_active_acts_once_per_change(stage):
    show = stage(target=7)
    show.steps(5)
    assert show.backend.calls == [7]


def test_the_kill_file_pauses_at_the_next_step_and_only_while_it_is_there(stage, tmp_path):
    show = stage(target=7, kill_file=tmp_path / "stop")
    (tmp_path / "stop").touch()
    assert show.steps(3).mode == "paused"
    assert show.backend.calls == []
    (tmp_path / "stop").unlink()
    assert show.steps(2).mode == "active"
    assert show.target == 7


def test_a_pause_by_signal_or_http_and_its_end(stage):
    show = stage(target=7)
    show.modes.pause("SIGUSR1")
    assert "SIGUSR1" in show.steps(2).mode_reason
    assert show.backend.calls == []
    show.modes.resume()
    show.steps(2)
    assert show.target == 7


def test_environment_and_file_can_lower_the_mode_but_not_raise_it(tmp_path):
    assert ModeSwitch("active", environment="shadow").current()[0] == "shadow"
    assert ModeSwitch("shadow", environment="active").current()[0] == "shadow"
    path = tmp_path / "fleet.yaml"
    path.write_text("active")
    reread = Reread(path, lambda file: file.read_text())
    modes = ModeSwitch("active", reread=reread)
    assert modes.current()[0] == "active"
    path.write_text("paused")
    os.utime(path, ns=(1, 1))
    assert modes.current() == ("paused", "configuration file")


def test_an_edit_of_something_else_leaves_the_mode_of_the_command_line(tmp_path):
    path, edits = tmp_path / "fleet.yaml", iter(range(1, 9))

    def edit(text: str) -> None:
        path.write_text(text)
        os.utime(path, ns=(0, next(edits)))

    edit("policy: {name: a}")
    modes = ModeSwitch("active", reread=Reread(path, read_mode))
    edit("policy: {name: b}")
    assert modes.current() == ("active", "asked for")
    edit("mode: shadow")
    assert modes.current() == ("shadow", "configuration file")
    over = ModeSwitch("active", reread=Reread(path, read_mode), written="shadow")
    edit("mode: shadow  # still")
    assert over.current() == ("active", "asked for")
    edit("mode: paused")
    assert over.current()[0] == "paused"


# -- writers and back ends ---------------------------------------------------------------------------------------------


def test_a_manual_scale_is_respected_for_the_hold_time_and_then_taken_over(stage):
    show = stage(manual_hold_s=300.0)
    show.steps(8)
    show.backend.target = 9
    record = show.steps(20)
    assert show.target == 9
    assert any("someone else set 9 replicas (we had 4)" in r for rec in show.records for r in rec.reasons)
    assert any("left alone" in reason for reason in record.reasons)
    show.steps(30)
    assert show.target == 4


def test_two_writers_do_not_fight(stage):
    show = stage(target=7)
    for _ in range(40):
        show.steps(1)
        show.backend.target = 3  # an HPA that wants three, whatever we say
    assert len(show.backend.calls) <= 1


@pytest.mark.parametrize("status", ["409", "429", "500", "timeout"])
def test_calls_that_may_work_later_are_tried_again_with_pauses(stage, status):
    show = stage(target=7)
    attempts = []
    set_target = show.backend.set_target

    def failing(num):
        attempts.append(show.world.clock.now_s)
        raise BackendError(status, retryable=True)

    show.backend.set_target = failing
    show.steps(30)
    gaps = np.diff(attempts)
    assert 3 <= len(attempts) <= 8
    assert (np.diff(gaps) >= 0).all()
    show.backend.set_target = set_target
    show.steps(25)
    assert show.target == 7


def test_a_forbidden_call_waits_longest_at_once(stage):
    show = stage(target=7)
    show.backend.write_error = BackendError("403 forbidden", retryable=False)
    record = show.steps(20)
    assert sum("gpu" in r.failures for r in show.records) == 1
    assert any("calls failed" in reason for reason in record.reasons)


def test_a_back_end_that_cannot_be_read_is_no_failed_call_and_is_written_to_when_it_can_be(stage):
    show = stage(target=4, down_cooldown_s=0.0)
    show.steps(5)
    show.backend.read_error = BackendError("api down", retryable=True)
    show.steps(5)  # what was read before is too old by now
    show.policy.target = show.rule.target = 9
    away = show.steps(40)
    assert (show.target, away.final.target_replicas.tolist()) == (4, [4])
    assert "gpu: its present target cannot be read; left as it is" in away.reasons
    assert not any(record.failures or "actuator" in record.faults for record in show.records)
    show.backend.read_error = None
    show.steps(2)  # the first decides on what was seen before
    assert show.target == 9


def test_a_call_that_timed_out_but_worked_is_not_taken_for_a_stranger(stage):
    show = stage(target=7)
    set_target = show.backend.set_target

    def late(num):
        set_target(num)
        raise BackendError("timeout", retryable=True)

    show.backend.set_target = late
    show.steps(4)
    show.backend.set_target = set_target
    show.steps(4)
    assert not any("someone else" in reason for record in show.records for reason in record.reasons)


# -- the GPU budget ----------------------------------------------------------------------------------------------------


def two_pools():
    """Ten GPUs, all taken: six replicas of one pool and four of another."""
    pools = [
        {
            "name": name,
            "profile": "llama-3.1-8b_a100_tp1",
            "min_replicas": 1,
            "max_replicas": 10,
            "initial_replicas": initial,
            "startup": [{"mean_s": 25.0, "cv": 0.0}],
        }
        for name, initial in (("gpu", 6), ("other", 4))
    ]
    return World(world_spec(pools=pools, gpu_budget=10), rate_per_s=4.0)


def alive(show):
    return sum(len(backend.replicas) for backend in show.world.backends.values())


def test_growth_waits_for_the_gpus_of_a_pool_that_cools_down_and_drains(stage):
    show = stage(world=two_pools(), target=[4, 6], rule_target=[4, 6], down_cooldown_s=30.0)
    for _ in range(8):
        record = show.steps(1)
        assert alive(show) <= 10
    assert any("other: no free GPUs" in reason for past in show.records for reason in past.reasons)
    assert record.final.target_replicas.tolist() == [4, 6]


@pytest.mark.parametrize("retryable", [True, False])
def test_growth_waits_for_the_gpus_of_a_pool_whose_calls_fail(stage, retryable):
    show = stage(world=two_pools(), target=[4, 6], rule_target=[4, 6], down_cooldown_s=0.0)
    show.backend.write_error = BackendError("no", retryable=retryable)
    for _ in range(20):
        show.steps(1)
        assert alive(show) <= 10


def test_growth_waits_for_the_gpus_of_a_pool_that_someone_else_holds(stage):
    show = stage(world=two_pools(), target=[6, 4], rule_target=[6, 4], down_cooldown_s=0.0)
    show.steps(4)
    show.world.backends["other"].target = 3
    show.steps(1)
    show.policy.target = show.rule.target = [7, 2]  # one GPU is free, the other stays where it was put
    show.steps(10)
    assert (show.target, show.world.backends["other"].target) == (7, 3)
    show.policy.target = show.rule.target = [8, 2]
    show.steps(10)
    assert alive(show) == 10


# -- time --------------------------------------------------------------------------------------------------------------


def test_a_restart_holds_what_it_finds_and_cools_down_first(stage):
    world = World(world_spec(pool={"initial_replicas": 6}), rate_per_s=4.0)
    show = stage(world=world, target=1, rule_target=1, shield=ShieldSpec(down_stabilisation_s=120.0))
    show.steps(12)
    assert show.target == 6
    show.steps(6)
    assert show.target == 1


def test_started_in_a_lull_a_trained_policy_keeps_what_it_finds_for_a_while(stage):
    """Without it a restart between two bursts gives back in a minute what the next one needs."""
    records = {}
    for share in (0.0, 1.0):
        world = World(world_spec(pool={"initial_replicas": 8, "max_replicas": 12}), rate_per_s=1.0)
        policy = make_policy("pretrained/single-pool", miss_price=600.0, found_share=share)
        show = stage(world=world, policy=policy, down_cooldown_s=0.0)
        records[share] = [show.steps(1) for _ in range(200)]
    without, targets = ([record.final.target_replicas.item() for record in taken] for taken in records.values())
    age_s = np.array([record.time_s for record in records[1.0]]) - records[1.0][0].time_s
    assert min(without[:10]) == 1
    assert (np.array(targets) >= np.ceil(8 * np.exp(-age_s / 900.0) - 1e-9)).all()
    assert targets[-1] == 1


def test_a_restart_may_scale_up_at_once(stage):
    show = stage(target=8, up_cooldown_s=300.0)
    show.steps(2)
    assert show.target == 8


def test_a_jump_of_the_wall_clock_changes_nothing(stage):
    calm, jumped = stage(target=7), stage(target=7)
    for show in (calm, jumped):
        show.steps(4)
    jumped.world.clock.wall_offset_s -= 7200.0
    for show in (calm, jumped):
        show.policy.target = 3
        show.steps(10)
    assert jumped.backend.calls == calm.backend.calls
    assert [r.time_s for r in jumped.records] == [r.time_s for r in calm.records]


def test_a_suspended_controller_starts_its_cool_downs_again(stage):
    show = stage(down_cooldown_s=60.0)
    show.steps(8)
    show.policy.target = show.rule.target = 1
    show.world.clock.now_s += 3600.0
    show.fleet.advance()
    show.steps(3)
    assert show.target == 4
    assert any("since the last look" in reason for record in show.records for reason in record.reasons)
    show.steps(6)
    assert show.target == 1


def test_what_changed_while_suspended_is_held_for_the_stabilisation_window(stage):
    show = stage(down_cooldown_s=0.0, manual_hold_s=0.0, shield=ShieldSpec(down_stabilisation_s=120.0))
    show.steps(20)
    show.world.clock.now_s += 600.0
    show.backend.target = 8
    show.fleet.advance()
    show.steps(8)
    assert show.target == 8
    show.steps(8)
    assert show.target == 4
