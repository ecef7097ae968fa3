"""A run folder says where it comes from; the code's fingerprint follows the code."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rl_autoscale.experiments.grid import BenchmarkConfig, PolicySweep
from rl_autoscale.experiments.runs import (
    _DECIDING_FILES,
    PACKAGE_FOLDER,
    code_fingerprint,
    describe_run,
    read_run,
    write_run,
)
from rl_autoscale.fleet.errors import SpecError


def test_a_run_is_described_and_read_back(tmp_path: Path) -> None:
    config = BenchmarkConfig(scenarios=("bursty",), policies=(PolicySweep(policy="hpa"),))
    info = describe_run(7, command=["/somewhere/bin/rl-autoscale", "benchmark", "--seeds", "2"])
    assert info.command == "rl-autoscale benchmark --seeds 2"
    assert info.seed == 7
    assert "numpy" in info.versions
    write_run(tmp_path / "run", config, info)
    assert read_run(tmp_path / "run") == info
    assert BenchmarkConfig.from_dict(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())) == config
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "run.json"]


def test_nothing_readable_is_none(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None
    (tmp_path / "run.json").write_text("{")
    assert read_run(tmp_path) is None


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="cannot be written"):
        write_run(tmp_path / "file" / "run", {}, describe_run(0))


def test_fingerprint_follows_deciding_code_only(tmp_path: Path) -> None:
    for part in ("sim", "cli"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "code.py").write_text("a = 1\n")
    before = code_fingerprint(tmp_path)
    (tmp_path / "cli" / "code.py").write_text("a = 2\n")
    assert code_fingerprint(tmp_path) == before
    (tmp_path / "sim" / "code.py").write_text("a = 2\n")
    assert code_fingerprint(tmp_path) != before


@pytest.mark.parametrize("name", _DECIDING_FILES)
def test_how_episodes_are_run_and_rules_tuned_decides_too(tmp_path: Path, name: str) -> None:
    assert (PACKAGE_FOLDER / name).exists()
    before = code_fingerprint(tmp_path)
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("a = 1\n")
    assert code_fingerprint(tmp_path) != before
