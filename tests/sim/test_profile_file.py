"""Writing profiles: what is written reads back the same, and nothing is half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import load_profile, shipped_profile_names
from rl_autoscale.sim.profile_file import write_profile


@pytest.mark.parametrize("name", shipped_profile_names())
def test_a_written_profile_reads_back_the_same(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    write_profile(profile, tmp_path / "copy.yaml")
    assert load_profile(str(tmp_path / "copy.yaml")) == profile
    assert [path.name for path in tmp_path.iterdir()] == ["copy.yaml"]


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    first, second = (load_profile(name) for name in shipped_profile_names()[:2])
    path = tmp_path / "profile.yaml"
    write_profile(first, path)
    with pytest.raises(SpecError, match="exists"):
        write_profile(second, path)
    assert load_profile(str(path)) == first
    write_profile(second, path, overwrite=True)
    assert load_profile(str(path)) == second


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere/profile.yaml: cannot be written \(No such file or directory\)"):
        write_profile(load_profile(shipped_profile_names()[0]), tmp_path / "nowhere" / "profile.yaml")


def test_a_failed_replace_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "profile.yaml").mkdir()
    with pytest.raises(SpecError, match="cannot be written"):
        write_profile(load_profile(shipped_profile_names()[0]), tmp_path / "profile.yaml", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.yaml"]
