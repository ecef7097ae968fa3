"""``rl-autoscale profile``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from rl_autoscale.cli.profile import app, default_name
from rl_autoscale.fleet.errors import MissingExtraError, SpecError, UnknownNameError
from rl_autoscale.fleet.profile import LatencyProfile, load_profile, shipped_profile_names
from rl_autoscale.sim.iteration_table import REQUIRED_COLUMNS
from rl_autoscale.sim.roofline import MODELS

TRUTH = "llama-3.1-8b_h100_tp1"
ENGINE = ["--gpu", "H100", "--kv-blocks", "27881"]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def parsed(result: Result) -> object:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def measurements(tmp_path: Path) -> Path:
    """Iterations as a user would bring them, made by a shipped profile so that the right answer is known."""
    profile, rng = load_profile(TRUTH), np.random.default_rng(0)
    lines = [",".join(REQUIRED_COLUMNS)]
    for row in range(600):
        chunk = 0 if row % 3 == 0 else int(2 ** rng.uniform(0, 13))
        done = int(rng.integers(0, 4000)) if chunk else 0
        batch = 0 if row % 3 == 1 else int(2 ** rng.uniform(0, 8))
        context = int(2 ** rng.uniform(7, 12)) if batch else 0
        seconds = profile.iteration_s(
            num_decode=batch, decode_context_tokens=batch * context, chunks=((chunk, done),) if chunk else ()
        )
        lines.append(f"{chunk},{done},{batch},{context},{seconds * 1e3!r}")
    path = tmp_path / "times.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_ls_names_every_shipped_profile() -> None:
    result = call("ls")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in shipped_profile_names())
    rows = parsed(call("ls", "--json"))
    assert isinstance(rows, list)
    assert [row["name"] for row in rows] == shipped_profile_names()
    assert all(0 < row["decode_iteration_s"] < 0.1 and row["prefill_tokens_per_s"] > 1000 for row in rows)


def test_show_prints_source_predictions_and_errors() -> None:
    profile = load_profile(TRUTH)
    result = call("show", TRUTH)
    assert result.exit_code == 0
    for expected in ("AIConfigurator", f"{profile.kv_blocks:,} blocks", "decode iteration, ms", "held-out"):
        assert expected in result.stdout
    data = parsed(call("show", TRUTH, "--json"))
    assert isinstance(data, dict)
    data.pop("summary")
    assert LatencyProfile.from_dict(data) == profile


def test_show_suggests_the_nearest_name() -> None:
    assert isinstance(call("show", "llama-3.1-8b_h100").exception, UnknownNameError)
    assert "did you mean 'llama-3.1-8b_h100_tp1'?" in str(call("show", "llama-3.1-8b_h100").exception)


def test_fit_recovers_the_profile_behind_a_table(measurements: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    report = parsed(
        call("fit", "--table", measurements, "--model", "me/mine", *ENGINE, "--name", "mine", "--out", out, "--json")
    )
    assert isinstance(report, dict)
    assert report["path"] == str(out)
    profile, truth = load_profile(str(out)), load_profile(TRUTH)
    assert profile.name == "mine"
    assert profile.source == "measurements in times.csv"
    assert (profile.max_num_seqs, profile.max_num_batched_tokens) == (1024, 8192)
    assert max(profile.fit_error[f"{kind}_mean"] for kind in ("prefill", "decode", "mixed")) < 0.02
    assert profile.decode_context_s == pytest.approx(truth.decode_context_s, rel=0.05)


def test_fit_prints_the_error_by_kind(measurements: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    result = call("fit", "--table", measurements, "--model", "me/mine", *ENGINE, "--out", out)
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("prefill", "decode", "mixed", "mean %", "wrote"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --aic MODEL"),
        (["--aic", "a/model", "--table", "t.csv"], "give either --aic MODEL"),
        (["--aic", "a/model"], "--system is missing"),
        (["--table", "t.csv"], "--model is missing"),
        (["--table", "t.csv", "--model", "m"], "--gpu is missing"),
        (["--table", "t.csv", "--model", "m", "--gpu", "MI300X"], "--max-num-seqs is missing"),
        (["--table", "t.csv", "--model", "m", "--gpu", "H100"], "--kv-blocks is missing"),
        (["--table", "t.csv", "--model", "m", *ENGINE], "t.csv: no such file"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("fit", *arguments)
    assert isinstance(result.exception, SpecError)
    assert message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_fit_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("aiconfigurator_core", "aiconfigurator_core.sdk"):
        monkeypatch.setitem(sys.modules, module, None)
    result = call("fit", "--aic", "meta-llama/Meta-Llama-3.1-8B", "--system", "h100_sxm")
    assert isinstance(result.exception, MissingExtraError)
    assert "pip install '.[profiles]'" in str(result.exception)


def test_fit_from_aiconfigurator_refuses_an_unknown_system() -> None:
    error = call("fit", "--aic", "meta-llama/Meta-Llama-3.1-8B", "--system", "h100").exception
    assert "did you mean 'h100_sxm'?" in str(error)


@pytest.mark.parametrize(
    ("model", "gpu", "tensor_parallel", "name"),
    [
        ("meta-llama/Meta-Llama-3.1-8B", "H100", 1, "llama-3.1-8b_h100_tp1"),
        ("Qwen/Qwen3-30B-A3B", "L40S", 2, "qwen3-30b-a3b_l40s_tp2"),
    ],
)
def test_default_names(model: str, gpu: str, tensor_parallel: int, name: str) -> None:
    assert default_name(model, gpu, tensor_parallel) == name


def test_roofline_writes_a_profile_and_its_error_where_there_is_a_measured_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    arguments = ("roofline", "--model", "llama-3.1-8b", "--gpu", "A100", "--chunk-tokens", "512", "--out", path)
    found = parsed(call(*arguments, "--json"))
    assert isinstance(found, dict)
    assert 0.05 < found["error"]["decode"]["mean"] < 0.2
    profile = load_profile(str(path))
    assert (profile.kv_blocks, profile.max_num_batched_tokens) == (found["kv_blocks"], 512)
    assert "against the measured profile llama-3.1-8b_a100_tp1" in call(*arguments, "--overwrite").output


def test_roofline_takes_shapes_from_files_and_suggests_names(tmp_path: Path) -> None:
    shape, path = tmp_path / "shape.yaml", tmp_path / "mine.yaml"
    shape.write_text(json.dumps(MODELS["mistral-7b"].model_dump() | {"name": "mine", "layers": 16}))
    found = parsed(call("roofline", "--model", shape, "--gpu", "H100", "--out", path, "--json"))
    assert isinstance(found, dict)
    assert found["error"] == {}
    assert load_profile(str(path)).name == "mine_h100_tp1_roofline"
    refused = call("roofline", "--model", "llama-3.1-8", "--gpu", "A100")
    assert isinstance(refused.exception, UnknownNameError)
    assert "did you mean 'llama-3.1-8b'" in str(refused.exception)
