"""Policies that ship with the package: found by name everywhere, complete and undamaged; none shipped is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_autoscale.agents import pretrained
from rl_autoscale.agents.learned import LearnedPolicy
from rl_autoscale.agents.policy_file import read_card
from rl_autoscale.agents.pretrained import CARD_PARTS, card_problems, pretrained_names, shipped_folder
from rl_autoscale.agents.registry import make_policy
from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.envs.schema import Schema
from rl_autoscale.experiments.grid import parse_policies
from rl_autoscale.fleet.errors import PolicyFileError, SpecError, UnknownNameError
from rl_autoscale.serving.assemble import build_policy
from rl_autoscale.serving.config import PolicyChoice

CARD = """# tiny

## Use
On anything small.

## Envelope
- models: Llama-3.1-8B
- GPUs: A100
- rates: 5 to 15 requests/s
- start-up: 30 to 120 s

## Measured
![front](front.png)

## Known failures
Untrained: everything.
"""


def test_a_name_finds_the_shipped_policy_everywhere(tiny_pretrained: Path) -> None:
    policy = make_policy("pretrained/tiny", miss_price=30)
    assert isinstance(policy, LearnedPolicy)
    assert policy.card == read_card(tiny_pretrained)
    for word in ("pretrained/tiny", "learned=pretrained/tiny"):
        sweep = parse_policies([word])[0]
        assert (sweep.registered, sweep.knobs) == ("learned", {"path": "pretrained/tiny"})
    with pytest.raises(SpecError, match="write learned=pretrained/tiny"):
        parse_policies(["adapted=pretrained/tiny"])
    fleet = load_scenario("chatbot").fleet
    for choice in (
        PolicyChoice(name="pretrained/tiny"),
        PolicyChoice(name="learned", knobs={"path": "pretrained/tiny"}),
    ):
        assert isinstance(build_policy(choice, fleet), LearnedPolicy)  # what a live controller does
    interactive = fleet.classes[0].name
    asked = PolicyChoice.model_validate({"name": "pretrained/tiny", "knobs": {"attainment": {interactive: 0.98}}})
    built = build_policy(asked, fleet)
    built.reset(fleet)
    assert built.name == f"learned(attainment={interactive}:0.98)"


def test_an_unknown_name_lists_the_known_ones(tiny_pretrained: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown pre-trained policy 'tinny'; did you mean 'tiny'.*known: tiny"):
        make_policy("pretrained/tinny")


@pytest.mark.parametrize("name", ["../tiny", "tiny/..", "", "tiny/policy.json"])
def test_a_name_is_no_path(name: str, tiny_pretrained: Path) -> None:
    with pytest.raises(UnknownNameError):
        make_policy(f"pretrained/{name}")


def test_with_none_shipped_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "shipped_folder", lambda: tmp_path)
    assert pretrained_names() == []
    with pytest.raises(PolicyFileError, match="no pre-trained policy ships with this version"):
        make_policy("pretrained/any")


def test_a_policy_for_another_fleet_is_refused(tiny_pretrained: Path) -> None:
    with pytest.raises(PolicyFileError, match="trained for schema"):
        make_policy("pretrained/tiny").reset(load_scenario("chiron").fleet)


def test_a_complete_card_has_no_problems_and_each_lack_is_named(tmp_path: Path) -> None:
    assert card_problems(tmp_path) == ["no README.md"]
    (tmp_path / "front.png").touch()
    card = tmp_path / "README.md"
    card.write_text(CARD)
    assert card_problems(tmp_path) == []
    card.write_text(CARD.replace("front.png", "lost.png").replace("- rates: 5 to 15 requests/s\n", ""))
    assert card_problems(tmp_path) == [
        "'## Envelope' lacks '- rates: ...'",
        "links to lost.png, which is not there",
    ]
    card.write_text(CARD.split("## Known failures")[0] + "## Known failures\n\n")
    assert card_problems(tmp_path) == ["section '## Known failures' is missing or empty"]
    assert set(CARD_PARTS) == {"Use", "Envelope", "Measured", "Known failures"}


def problems(folder: Path) -> list[str]:
    """What is wrong with a shipped policy."""
    card = read_card(folder)
    found = card_problems(folder)
    LearnedPolicy(folder)  # checksum, shapes
    names = card["training"].get("scenarios", [])
    found += [] if names else ["its card names no scenario"]
    for name in names:
        digest = Schema.of(load_scenario(name).fleet).digest
        found += [] if digest == card["schema"] else [f"schema {card['schema']} is not that of {name} ({digest})"]
    return found + ([] if card.get("dial") else ["its dial was not measured"])


def test_every_shipped_policy_is_whole_and_its_card_complete() -> None:
    folders = [path for path in shipped_folder().iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {path.name for path in folders} == set(pretrained_names())
    assert {path.name: found for path in folders if (found := problems(path))} == {}


def test_that_check_would_notice(tiny_pretrained: Path) -> None:
    (tiny_pretrained / "README.md").write_text(CARD.replace("front.png", "policy.onnx"))
    assert problems(tiny_pretrained) == []
    card = json.loads((tiny_pretrained / "policy.json").read_text())
    card["training"]["scenarios"] = ["chiron"]
    (tiny_pretrained / "policy.json").write_text(json.dumps(card))
    assert any("is not that of chiron" in problem for problem in problems(tiny_pretrained))
    (tiny_pretrained / "policy.onnx").write_bytes(b"changed")
    with pytest.raises(PolicyFileError, match="SHA-256"):
        problems(tiny_pretrained)
