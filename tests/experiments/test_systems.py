"""Capacity by bisection, and the run that compares systems: bracketed, resumable, and the same requests for all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rl_autoscale.cli import root
from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.experiments import systems, systems_qoe
from rl_autoscale.experiments.capacity import Settings
from rl_autoscale.experiments.system_studies import STUDIES, least_gpu_s
from rl_autoscale.experiments.systems import (
    CAPACITY,
    SYSTEMS,
    Capacity,
    Load,
    capacity_of,
    draw_requests,
    largest_rate,
    replica_of,
)
from rl_autoscale.experiments.systems_qoe import QoeCurve, mean_qoe, qoe_curves, qoe_table
from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.workload.store import TraceStore

TINY = Settings(num_requests=60, seeds=1, tolerance=0.2)


@pytest.mark.parametrize("capacity", [0.03, 0.4, 1.0, 7.3, 900.0])
def test_bisection_finds_where_attainment_falls_below_the_target(capacity: float) -> None:
    asked = []

    def attainment(rate: float) -> float:
        asked.append(rate)
        return 0.95 if rate <= capacity else 0.4

    found = largest_rate(attainment, 0.9, 0.02)
    assert found <= capacity <= found * 1.02
    assert len(asked) < 25


def test_a_system_that_never_attains_has_no_capacity() -> None:
    assert largest_rate(lambda rate: 0.5, 0.9, 0.02) == 0.0


def test_all_systems_get_the_same_requests_and_gaps() -> None:
    scenario = load_scenario("tool-calls")
    one, other = (draw_requests(scenario, TraceStore(()), 100, seed=3) for _ in range(2))
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "class_index"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert np.diff(one.arrival_s).mean() == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("system", list(SYSTEMS.values()), ids=list(SYSTEMS))
def test_every_system_fits_every_scenario(system: systems.System) -> None:
    for name in systems.SCENARIOS:
        pool = system.pool(load_scenario(name))
        assert (pool.scheduler, pool.max_replicas) == (system.scheduler, 1)


@pytest.mark.parametrize("study", list(STUDIES.values()), ids=list(STUDIES))
def test_every_study_fits_every_scenario(study: systems.Study) -> None:
    for name in systems.SCENARIOS:
        for system in study.systems.values():
            system.pool(load_scenario(name))
    assert len({load.label("a") for load in study.loads}) == len(study.loads)


def test_bursty_gaps_have_the_variation_asked_for() -> None:
    scenario = load_scenario("tool-calls")
    poisson, bursty = (draw_requests(scenario, TraceStore(()), 20_000, 0, cv) for cv in (1.0, 3.0))
    for sample, cv in ((poisson, 1.0), (bursty, 3.0)):
        gaps_s = np.diff(sample.arrival_s)
        assert gaps_s.mean() == pytest.approx(1.0, abs=0.1)
        assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.1)
    np.testing.assert_array_equal(poisson.prompt_tokens[:100], bursty.prompt_tokens[:100])


def test_no_system_exceeds_the_bound() -> None:
    scenario, settings = load_scenario("tool-calls"), Settings(num_requests=300, seeds=1, tolerance=0.1)
    found = capacity_of(SYSTEMS["vllm"], scenario, TraceStore(()), settings)
    sample = draw_requests(scenario, TraceStore(()), settings.num_requests, 0)
    bound = settings.num_requests / least_gpu_s(scenario.fleet.pools[0].hardware, sample)
    assert 0.2 * bound < found.mean < bound


def test_loads_name_their_columns() -> None:
    assert Load().label("coder") == "coder"
    assert Load(2, 3.0, 0.5).label("coder") == "coder, 2 replicas, CV 3, TPOT × 0.5"


def test_capacity_of_two_replicas_is_per_gpu() -> None:
    scenario = load_scenario("tool-calls")
    one, two = (
        capacity_of(SYSTEMS["vllm"], scenario, TraceStore(()), TINY, Load(num_replicas)) for num_replicas in (1, 2)
    )
    assert two.mean == pytest.approx(one.mean, rel=0.5)


def test_capacity_is_a_rate_that_attains(monkeypatch: pytest.MonkeyPatch) -> None:
    found = capacity_of(SYSTEMS["vllm"], load_scenario("tool-calls"), TraceStore(()), TINY)
    assert 0.5 < found.mean < 50.0
    assert 0.0 < found.kv_waste < 0.1
    assert found.num_requests % TINY.num_requests == 0


def test_a_run_is_resumed_and_mixed_with_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(systems, "QUICK", TINY)
    page = tmp_path / "page.md"
    page.write_text("<!-- table: capacity --><!-- end --> and <!-- table: speed --><!-- end -->")
    line = ("compare-systems", "--quick", "--systems", "vllm", "--scenarios", "tool-calls", "--out", str(tmp_path))
    for more in (("--json",), ("--update", str(page))):
        with pytest.raises(SystemExit) as leaving:
            root.main((*line, *more))
        assert leaving.value.code in (0, None)
        monkeypatch.setattr(systems, "capacity_of", lambda *_: pytest.fail("what is known was looked for again"))
    shown, _, rest = capsys.readouterr().out.partition("\n}\n")
    known = json.loads((tmp_path / "quick" / "systems.json").read_text())["capacities"]
    assert json.loads(shown + "}") == known
    assert "tool-calls" in rest
    assert f"| vllm | **{known['tool-calls']['vllm']['per_gpu_s'][0]:.2f}** |" in page.read_text()
    with pytest.raises(SpecError, match="choose another --out"):
        systems.compare_systems(
            TraceStore(()), tmp_path / "quick", settings=systems.CAREFUL, progress=lambda what, done, total: None
        )


def test_qoe_falls_with_the_rate_and_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"vllm": Capacity((2.0,), 0.0, 0, 0.0), "andes": Capacity((2.5,), 0.0, 0, 0.0)}
    monkeypatch.setattr(systems_qoe, "LOADS", (0.5, 20.0))

    def measure() -> dict[str, QoeCurve]:
        return qoe_curves(
            TraceStore(()), tmp_path, "tool-calls", found, settings=TINY, progress=lambda what, done, total: None
        )

    curves = measure()
    for curve in curves.values():
        assert curve.rate_per_s == (1.0, 40.0)
        calm, crowded = curve.means
        assert 1.0 + 1e-9 > calm > 0.95 > crowded > 0.0
    monkeypatch.setattr(systems_qoe, "qoe_curve", lambda *_: pytest.fail("what is known was measured again"))
    assert measure() == curves
    shown = qoe_table("tool-calls", curves).markdown()
    assert f"{curves['andes'].means[1]:.3f}" in shown
    assert "| 40.00 |" in shown


def test_qoe_is_judged_by_each_class(tmp_path: Path) -> None:
    """The mean over requests of what `evaluate --detail` gives per class."""
    scenario = load_scenario("mixed-apps")
    replica = replica_of(SYSTEMS["vllm"], scenario, TraceStore(()), TINY, 0)
    requests = replica.serve(20.0)
    classes = [item for item in replica.batch.result(0).classes if item.num_arrived > 0]
    expected = sum(item.qoe * item.num_arrived for item in classes) / len(requests)
    assert mean_qoe(scenario.fleet.classes, requests) == pytest.approx(expected)
    assert min(item.qoe for item in classes) < 0.95


def test_an_unknown_system_is_named() -> None:
    with pytest.raises(UnknownNameError, match="sarathi"):
        systems.compare_systems(
            TraceStore(()),
            Path(),
            study=CAPACITY,
            systems=("sarati",),
            settings=TINY,
            progress=lambda what, done, total: None,
        )
