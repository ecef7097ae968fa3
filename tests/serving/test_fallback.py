"""The rule in the policy's place refuses early when the policy does, unless the file says otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from live_world import world_spec

pytest.importorskip("onnx", reason="exporting a policy needs the train extra")

from rl_autoscale.agents.export import export_policy
from rl_autoscale.envs.constants import Constants
from rl_autoscale.envs.schema import Schema
from rl_autoscale.serving.assemble import build_fallback, build_policy
from rl_autoscale.serving.config import ControlConfig


def exported(folder: Path, *, refuse: bool, selectivity: float = 0.0) -> str:
    """A network that always answers zero."""
    schema = Schema.of(world_spec())
    shape = len(schema.actions), len(schema.features)
    layers = [(np.zeros(shape, np.float32), np.zeros(shape[0], np.float32))]
    constants = Constants(selectivity=selectivity)
    export_policy(layers, schema, folder, refuse=refuse, training={}, constants=constants)
    return str(folder)


def fallback_beside(folder: Path, policy: dict, **changes):
    local = {"state_dir": str(folder / "state"), "command": ["server", "{port}"]}
    fleet = world_spec().model_dump(mode="json", exclude_none=True)
    data = {"fleet": fleet, "backends": {"gpu": {"local": local}}, "policy": policy, **changes}
    config = ControlConfig.from_dict(data)
    return build_fallback(config, build_policy(config.policy, config.fleet))


@pytest.mark.parametrize(
    ("refuse", "knobs", "level"),
    [(True, {}, 1.0), (False, {}, math.inf), (True, {"admission": 2.0}, 2.0), (False, {"admission": 0.5}, 0.5)],
)
def test_beside_an_exported_policy_the_card_and_the_knob_decide(tmp_path, refuse, knobs, level):
    policy = {"name": exported(tmp_path / "policy", refuse=refuse), "knobs": knobs}
    rule = fallback_beside(tmp_path, policy)
    assert (rule.NAME, rule.headroom, rule.admission) == ("headroom", 1.5, level)


@pytest.mark.parametrize(
    ("knobs", "said", "expected"), [({}, {}, 0.5), ({"selectivity": 0.2}, {}, 0.2), ({}, {"selectivity": 0.0}, 0.0)]
)
def test_it_weighs_requests_by_their_work_as_the_policy_does(tmp_path, knobs, said, expected):
    policy = {"name": exported(tmp_path / "policy", refuse=True, selectivity=0.5), "knobs": knobs}
    rule = fallback_beside(tmp_path, policy, fallback={"name": "headroom", "knobs": said})
    assert rule.selectivity == expected


@pytest.mark.parametrize(("knobs", "level"), [({"target": 40.0}, math.inf), ({"admission": 0.8}, 0.8)])
def test_beside_a_rule_its_knob_decides(tmp_path, knobs, level):
    assert fallback_beside(tmp_path, {"name": "hpa", "knobs": knobs}).admission == level


@pytest.mark.parametrize(
    ("said", "level"), [({}, 1.0), ({"admission": None}, math.inf), ({"admission": 1.5, "headroom": 2.0}, 1.5)]
)
def test_what_the_file_says_of_the_rule_stands(tmp_path, said, level):
    policy = {"name": exported(tmp_path / "policy", refuse=True)}
    rule = fallback_beside(tmp_path, policy, fallback={"name": "headroom", "knobs": said})
    assert (rule.admission, rule.headroom) == (level, said.get("headroom", 1.5))


@pytest.mark.parametrize(("knobs", "level"), [({}, 1.0), ({"admission": 3.0}, 3.0)])
def test_a_policy_that_cannot_be_read_is_taken_to_refuse(tmp_path, knobs, level):
    folder = tmp_path / "policy"
    exported(folder, refuse=True)
    card = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps(card | {"format": 0}))
    local = {"state_dir": str(tmp_path / "state"), "command": ["server", "{port}"]}
    data = {
        "fleet": world_spec().model_dump(mode="json", exclude_none=True),
        "backends": {"gpu": {"local": local}},
        "policy": {"name": str(folder), "knobs": knobs},
    }
    assert build_fallback(ControlConfig.from_dict(data), None).admission == level


def test_a_refusing_rule_reaches_the_gateway_while_it_decides(stage, headroom):
    show = stage(gateway=True, rule=headroom(admission=1.0))
    show.policy.error = RuntimeError("boom")
    assert show.steps(6).source == "rule"
    assert show.world.gateway.decision.admission == {"chat": 1.0}
