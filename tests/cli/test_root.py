"""The root command: quick, lists everything, and turns mistakes into one line and an exit code."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer

from rl_autoscale import __version__
from rl_autoscale.cli import root
from rl_autoscale.fleet.errors import SpecError, UnknownNameError

HEAVY = ("numba", "torch", "gymnasium", "onnxruntime", "matplotlib", "scipy", "pyarrow")


def run(*arguments: str) -> int:
    """Exit code of one command line, 0 when the process would simply end."""
    with pytest.raises(SystemExit) as leaving:
        root.main(arguments)
    code = leaving.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def fake_command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An empty module in the place of `demo`; the test gives it `command` or `app`."""
    module = types.ModuleType("fake_demo")
    monkeypatch.setitem(sys.modules, "fake_demo", module)
    monkeypatch.setitem(root.COMMANDS, "demo", ("fake_demo", "A fake."))
    return module


def test_help_lists_every_command_and_leaves_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    expected = list(root.COMMANDS)
    assert {"demo", "train", "benchmark", "control"} <= set(expected)
    positions = [shown.find(f"│ {name} ") for name in expected]
    assert -1 not in positions
    assert positions == sorted(positions)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom rl_autoscale.cli import root\n"
        "try:\n    root.main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"rl-autoscale {__version__}\n"


def test_mistyped_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("benchmrk") == 2
    captured = capsys.readouterr()
    assert "Did you mean 'benchmark'?" in captured.err
    assert captured.out == ""


def test_function_module_becomes_a_command_with_its_options(
    fake_command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(num_seeds: int = 1) -> None:
        """What it does."""
        print(f"seeds {num_seeds}")

    fake_command.command = command  # type: ignore[attr-defined]
    assert run("demo", "--num-seeds", "3") == 0
    assert capsys.readouterr().out == "seeds 3\n"
    assert run("demo", "--help") == 0
    assert "What it does." in capsys.readouterr().out


def test_app_module_becomes_a_group_even_with_a_single_verb(
    fake_command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer(help="A group.")
    app.command("ls")(lambda: print("listed"))
    fake_command.app = app  # type: ignore[attr-defined]
    assert run("demo", "ls") == 0
    assert capsys.readouterr().out == "listed\n"


@pytest.mark.parametrize(
    "error",
    [
        SpecError("min_replicas=5 exceeds max_replicas=4; lower it"),
        UnknownNameError("policy", "ppi", ["ppo", "static"]),
    ],
)
def test_our_errors_are_one_line_on_stderr_and_exit_code_2(
    error: Exception, fake_command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    fake_command.command = command  # type: ignore[attr-defined]
    assert run("demo") == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\n"
    assert captured.out == ""


def test_an_interrupt_exits_with_130(fake_command: types.ModuleType) -> None:
    def command() -> None:
        raise KeyboardInterrupt

    fake_command.command = command  # type: ignore[attr-defined]
    assert run("demo") == 130


def test_a_bug_is_not_hidden(fake_command: types.ModuleType) -> None:
    def command() -> None:
        raise ZeroDivisionError("ours")

    fake_command.command = command  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError, match="ours"):
        root.main(["demo"])


@pytest.mark.parametrize("name", list(root.COMMANDS))
def test_every_command_loads_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    assert f"rl-autoscale {name}" in capsys.readouterr().out


def test_calibrate_looks_where_it_will_write_before_it_measures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("aiohttp")
    nobody = "http://127.0.0.1:9"
    assert run("calibrate", "--url", nobody, "--gpu", "H100", "--out", str(tmp_path / "missing" / "mine.yaml")) == 2
    assert "no folder that can be written to" in " ".join(capsys.readouterr().err.split())
