"""Rows with a known answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rl_autoscale.experiments.rows import Row


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
