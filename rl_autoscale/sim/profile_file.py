"""Write a latency profile as the YAML that ``load_profile`` reads."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import yaml

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import LatencyProfile


def profile_to_yaml(profile: LatencyProfile) -> str:
    """The profile as YAML, fields in their order, lists on few lines."""
    text: str = yaml.safe_dump(
        profile.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=118, allow_unicode=True
    )
    return text


def write_profile(profile: LatencyProfile, path: Path, *, overwrite: bool = False) -> None:
    """Write a profile, whole or not at all.

    Raises:
        SpecError: the file exists and `overwrite` is false, or it cannot be written.
    """
    if path.exists() and not overwrite:
        raise SpecError(f"{path} exists; remove it, choose another --out or pass --overwrite")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise SpecError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(profile_to_yaml(profile))
        os.chmod(temporary, 0o644)  # mkstemp gives 0600; a profile is for everyone to read
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise SpecError(f"{path}: cannot be written ({error.strerror})") from None
