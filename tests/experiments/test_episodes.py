"""Episodes: which simulator runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_autoscale.cli import root
from rl_autoscale.sim.reference import ReferenceFleet


def evaluate(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        root.main(["evaluate", *arguments])
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


def test_evaluate_gives_the_same_metrics_on_either_engine(
    tiny_scenario: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    advance = ReferenceFleet.advance
    monkeypatch.setattr(ReferenceFleet, "advance", lambda fleet: steps.append(1) or advance(fleet))
    found = {}
    for engine in ("compiled", "reference"):
        code = evaluate(
            "--policy", "hpa", "--scenario", str(tiny_scenario), "--seeds", "2", "--span", "20", "--engine", engine,
            "--json",
        )  # fmt: skip
        assert code == 0
        found[engine] = json.loads(capsys.readouterr().out)["episodes"]
        assert bool(steps) == (engine == "reference")
    for got, expected in zip(found["compiled"], found["reference"], strict=True):
        assert got == pytest.approx(expected, rel=1e-9)
        assert got["num_arrived"] > 100


def test_an_unknown_engine_is_refused_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--policy", "hpa", "--engine", "referance") == 2
    assert "did you mean 'reference'?" in capsys.readouterr().err
