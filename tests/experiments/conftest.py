"""A scenario that runs in milliseconds, and rows with a known answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rl_autoscale.experiments.rows import Row

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
    """The scenario's YAML file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def make_rows() -> Callable[..., list[Row]]:
    """Rows of policies whose hours are ``scale`` times a common front, seeds differing in common noise."""

    def make(scales: dict[str, float], num_seeds: int = 5, scenario: str = "made-up") -> list[Row]:
        rng = np.random.default_rng(0)
        common = rng.lognormal(0.0, 0.1, num_seeds)
        rows = []
        for policy, scale in scales.items():
            own = 1.0 + 0.002 * rng.standard_normal((num_seeds, 4))
            for seed in range(num_seeds):
                for k, (attainment, hours) in enumerate([(0.85, 8.0), (0.93, 10.0), (0.97, 12.0), (0.995, 18.0)]):
                    rows.append(
                        Row(
                            key=f"{policy}/{seed}/{k}", scenario=scenario, policy=policy,
                            registered=policy.removesuffix("-tuned"), knob="knob", knob_value=float(k), refusal="on",
                            seed=seed, gpu_hours=float(scale * hours * common[seed] * own[seed, k]),
                            slo_attainment=attainment, metrics={"gpu_hours": 1.0},
                        )
                    )  # fmt: skip
        return rows

    return make
