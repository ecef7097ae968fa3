"""What a controller says on its output: what changes, once; and what it leaves to a gateway that it does not know."""

from __future__ import annotations

from live_world import World, world_spec

from rl_autoscale.serving.changes import Changes


def test_a_change_is_told_once_and_its_end_too(stage):
    show, told = stage(), []
    show.controller.add_listener(Changes(told.append))
    show.steps(5)
    assert [line.split(": ", 1)[1] for line in told[:1]] == ["mode active (asked for)"]
    told.clear()
    show.steps(3)
    assert told == []
    show.modes.pause("SIGUSR1")
    show.steps(2)
    assert [line.split(": ", 1)[1] for line in told] == ["mode paused (paused by SIGUSR1), was active (asked for)"]
    told.clear()
    show.modes.resume()
    show.world.fault = "down"
    show.steps(12)
    assert any("breaker open" in line for line in told)
    assert any("decided by hold" in line or "decided by rule" in line for line in told)
    assert len(told) == len({line.split(": ", 1)[1] for line in told})  # nothing twice, though counts and times went on
    told.clear()
    show.world.fault = None
    show.steps(60)
    assert any("over: " in line for line in told)
    assert any("decided by policy" in line for line in told)


def test_an_empty_list_does_not_take_a_gateways_replicas_away(stage):
    world = World(world_spec(pool={"min_replicas": 0, "initial_replicas": 0}))
    world.engine("somebody-elses-0")
    show = stage(target=0, rule_target=0, mode="shadow", world=world, gateway=True)
    record = show.steps(3)
    assert world.gateway.replicas is None
    assert any("the gateway serves 1 that are nobody's here" in line for line in record.report.problems)
    world.backends["gpu"].set_target(1)
    show.steps(10)
    assert len(world.gateway.replicas.replicas) == 1
    world.backends["gpu"].set_target(0)
    show.steps(10)
    assert world.gateway.replicas.replicas == ()  # its own it may take away
