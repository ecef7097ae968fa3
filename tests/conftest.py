"""Fixtures every test may use, and how hypothesis runs.

Real data is never in the repository. The fixtures below find it through an environment variable or in a folder
beside the checkout, and skip with a reason where there is none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
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


TINY: dict[str, Any] = {
    "name": "tiny",
    "description": "Two minutes of Poisson arrivals on up to six replicas.",
    "fleet": {
        "pools": [
            {"name": "a100", "profile": "llama-3.1-8b_a100_tp1", "max_replicas": 6, "initial_replicas": 2},
        ],
        "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}],
    },
    "episode_s": 60,
    "train": [
        {
            "name": "poisson",
            "workload": {
                "streams": [
                    {"generator": {"kind": "poisson", "rate_per_s": {"low": 5, "high": 15}}, "lengths": "azure_conv"}
                ]
            },
        }
    ],
    "test": {
        "span_s": 120,
        "streams": [{"generator": {"kind": "poisson", "rate_per_s": 12}, "lengths": "azure_conv"}],
    },
    "train_randomisation": {"speed": {"low": 0.8, "high": 1.25}, "startup_scale": {"low": 0.5, "high": 2}},
}


@pytest.fixture
def tiny_scenario(tmp_path: Path) -> Path:
    """YAML file of a scenario that runs in milliseconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def tiny_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An exported policy that does nothing, in the place of the shipped ones: ``pretrained/tiny``."""
    pytest.importorskip("onnx")
    from rl_autoscale.agents import pretrained
    from rl_autoscale.agents.export import export_policy
    from rl_autoscale.envs.scenario import load_scenario
    from rl_autoscale.envs.schema import Schema

    schema = Schema.of(load_scenario("azure-conversation").fleet)
    num_actions, num_features = len(schema.actions), len(schema.features)
    layers = [(np.zeros((num_actions, num_features), np.float32), np.zeros(num_actions, np.float32))]
    folder = tmp_path / "shipped" / "tiny"
    training = {"scenarios": ["azure-conversation"], "timesteps": 1000}
    dial = [{"miss_price": 2.0, "slo_attainment": 0.9}, {"miss_price": 20.0, "slo_attainment": 0.99}]
    export_policy(layers, schema, folder, refuse=True, training=training, dial=dial)
    monkeypatch.setattr(pretrained, "shipped_folder", lambda: folder.parent)
    return folder
