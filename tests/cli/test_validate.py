from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_autoscale.cli import root
from rl_autoscale.experiments.validation import queues


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        root.main(arguments)
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "QUEUES", queues.QUEUES[:1])
    monkeypatch.setattr(queues, "NUM_RUNS", 5)
    monkeypatch.setattr(queues, "NUM_REQUESTS", 5_000)


def test_without_data_it_says_how_to_name_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RL_AUTOSCALE_PROFILE_DATA", raising=False)
    assert run("validate") == root.EXIT_MISTAKE
    assert "--data FOLDER or set RL_AUTOSCALE_PROFILE_DATA" in capsys.readouterr().err


def test_json_report_and_page(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table: queues --><!-- end -->")
    out = tmp_path / "out"
    assert run("validate", "--parts", "queues", "--out", str(out), "--update", str(page), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((out / "fidelity.json").read_text())
    assert shown["queues"][0]["expected_s"] == pytest.approx(0.2)
    assert "M/D/1" in page.read_text()


def test_tables_on_the_terminal(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", "--parts", "queues", "--out", str(tmp_path)) == 0
    assert "Queueing theory" in capsys.readouterr().out
