"""A cluster gives the rows that one process gives; what a node lacks is sent; other code is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_ray import FakeRay

from rl_autoscale.experiments import ray_workers
from rl_autoscale.experiments.benchmark import run_benchmark
from rl_autoscale.experiments.grid import BenchmarkConfig, parse_policies
from rl_autoscale.experiments.ray_workers import RayCluster
from rl_autoscale.experiments.rows import Row
from rl_autoscale.fleet.errors import MissingExtraError, SpecError


def config(tiny: Path, *policies: str) -> BenchmarkConfig:
    sweeps = [sweep.model_dump() for sweep in parse_policies(policies)]
    sizes = {"num_seeds": 2, "max_knob_values": 2, "refinements": 1, "tune_episodes": 4, "tune_seeds": 2, "span_s": 60}
    return BenchmarkConfig.from_dict({"scenarios": [str(tiny)], "policies": sweeps, "refusal": ["on"], **sizes})


def results(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [(row.key, row.gpu_hours, row.slo_attainment, row.knobs, row.metrics["reversals"]) for row in rows]


def test_a_cluster_gives_the_rows_of_one_process(tiny_scenario: Path, tiny_pretrained: Path, tmp_path: Path) -> None:
    chosen = config(tiny_scenario, "headroom-tuned", "oracle", "pretrained/tiny")
    alone = run_benchmark(chosen, tmp_path / "alone")
    fake = FakeRay()
    with RayCluster("cluster:6379", ray=fake) as cluster:
        together = run_benchmark(chosen, tmp_path / "cluster", ray=cluster)
        assert fake.is_up
    assert results(together) == results(alone)
    assert len(fake.used) == fake.killed == 2  # both workers worked, and are gone
    assert (fake.address, fake.is_up) == ("cluster:6379", False)


def test_traces_profiles_and_policies_travel(
    tiny_scenario: Path, tiny_pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node has neither the policy's folder nor the trace's file."""
    trace = tmp_path / "mine.csv"
    lines = [f"{0.5 * k},{100 + k},20" for k in range(60)]
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(lines) + "\n")
    data = yaml.safe_load(tiny_scenario.read_text()) | {"test": {"streams": [{"trace": str(trace), "class": "chat"}]}}
    tiny_scenario.write_text(yaml.safe_dump(data))
    chosen = config(tiny_scenario, str(tiny_pretrained))
    alone = run_benchmark(chosen, tmp_path / "alone")
    run_batch = ray_workers.run_batch

    def on_a_node(runner: Any, jobs: Any) -> Any:
        hidden = [path.rename(path.with_suffix(".hidden")) for path in (trace, tiny_pretrained / "policy.json")]
        try:
            return run_batch(runner, jobs)
        finally:
            for path, name in zip(hidden, (trace, tiny_pretrained / "policy.json"), strict=True):
                path.rename(name)

    monkeypatch.setattr(ray_workers, "run_batch", on_a_node)
    with RayCluster("auto", ray=FakeRay()) as cluster:
        assert results(run_benchmark(chosen, tmp_path / "cluster", ray=cluster)) == results(alone)


def test_other_code_on_a_node_is_refused(tiny_scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "other_code", lambda expected: f"a node has another version than {expected}")
    with RayCluster("auto", ray=FakeRay()) as cluster, pytest.raises(SpecError, match="a node has another version"):
        run_benchmark(config(tiny_scenario, "static"), tmp_path / "run", ray=cluster)


def test_a_cluster_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="--ray nowhere:1: no cluster there \\(nobody answers\\)"):
        RayCluster("nowhere:1", ray=FakeRay())

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(ray_workers.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"pip install '.\[ray\]'"):
        RayCluster("auto")


def test_local_asks_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    fake = FakeRay()
    monkeypatch.setattr(fake, "init", lambda **given: asked.update(given))
    RayCluster("local", ray=fake)
    assert asked["address"] is None
    assert asked["_node_ip_address"] == "127.0.0.1"
