"""The main path as a user types it: train, export, evaluate, benchmark, report, demo; and what mistakes look like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rl_autoscale.cli import root
from rl_autoscale.experiments import demo
from rl_autoscale.experiments.grid import PolicySweep

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in an empty folder; returns exit code, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            root.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return int(leaving.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture
def trained(run: Run, tiny_scenario: Path) -> Path:
    """The folder of a training run of one rollout."""
    code, out, err = run("train", "--scenario", tiny_scenario, "--timesteps", 2048, "--track", "none", "--out", "t")
    assert code == 0, err
    assert "policy in t/policy" in out
    return Path("t")


def test_train_export_evaluate(run: Run, tiny_scenario: Path, trained: Path) -> None:
    code, out, err = run("export", trained, "--out", "mine", "--json")
    assert code == 0, err
    assert json.loads(out)["onnx_sha256"] == json.loads((trained / "policy/policy.json").read_text())["onnx_sha256"]
    code, out, err = run("evaluate", "--policy", "mine", "--scenario", tiny_scenario, "--seeds", 2, "--json")
    assert code == 0, err
    episodes = json.loads(out)["episodes"]
    assert len(episodes) == 2
    assert all(0 <= episode["slo_attainment"] <= 1 and episode["gpu_hours"] > 0 for episode in episodes)
    code, out, err = run("evaluate", "--policy", "static", "--scenario", tiny_scenario, "--seeds", 1, "--detail")
    assert code == 0, err
    for needed in ("slo_attainment", "gpu_efficiency", "over_provisioned", "qoe/chat", "hol_blocking_s/chat"):
        assert needed in out


def test_a_second_call_goes_on_where_the_first_stopped(run: Run, tiny_scenario: Path, trained: Path) -> None:
    command = ("train", "--scenario", tiny_scenario, "--track", "none", "--out", trained, "--json")
    before = (trained / "policy/policy.onnx").read_bytes()
    code, out, err = run(*command, "--timesteps", 2048)
    assert code == 0, err
    assert (trained / "policy/policy.onnx").read_bytes() == before  # finished: nothing to train
    code, out, err = run(*command, "--timesteps", 4096)
    assert code == 0, err
    assert json.loads(out)["timesteps"] == 4096
    assert (trained / "policy/policy.onnx").read_bytes() != before


def test_a_trained_policy_is_adapted(run: Run, tiny_scenario: Path, trained: Path) -> None:
    before = (trained / "policy/policy.onnx").read_bytes()
    command = ("train", "--scenario", tiny_scenario, "--timesteps", 2048, "--track", "none", "--out", "on")
    code, out, err = run(*command, "--start-from", trained / "policy")
    assert code == 0, err
    assert "policy in on/policy" in out
    verdict = json.loads(Path("on/verdict.json").read_text())
    assert verdict["start"] == str(trained / "policy")
    assert out.splitlines()[-1].endswith(f"run {'on/policy' if verdict['keep'] else verdict['start']}")
    assert (trained / "policy/policy.onnx").read_bytes() == before
    assert yaml.safe_load(Path("on/config.yaml").read_text())["start_from"] == [str(trained / "policy")]
    timesteps = json.loads(Path("on/policy/policy.json").read_text())["training"]["timesteps"]
    assert timesteps == 2048 + 40 * 96  # before, and one rollout of the size for adapting


def test_seeds_lie_beside_each_other_and_are_not_trained_twice(run: Run, tiny_scenario: Path) -> None:
    command = ("train", "--scenario", tiny_scenario, "--timesteps", 2048, "--track", "none", "--out", "five")
    code, out, err = run(*command, "--seeds", 2, "--json")
    assert code == 0, err
    assert sorted(json.loads(out)["policies"]) == ["0", "1"]
    assert Path("five/learning.png").exists()
    digests = [json.loads(Path(f"five/seed-{k}/policy/policy.json").read_text())["onnx_sha256"] for k in (0, 1)]
    assert digests[0] != digests[1]
    before = Path("five/seed-0/learning.jsonl").read_text()
    code, out, err = run(*command, "--seeds", 3)
    assert code == 0, err
    assert "trained 3 seeds" in out
    assert Path("five/seed-0/learning.jsonl").read_text() == before
    code, out, err = run("report", "five")
    assert (code, "seed-2" in out) == (0, True), err


def test_a_policy_is_trained_again_as_its_card_says(run: Run, tiny_scenario: Path, trained: Path) -> None:
    code, _, err = run("train", "--config", trained / "policy", "--track", "none", "--out", "again")
    assert code == 0, err
    assert Path("again/policy/policy.onnx").read_bytes() == (trained / "policy/policy.onnx").read_bytes()


def test_the_mean_of_seeds_is_searched_and_trained_again_as_its_card_says(run: Run, tiny_scenario: Path) -> None:
    command = ("train", "--scenario", tiny_scenario, "--timesteps", 2048, "--track", "none")
    code, _, err = run(*command, "--mean")
    assert code == 2
    assert "--mean is of several seeds; say how many with --seeds" in err
    code, _, err = run(*command, "--timesteps", 0, "--seeds", 2, "--out", "two")
    assert code == 2
    assert "there is nothing to train; say how long with --timesteps" in err
    code, out, err = run(*command, "--seeds", 2, "--mean", "--out", "two")
    assert code == 0, err
    assert "their mean is in two/mean/policy" in out
    cards = [json.loads(Path(f"two/{name}/policy/policy.json").read_text()) for name in ("seed-0", "seed-1", "mean")]
    training = cards[-1]["training"]
    assert [origin["onnx_sha256"] for origin in training["started_from"]] == [card["onnx_sha256"] for card in cards[:2]]
    assert training["timesteps"] == 2 * 2048
    assert ["offset_search" in card["training"] for card in cards] == [False, False, True]
    code, _, err = run("train", "--config", "two/mean/policy", "--seeds", 2, "--mean", "--track", "none", "--out", "on")
    assert code == 0, err
    before = Path("two/mean/policy/policy.onnx").read_bytes()
    assert Path("on/mean/policy/policy.onnx").read_bytes() == before
    again = (*command, "--seeds", 2, "--mean", "--out", "two")
    shutil.copytree("two/seed-1/policy", "two/seed-0/policy", dirs_exist_ok=True)
    code, _, err = run(*again)
    assert code == 0, err
    assert Path("two/mean/policy/policy.onnx").read_bytes() != before  # of the seeds as they are now
    written = Path("two/mean/policy/policy.json").stat().st_mtime_ns
    code, _, err = run(*again)
    assert code == 0, err
    assert Path("two/mean/policy/policy.json").stat().st_mtime_ns == written  # finished: nothing to do


def test_wandb_offline_logs_a_training(
    run: Run, tiny_scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    code, _, err = run("train", "--scenario", tiny_scenario, "--timesteps", 2048, "--track", "wandb", "--out", "w")
    assert code == 0, err
    assert list(Path("w").rglob("*.wandb"))


def test_an_unknown_tracker_is_told_before_any_work(run: Run, tiny_scenario: Path) -> None:
    code, _, err = run("benchmark", "--scenario", tiny_scenario, "--policies", "hpa", "--track", "wandbb", "--out", "u")
    assert code == 2
    assert "did you mean 'wandb'" in err
    code, _, err = run(
        "train", "--scenario", tiny_scenario, "--seeds", 2, "--ray", "local", "--track", "x", "--out", "u"
    )
    assert code == 2
    assert "unknown tracker 'x'" in err
    assert not Path("u").exists()


def test_benchmark_then_report(run: Run, tiny_scenario: Path, trained: Path) -> None:
    policies = f"headroom,chiron-robust,{trained / 'policy'}"
    code, out, err = run(
        "benchmark", "--scenario", tiny_scenario, "--policies", policies, "--seeds", 2, "--knob-values", 2,
        "--refinements", 0, "--jobs", 1, "--out", "b",
    )  # fmt: skip
    assert code == 0, err
    assert "wrote b/report.html" in out.replace("\n", "")
    (Path("b") / "report.html").unlink()
    code, out, err = run("report", "b", "--track", "tensorboard")
    assert code == 0, err
    assert list(Path("b/tensorboard").iterdir())
    assert "<html" in (Path("b") / "report.html").read_text(encoding="utf-8")
    assert {"front-tiny.png", "timeline-tiny.png"} <= {path.name for path in Path("b").iterdir()}


def test_demo_runs_from_nothing_and_resumes(run: Run, tiny_scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SCENARIO", str(tiny_scenario))
    monkeypatch.setattr(demo, "MISS_PRICES", (5.0, 20.0))
    sweeps = (PolicySweep(policy="headroom", values=(1.2, 2.0)), PolicySweep(policy="chiron-robust", values=(0.2, 0.5)))
    monkeypatch.setattr(demo, "POLICIES", sweeps)
    command = ("demo", "--timesteps", 2048, "--seeds", 1, "--jobs", 1, "--json")
    code, out, err = run(*command)
    assert code == 0, err
    assert json.loads(out)
    folder = Path("runs/demo")
    assert {"report.html", "rows.jsonl", "front-tiny.png", "timeline-tiny.png"} <= {p.name for p in folder.iterdir()}
    rows, policy = (folder / "rows.jsonl").read_bytes(), (folder / "train/policy/policy.onnx").stat().st_mtime_ns
    code, _, err = run(*command)
    assert code == 0, err
    assert (folder / "rows.jsonl").read_bytes() == rows  # nothing ran twice
    assert (folder / "train/policy/policy.onnx").stat().st_mtime_ns == policy


MISTAKES = {
    "unknown key": ("fleet.classes.0", {"fleet": {"classes": [{"name": "chat", "ttft_slo": 1, "tpot_slo_s": 0.1}]}}),
    "negative rate": ("rate_per_s", {"test": {"span_s": 60, "streams": [
        {"generator": {"kind": "poisson", "rate_per_s": -12}, "lengths": "azure_conv"}]}}),
    "no pools": ("at least one pool", {"fleet": {"pools": []}}),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("verb", ["scenario", "evaluate", "benchmark", "train"])
def test_a_bad_scenario_is_one_clear_line_and_leaves_nothing_behind(
    run: Run, tiny_scenario: Path, mistake: str, verb: str
) -> None:
    named, change = MISTAKES[mistake]
    scenario = yaml.safe_load(tiny_scenario.read_text())
    scenario = {**scenario, **{k: {**scenario[k], **v} if k == "fleet" else v for k, v in change.items()}}
    bad = tiny_scenario.with_name("bad.yaml")
    bad.write_text(yaml.safe_dump(scenario))
    command = {
        "scenario": ("scenario", "validate", bad),
        "evaluate": ("evaluate", "--policy", "headroom", "--scenario", bad),
        "benchmark": ("benchmark", "--policies", "headroom", "--scenario", bad, "--out", "b"),
        "train": ("train", "--scenario", bad, "--track", "none", "--out", "t"),
    }[verb]
    code, _, err = run(*command)
    assert code == root.EXIT_MISTAKE
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "bad.yaml" in last
    assert named in last
    assert not list(Path().iterdir())


def test_scenarios_of_two_schemas_leave_nothing_behind(run: Run, tiny_scenario: Path) -> None:
    code, _, err = run("train", "--scenario", tiny_scenario, "--scenario", "chiron", "--out", "t")
    assert code == root.EXIT_MISTAKE
    assert "scenarios of one schema, got 2" in err.splitlines()[-1]
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.csv", "arrival_s,prompt_tokens,output_tokens\n", "no rows"),
        ("broken.csv", "arrival_s,prompt_tokens,output_tokens\n0.1,10,20\n0.2,abc,3\n", "broken.csv:3"),
    ],
)
@pytest.mark.parametrize("verb", ["describe", "convert"])
def test_a_bad_trace_is_one_clear_line(
    run: Run, tmp_path: Path, name: str, content: str, named: str, verb: str
) -> None:
    trace = tmp_path / name
    trace.write_text(content)
    code, _, err = run("trace", verb, trace, *(["out.csv"] if verb == "convert" else []))
    assert code == root.EXIT_MISTAKE
    assert named in err.splitlines()[-1]
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("evaluate", "--policy", "hedroom"), "did you mean 'headroom'"),
        (("evaluate", "--policy", "headroom", "--knob", "headrom=2"), "headroom"),
        (("evaluate", "--policy", "headroom", "--scenario", "burst"), "did you mean 'bursty'"),
        (("benchmark", "--policies", "hpaa"), "did you mean 'hpa'"),
        (("evaluate", "--policy", "nowhere/policy"), "nowhere/policy"),
        (("evaluate", "--policy", "hpa", "--knob", "target.=3"), "must be NAME=VALUE"),
        (("evaluate", "--policy", "hpa", "--knob", "a=3", "--knob", "a.b=3"), "comes after a value for all of a"),
        (("evaluate", "--policy", "hpa", "--knob", "a.b=3", "--knob", "a=3"), "comes after values for parts of it"),
        (("evaluate", "--policy", "hpa", "--knob", "target=many"), "target='many' is not allowed"),
        (("evaluate", "--policy", "learned=runs/p", "--knob", "miss_price=abc"), "miss_price='abc' is not allowed"),
    ],
)
def test_an_unknown_name_or_value_is_one_clear_line(run: Run, arguments: tuple[str, ...], named: str) -> None:
    code, _, err = run(*arguments)
    assert code == root.EXIT_MISTAKE
    assert named in err.splitlines()[-1]
    assert not list(Path().iterdir())


def test_a_policy_of_another_schema_is_refused(run: Run, trained: Path) -> None:
    code, _, err = run("evaluate", "--policy", trained / "policy", "--scenario", "chiron")
    assert code == root.EXIT_MISTAKE
    assert "trained for schema" in err.splitlines()[-1]
