"""A run folder: what was asked, by which code, with which versions. Whoever finds the folder can do it again.

runs/<name>/config.yaml    the resolved configuration
runs/<name>/run.json       command, seed, git commit, versions, machine, start time
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

import rl_autoscale
from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import SpecError

PACKAGE_FOLDER = Path(rl_autoscale.__file__).parent
_VERSIONED = ("numpy", "numba", "scipy", "gymnasium", "onnxruntime", "stable-baselines3", "torch")
_DECIDING_PARTS = ("fleet", "workload", "sim", "envs", "agents", "profiles")
_DECIDING_FILES = ("experiments/episodes.py", "experiments/tuning.py", "experiments/search_spaces.py")


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Where a result comes from; ``git_commit`` is None outside a checkout, and ends in ``-dirty`` if changed."""

    command: str
    seed: int
    git_commit: str | None
    package_version: str
    code: str
    versions: dict[str, str]
    python: str
    machine: str
    num_cores: int
    started: str


def describe_run(seed: int, *, command: Sequence[str] | None = None) -> RunInfo:
    """Describe the process that is about to do a run.

    Args:
        seed: of the run.
        command: the command line; ``sys.argv`` by default.
    """
    words = list(sys.argv if command is None else command)
    if words:
        words[0] = Path(words[0]).name
    versions = {name: found for name in _VERSIONED if (found := _installed(name)) is not None}
    return RunInfo(
        command=" ".join(words),
        seed=seed,
        git_commit=git_commit(),
        package_version=rl_autoscale.__version__,
        code=code_fingerprint(),
        versions=versions,
        python=platform.python_version(),
        machine=platform.platform(terse=True),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def write_run(folder: Path, config: Config | Mapping[str, Any], info: RunInfo) -> None:
    """Create a run folder, or describe an existing one anew.

    Raises:
        SpecError: the folder cannot be made or written.
    """
    data = config.model_dump(mode="json") if isinstance(config, Config) else dict(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
        write_text(folder / "run.json", json.dumps(asdict(info), indent=2) + "\n")
    except OSError as error:
        raise SpecError(f"{folder}: cannot be written ({error}); choose another folder with --out") from None


def read_run(folder: Path) -> RunInfo | None:
    """What `write_run` wrote, or None where there is nothing readable."""
    try:
        return RunInfo(**json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def git_commit() -> str | None:
    """Commit of the checkout this package lies in, ``-dirty`` when tracked files differ; None outside a checkout."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(PACKAGE_FOLDER), *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # installed: a repository around the environment is not ours
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit


def code_fingerprint(folder: Path = PACKAGE_FOLDER) -> str:
    """Hash of every source file that can change an episode's result; results of other code are never reused."""
    digest = hashlib.sha256()
    of_parts = [path for part in _DECIDING_PARTS for path in sorted((folder / part).rglob("*"))]
    for path in (*of_parts, *(folder / name for name in _DECIDING_FILES)):
        if path.suffix in (".py", ".yaml") and path.exists():
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
