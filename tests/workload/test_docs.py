"""docs/workloads.md: its YAML builds, and its tables agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from rl_autoscale.workload import LoadedTrace, WorkloadSpec
from rl_autoscale.workload.catalog import KNOWN_TRACES
from rl_autoscale.workload.fitted import stand_in
from rl_autoscale.workload.generators import GENERATOR_KINDS
from rl_autoscale.workload.length_table import LENGTH_MODEL_NAMES, fit_distances, length_model


class StandIns:
    """Every trace is its stand-in."""

    def load_or_stand_in(self, name: str) -> LoadedTrace:
        return LoadedTrace(stand_in(name))


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "workloads.md").read_text(encoding="utf-8")


def test_every_yaml_block_builds(page: str) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 3
    kinds = set()
    for block in blocks:
        spec = WorkloadSpec.from_dict(yaml.safe_load(block))
        built = spec.build(np.random.default_rng(0), StandIns(), ("chat", "batch"))
        assert built.workload.num_requests > 0
        kinds |= {stream.generator.kind for stream in spec.streams if stream.generator is not None}
    assert kinds == set(GENERATOR_KINDS)


def test_every_name_is_listed(page: str) -> None:
    for name in LENGTH_MODEL_NAMES:
        prompt, output = fit_distances(name)
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {prompt:.3f} | {output:.3f} | {length_model(name).correlation:.2f} |".replace("-0.00", "0.00") in row
    for name in KNOWN_TRACES:
        assert f"`{name}`" in page or name.startswith("burstgpt")
