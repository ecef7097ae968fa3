"""A real Ray cluster on this machine: run by ``make test-ray``, in a network namespace with loopback only."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
from pathlib import Path
from typing import Any

import pytest

from rl_autoscale.experiments.benchmark import run_benchmark
from rl_autoscale.experiments.grid import BenchmarkConfig, parse_policies
from rl_autoscale.experiments.ray_workers import RayCluster
from rl_autoscale.experiments.rows import Row
from rl_autoscale.fleet.errors import SpecError

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def ray_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where nobody else can reach Ray's ports."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs the 'ray' extra, in an environment of its own: make test-ray")
    if [name for _, name in socket.if_nameindex() if name != "lo"]:
        pytest.skip("Ray listens on every address: run it where there is only loopback, as make test-ray does")
    repository = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository), str(repository / "tests")]))


def local_cluster() -> RayCluster:
    """Ray gives its daemons 30 s to start, which a busy machine may not manage at once."""
    for _ in range(4):
        try:
            return RayCluster("local")
        except SpecError as error:
            print(error)
    return RayCluster("local")


def results(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [(row.key, row.gpu_hours, row.slo_attainment, row.knobs) for row in rows]


def test_ray_gives_the_rows_of_the_local_pool(ray_allowed: None, tiny_scenario: Path, tmp_path: Path) -> None:
    sweeps = [sweep.model_dump() for sweep in parse_policies(["headroom-tuned", "hpa", "oracle"])]
    sizes = {"num_seeds": 2, "max_knob_values": 3, "refinements": 1, "tune_episodes": 8, "tune_seeds": 2}
    chosen = BenchmarkConfig.from_dict({"scenarios": [str(tiny_scenario)], "policies": sweeps, **sizes})
    local = run_benchmark(chosen, tmp_path / "local", num_processes=2)
    with local_cluster() as cluster:
        rows = run_benchmark(chosen, tmp_path / "ray", ray=cluster)
    assert len(rows) > 30
    assert results(rows) == results(local)


def test_a_mistake_on_a_node_is_told_here(ray_allowed: None, tiny_scenario: Path, tmp_path: Path) -> None:
    sweeps = [sweep.model_dump() for sweep in parse_policies(["static"])]
    chosen = BenchmarkConfig.from_dict({"scenarios": [str(tiny_scenario)], "policies": sweeps, "span_s": 0.001})
    with local_cluster() as cluster, pytest.raises(SpecError):
        run_benchmark(chosen, tmp_path / "ray", ray=cluster)
