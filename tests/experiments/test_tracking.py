"""Trackers: what was logged can be read back, and nothing is imported unasked."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from rl_autoscale.experiments import tracking
from rl_autoscale.experiments.tracking import Job, Sheet, Showing, check_tracker, make_tracker
from rl_autoscale.fleet.errors import MissingExtraError, TrackingError, UnknownNameError


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


def test_a_folder_of_runs_is_not_taken_for_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as WANDB_DIR=. leaves it
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(MissingExtraError):
        check_tracker("wandb")


def test_unknown_tracker_suggests(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'wandb'"):
        make_tracker("wandbb", tmp_path)


@pytest.mark.parametrize("kind", ["none", "tensorboard", "wandb"])
def test_a_known_tracker_is_found_before_the_work(kind: str) -> None:
    if kind != "none":
        pytest.importorskip(kind)
    check_tracker(kind)


FAKE_WANDB = """
from types import SimpleNamespace
seen = {"init": None, "log": [], "artifacts": [], "summary": {}, "exit": None}

class Artifact(SimpleNamespace):
    def __init__(self, name, type):
        super().__init__(name=name, type=type, files=[])
    def add_file(self, path, name):
        self.files.append(name)

class Error(Exception):
    pass

def init(**options):
    seen["init"] = options
    if options["project"] == "nobody":
        raise Error("No API key configured.")
    return SimpleNamespace(
        log=lambda metrics, step=None: seen["log"].append((metrics, step)),
        summary=seen["summary"],
        log_artifact=seen["artifacts"].append,
        finish=lambda exit_code: seen.update(exit=exit_code),
    )

Table = lambda columns, data: ("table", columns, data)
Image = lambda path: ("image", path)
Html = lambda path, inject: ("html", path)
"""


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    module = importlib.import_module("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_is_told_what_a_run_is_and_what_it_shows(
    fake_wandb: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    picture, page = tmp_path / "front.png", tmp_path / "report.html"
    job = Job("train", "five/seed-1", "five", ("bursty", "x" * 100), {"ppo": {"seed": 1}})
    with make_tracker("wandb", tmp_path / "run", job) as tracker:
        tracker.log({"train/reward": -1.0, "lost": float("nan")}, 5)
        tracker.show(
            Showing(
                "policy", {"a/gpu_hours_98": 2.0, "never": float("inf")},
                {"a/hours": Sheet(("p", "h"), (("x", None),))}, {"a/front": picture}, page, (picture,),
            )
        )  # fmt: skip
    seen = fake_wandb.seen
    assert seen["init"] == {
        "project": "mine", "name": "five/seed-1", "group": "five", "job_type": "train",
        "tags": ["bursty", "x" * 64], "dir": str(tmp_path / "run"), "config": {"ppo": {"seed": 1}},
        "reinit": "create_new",
    }  # fmt: skip
    panels = {
        "a/hours": ("table", ["p", "h"], [["x", None]]),
        "a/front": ("image", str(picture)),
        "report": ("html", str(page)),
    }
    assert seen["log"] == [({"train/reward": -1.0}, 5), (panels, None)]
    assert seen["summary"] == {"a/gpu_hours_98": 2.0}
    assert [(kept.name, kept.type, kept.files) for kept in seen["artifacts"]] == [
        ("policy-five-seed-1", "policy", ["front.png"])
    ]
    assert seen["exit"] == 0


def test_an_artifact_has_a_name_that_wandb_takes(fake_wandb: ModuleType, tmp_path: Path) -> None:
    with make_tracker("wandb", tmp_path, Job(name="lr=3e-4, größer/seed-1" + "x" * 200)) as tracker:
        tracker.show(Showing("policy", files=(tmp_path / "policy.onnx",)))
    (kept,) = fake_wandb.seen["artifacts"]
    assert kept.name.startswith("policy-lr-3e-4-gr-er-seed-1x")
    assert len(kept.name) == 128


def test_without_a_login_it_says_what_to_do(
    fake_wandb: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "nobody")
    with pytest.raises(TrackingError, match=r"No API key configured\. Or set WANDB_MODE=offline"):
        make_tracker("wandb", tmp_path)


def test_a_run_that_fails_is_marked_as_failed(fake_wandb: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), make_tracker("wandb", tmp_path):
        raise RuntimeError
    assert fake_wandb.seen["exit"] == 1
    assert fake_wandb.seen["init"]["name"] == tmp_path.name


def test_tensorboard_shows_tables_as_text_and_figures_as_images(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    picture = tmp_path / "front.png"
    figure = Figure(figsize=(3, 2), dpi=100)
    figure.savefig(picture)
    sheet = Sheet(("policy", "hours"), (("hpa", 1.5), ("static", None)))
    with make_tracker("tensorboard", tmp_path) as tracker:
        tracker.log({"train/reward": 0.0}, 7)
        tracker.show(Showing("benchmark", {"a/gpu_hours_98": 2.0}, {"a/hours": sheet}, {"a/front": picture}))
    script = (
        "import sys\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "seen = EventAccumulator(sys.argv[1]).Reload()\n"
        "image, text = seen.Images('a/front')[0], seen.Tensors('a/hours')[0]\n"
        "print('READ', seen.Scalars('a/gpu_hours_98')[0].value, image.step, image.width, image.height,\n"
        "      seen.SummaryMetadata('a/hours').plugin_data.plugin_name, text.tensor_proto.string_val[0].decode())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "tensorboard")], capture_output=True, text=True, check=True
    )
    assert done.stdout[done.stdout.index("READ") :] == (
        "READ 2.0 7 300 200 text | policy | hours |\n| --- | --- |\n| hpa | 1.5 |\n| static |  |\n"
    )


@pytest.mark.slow
def test_wandb_offline_leaves_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with make_tracker("wandb", tmp_path, Job(config={"scenario": "x"})) as tracker:
        assert isinstance(tracker, tracking.WandbTracker)
        tracker.log({"train/reward": -1.0}, 1)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
