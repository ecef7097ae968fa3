"""What is shipped, and what importing it costs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TRAINING = {"rl_autoscale.agents.ppo", "rl_autoscale.agents.sb3_fleets"}
"""The only modules that may import torch."""

CORE = ("fleet", "workload", "sim", "envs", "agents")
EXTRAS = ("torch", "stable_baselines3", "onnx", "wandb", "tensorboard", "pyarrow", "ray", "kubernetes")


def module_names(package: Path) -> list[str]:
    """Dotted names of the core's modules."""
    files = (path for part in CORE for path in sorted((package / part).rglob("*.py")))
    dotted = (".".join(path.relative_to(package.parent).with_suffix("").parts) for path in files)
    names = (name.removesuffix(".__init__") for name in dotted)
    return [name for name in names if name not in TRAINING]


def test_the_core_imports_without_any_extra(repository: Path) -> None:
    names = module_names(repository / "rl_autoscale")
    assert "rl_autoscale.fleet.spec" in names
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(*[name for name in {EXTRAS!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="the build backend is not installed")
def test_the_wheel_holds_every_file_of_the_package(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(repository)], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("rl_autoscale-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    suffixes = {".py", ".typed", ".yaml", ".json", ".html", ".onnx", ".md", ".png"}
    package = repository / "rl_autoscale"
    expected = {str(path.relative_to(repository)) for path in package.rglob("*") if path.suffix in suffixes}
    assert expected <= shipped
    assert any(name.startswith("rl_autoscale/profiles/") and name.endswith(".yaml") for name in shipped)
    assert not any(name.startswith(("tests/", "runs/")) for name in shipped)
