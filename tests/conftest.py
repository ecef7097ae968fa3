"""Fixtures every test may use, and how hypothesis runs.

Real data is never in the repository. The fixtures below find it through an environment variable or in a folder
beside the checkout, and skip with a reason where there is none.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parent.parent

# A shared machine stalls: a deadline would fail tests for reasons that are not in the code. CI repeats its examples
# every time; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _real_data_folder(variable: str, beside_checkout: str) -> Path:
    """The folder named by an environment variable, else one beside the checkout, else skip."""
    named = os.environ.get(variable)
    folder = Path(named) if named else REPOSITORY.parent / beside_checkout
    if not folder.is_dir():
        pytest.skip(f"no real data: set {variable} to a folder that holds it (looked at {folder})")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_traces() -> Path:
    """Folder of public request traces, or a skip."""
    return _real_data_folder("RL_AUTOSCALE_TRACES", "shared/data/traces")


@pytest.fixture(scope="session")
def real_profiles() -> Path:
    """Folder of measured iteration times, or a skip."""
    return _real_data_folder("RL_AUTOSCALE_PROFILE_DATA", "shared/data/profiles")
