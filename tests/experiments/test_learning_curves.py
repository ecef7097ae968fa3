"""Learning curves: one grid for all seeds, honest intervals, resumed runs counted once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rl_autoscale.experiments.learning_curves import curve_folders, curve_table, read_curves, write_curves
from rl_autoscale.fleet.errors import SpecError


def write(folder: Path, steps: list[int], cost: list[float], reward: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"timesteps": step, "train/cost_over_ideal": value, "train/reward": reward, "train/slo_attainment": None}
        for step, value in zip(steps, cost, strict=True)
    ]
    (folder / "learning.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_seeds_lie_on_the_grid_of_the_shortest(tmp_path: Path) -> None:
    steps = list(range(100, 2100, 100))
    write(tmp_path / "seed-0", steps, [2.0] * 20)
    write(tmp_path / "seed-10", steps[:10], [4.0] * 10)
    write(tmp_path / "seed-2", steps, [3.0] * 20)
    folders = curve_folders(tmp_path)
    assert [path.name for path in folders] == ["seed-0", "seed-2", "seed-10"]
    curves = read_curves(folders)
    assert curves.timesteps[-1] == 1000
    assert set(curves.metrics) == {"train/cost_over_ideal", "train/reward"}  # a metric that is missing is left out
    mean, (low, high) = curves.band("train/cost_over_ideal")
    np.testing.assert_allclose(mean, 3.0)
    assert (low < 3.0).all()
    assert (high > 3.0).all()
    assert curves.end("train/cost_over_ideal").value == 3.0
    assert curve_table(curves).rows[-1][2].text.startswith("3.00 [2.")


def test_points_between_two_grid_points_are_averaged_and_a_resumed_step_counts_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [100, 200, 300, 200, 300], [1.0, 9.0, 9.0, 2.0, 3.0])
    curves = read_curves([folder])
    np.testing.assert_allclose(curves.metrics["train/cost_over_ideal"], [[1.0, 2.0, 3.0]])
    assert curve_table(curves).interval_note == ""  # one seed has no interval


def test_write_leaves_a_picture_and_a_table(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path / f"seed-{seed}", [100, 200, 300], [1.0, 2.0, 3.0 + seed])
    _, paths = write_curves(tmp_path)
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "| seed-1 |" in paths[1].read_text()


@pytest.mark.parametrize(("text", "message"), [("", "holds no rollout yet"), ("{\n", "not a learning curve")])
def test_what_is_no_curve_is_said(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "learning.jsonl").write_text(text)
    with pytest.raises(SpecError, match=message):
        write_curves(tmp_path)
    with pytest.raises(SpecError, match="no learning curve there"):
        read_curves([])
