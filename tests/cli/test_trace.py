"""``rl-autoscale trace``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rl_autoscale.cli.trace import app
from rl_autoscale.fleet.errors import RlAutoscaleError, SpecError, TraceError, UnknownNameError
from rl_autoscale.workload import read_trace

FILE = "arrival_s,prompt_tokens,output_tokens,class\n0,10,1,chat\n1,20,2,batch\n2,30,3,chat\n3,40,4,chat\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one trace, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RL_AUTOSCALE_TRACES", raising=False)
    (tmp_path / "small.csv").write_text(FILE)
    return tmp_path


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(*arguments: str | Path) -> BaseException:
    """What the root command would print as one line."""
    result = call(*arguments)
    assert isinstance(result.exception, RlAutoscaleError), result.output
    assert result.stdout == ""
    return result.exception


def test_ls_lists_what_is_known_and_where(folder: Path) -> None:
    (folder / "mooncake_conversation.csv").write_text(FILE)
    rows = {row["name"]: row for row in json.loads(call("ls", "--json", "--traces", folder).stdout)}
    assert rows["mooncake_conversation"]["path"] == str(folder / "mooncake_conversation.csv")
    assert rows["azure2023_conv"]["path"] is None
    assert rows["azure2023_conv"]["fitted_stand_in"] is True
    assert "azure2023_code" in call("ls").stdout


def test_describe_gives_numbers_for_machines_and_tables_for_people(folder: Path) -> None:
    stats = json.loads(call("describe", folder / "small.csv", "--json").stdout)
    assert stats["num_requests"] == 4
    assert stats["classes"]["chat"]["num_requests"] == 3
    assert stats["num_bad_rows"] == 0
    text = call("describe", "small", "--traces", folder).stdout
    assert "mean rate" in text
    assert "batch output" in text


def test_convert_slices_scales_and_labels(folder: Path) -> None:
    out = folder / "out.parquet"
    result = call(
        "convert", folder / "small.csv", out, "--slice-s", "1", "4", "--rate-scale", "2", "--time-warp", "2",
        "--class", "all",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "6 requests over 6.0 s" in result.stderr
    workload = read_trace(out).workload
    assert workload.num_requests == 6
    assert workload.span_s == 6.0
    assert workload.class_names == ("all",)


def test_convert_does_not_overwrite_unless_told(folder: Path) -> None:
    out = folder / "out.csv"
    out.write_text("mine")
    assert isinstance(fails("convert", folder / "small.csv", out), SpecError)
    assert out.read_text() == "mine"
    assert call("convert", folder / "small.csv", out, "--force").exit_code == 0
    assert read_trace(out).workload.num_requests == 4


def test_bad_rows_stop_a_conversion_or_are_reported(folder: Path) -> None:
    bad, out = folder / "bad.csv", folder / "out.csv"
    bad.write_text(FILE + "4,50,0,chat\n")
    error = fails("convert", bad, out)
    assert isinstance(error, TraceError)
    assert f"{bad}:6: 0 output tokens" in str(error)
    assert not out.exists()
    result = call("convert", bad, out, "--on-bad-rows", "skip")
    assert result.exit_code == 0
    assert "1 of 5 rows were left out: bad.csv:6" in result.stderr
    assert read_trace(out).workload.num_requests == 4


def test_mistakes_leave_nothing_behind(folder: Path) -> None:
    out = folder / "out.csv"
    source = folder / "small.csv"
    assert "must satisfy" in str(fails("convert", source, out, "--slice-s", "0", "99"))
    assert "rate_scale=-1" in str(fails("convert", source, out, "--rate-scale", "-1"))
    assert "end the name in .csv or .parquet" in str(fails("convert", source, folder / "out.json"))
    assert "does not exist; create it first" in str(fails("convert", source, folder / "gone" / "out.csv"))
    assert "nothing is left" in str(fails("convert", source, out, "--slice-s", "0.5", "0.6"))
    assert sorted(path.name for path in folder.iterdir()) == ["small.csv"]


def test_unknown_names_are_corrected() -> None:
    error = fails("fetch", "azure2023_cnv")
    assert isinstance(error, UnknownNameError)
    assert "did you mean 'azure2023_conv'" in str(error)


def test_fetch_prints_where_a_trace_is(folder: Path) -> None:
    (folder / "azure2023_conv.csv").write_text(FILE)
    result = call("fetch", "azure2023_conv", "--traces", folder)
    assert result.stdout.strip() == str(folder / "azure2023_conv.csv")
    assert "CC-BY-4.0" in result.stderr


@pytest.mark.parametrize("command", ["ls", "fetch", "describe", "convert"])
def test_every_command_explains_itself(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "--traces" in result.stdout
    assert "Example" in result.stdout
