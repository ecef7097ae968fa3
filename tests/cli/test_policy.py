"""``rl-autoscale policy``, and the commands that take a policy that ships with the package by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_autoscale.agents import pretrained
from rl_autoscale.cli.root import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_ls_and_show_tell_what_ships(tiny_pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "policy", "ls", "--json")
    listed = json.loads(out)
    assert code == 0
    assert [item["name"] for item in listed["pretrained"]] == ["pretrained/tiny"]
    assert {"hpa", "learned", "oracle"} <= {item["name"] for item in listed["registered"]}
    code, out, err = run(capsys, "policy", "show", "pretrained/tiny")
    assert code == 0
    assert "scenarios: azure-conversation" in out
    assert "no README.md" in err
    (tiny_pretrained / "README.md").write_text("# tiny, a card")
    assert "tiny, a card" in run(capsys, "policy", "show", "pretrained/tiny")[1]
    assert "Kubernetes" in run(capsys, "policy", "show", "hpa")[1]


def test_none_shipped_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(pretrained, "shipped_folder", lambda: tmp_path)
    code, out, _ = run(capsys, "policy", "ls")
    assert (code, "pre-trained: none ships with this version" in out) == (0, True)
    code, _, err = run(capsys, "evaluate", "--policy", "pretrained/generalist")
    assert (code, "no pre-trained policy ships with this version" in err) == (2, True)


@pytest.mark.parametrize("name", ["hpaa", "pretrained/tinny", "no/such/folder"])
def test_what_is_nowhere_is_one_line(name: str, tiny_pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "policy", "show", name)
    assert (code, err.count("\n")) == (2, 1)


def test_evaluate_and_benchmark_take_the_name(
    tiny_pretrained: Path, tiny_scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        capsys, "evaluate", "--policy", "pretrained/tiny", "--scenario", tiny_scenario, "--knob", "attainment=0.98",
        "--seeds", 1, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["knobs"] == {"path": "pretrained/tiny", "attainment": "0.98"}
    code, out, err = run(
        capsys, "benchmark", "--scenario", tiny_scenario, "--policies", "pretrained/tiny,headroom", "--seeds", 1,
        "--knob-values", 2, "--refinements", 0, "--jobs", 1, "--json", "--out", tmp_path / "b",
    )  # fmt: skip
    assert code == 0, err
    assert {item["policy"] for item in json.loads(out)[0]["policies"]} == {"learned", "headroom"}
    assert "path: pretrained/tiny" in (tmp_path / "b" / "config.yaml").read_text()  # no machine's path in a config


def test_a_suite_takes_what_ships_or_says_that_nothing_does(
    tiny_pretrained: Path, tiny_scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = [
        *("benchmark", "--suite", "quick", "--scenario", tiny_scenario, "--seeds", 1, "--knob-values", 2),
        *("--refinements", 0, "--tune-episodes", 2, "--span", 60, "--jobs", 1, "--out", tmp_path / "b", "--json"),
    ]
    code, out, err = run(capsys, *command)
    assert (code, "no pre-trained" in err) == (0, False), err
    assert "PPO" in {item["policy"] for item in json.loads(out)[0]["policies"]}
    monkeypatch.setattr(pretrained, "shipped_folder", lambda: tmp_path / "nowhere")
    code, out, err = run(capsys, *command)
    assert (code, "no pre-trained policy ships for these scenarios" in err) == (0, True), err
    assert "PPO" not in {item["policy"] for item in json.loads(out)[0]["policies"]}
    code, _, err = run(capsys, "benchmark", "--learned", "x")
    assert (code, "--learned adds trained policies to a --suite" in err) == (2, True)


def test_compare_plays_both_on_the_same_traffic(
    tiny_pretrained: Path, tiny_scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("policy", "compare", "pretrained/tiny", tiny_pretrained, "--scenario", tiny_scenario, "--episodes", 1)
    code, out, err = run(capsys, *asked, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["policies"] == ["pretrained/tiny", str(tiny_pretrained)]
    assert answer["change"][1] == [0.0] * len(answer["miss_price"])
    assert answer["bill"]["tiny"][0] == answer["bill"]["tiny"][1]
    code, out, err = run(capsys, *asked, "--history")
    assert (code, err) == (0, "")
    assert "+0.0%" in out
    assert "mean" in out
    code, out, _ = run(capsys, *asked, "--history", "--json")
    on_record = json.loads(out)["bill"]["tiny"]
    assert on_record[0] == on_record[1] != answer["bill"]["tiny"][0]


def test_compare_wants_a_scenario_that_fits(tiny_pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "policy", "compare", "pretrained/tiny", "--scenario", "chiron")
    assert (code, err.count("\n"), "trained for schema" in err) == (2, 1, True)
