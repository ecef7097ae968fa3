"""Trackers: what was logged can be read back, and nothing is imported unasked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rl_autoscale.experiments import tracking
from rl_autoscale.experiments.tracking import make_tracker
from rl_autoscale.fleet.errors import MissingExtraError, UnknownNameError


def test_none_takes_everything(tmp_path: Path) -> None:
    with make_tracker("none", tmp_path) as tracker:
        tracker.log({"train/reward": 1.0}, 1)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    # in a process of its own: TensorBoard's reader and protobuf warn about each other's versions
    script = (
        "import sys; from pathlib import Path; from rl_autoscale.experiments.tracking import make_tracker\n"
        "with make_tracker('tensorboard', Path(sys.argv[1])) as t:\n"
        "    t.log({'train/reward': -1.5, 'gone': float('nan')}, 10); t.log({'train/reward': -0.5}, 20)\n"
        "assert 'torch' not in sys.modules\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "seen = EventAccumulator(sys.argv[1] + '/tensorboard').Reload()\n"
        "print('READ', seen.Tags()['scalars'], [(e.step, e.value) for e in seen.Scalars('train/reward')])\n"
    )
    pytest.importorskip("tensorboard")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "READ ['train/reward'] [(10, -1.5), (20, -0.5)]"


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_library_names_the_extra(
    kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install '.\[train\]'"):
        make_tracker(kind, tmp_path)


def test_unknown_tracker_suggests(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'wandb'"):
        make_tracker("wandbb", tmp_path)


@pytest.mark.slow
def test_wandb_offline_leaves_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with make_tracker("wandb", tmp_path, {"scenario": "x"}) as tracker:
        assert isinstance(tracker, tracking.WandbTracker)
        tracker.log({"train/reward": -1.0}, 1)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
