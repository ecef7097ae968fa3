"""The benchmark resumes, reuses only what is unchanged, pairs its seeds, and refuses mistakes before it starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.experiments import benchmark, episodes
from rl_autoscale.experiments.benchmark import run_benchmark
from rl_autoscale.experiments.episodes import EpisodeJob, EpisodePool, EpisodeRunner, batches
from rl_autoscale.experiments.grid import BenchmarkConfig, parse_policies, refine, thin
from rl_autoscale.experiments.rows import ROWS_FILE, read_rows
from rl_autoscale.experiments.tuning import TuningResult
from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.workload.store import TraceStore


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[EpisodeJob]:
    """Every job that is really run."""
    ran: list[EpisodeJob] = []
    outcome = EpisodeRunner.outcome

    def counting(self: EpisodeRunner, job: EpisodeJob) -> Any:
        ran.append(job)
        return outcome(self, job)

    monkeypatch.setattr(episodes.EpisodeRunner, "outcome", counting)
    return ran


def config(tiny: Path, *policies: str, **changes: Any) -> BenchmarkConfig:
    sweeps = [sweep.model_dump() for sweep in parse_policies(policies or ("static", "headroom"))]
    given = {"scenarios": [str(tiny)], "policies": sweeps, "num_seeds": 2, "max_knob_values": 3, "refinements": 0}
    return BenchmarkConfig.from_dict(given | changes)


def test_runs_the_grid_and_a_second_call_runs_nothing(
    tiny_scenario: Path, tmp_path: Path, counted: list[EpisodeJob]
) -> None:
    out = tmp_path / "run"
    rows = run_benchmark(config(tiny_scenario), out)
    assert len(rows) == len(counted) == 2 * 3 * 2 * 2  # policies x knob values x refusal x seeds
    assert {(row.policy, row.refusal, row.seed) for row in rows} == {
        (p, r, s) for p in ("static", "headroom") for r in ("off", "on") for s in (0, 1)
    }
    assert all(row.gpu_hours > 0 and 0 <= row.slo_attainment <= 1 for row in rows)
    counted.clear()
    again = run_benchmark(config(tiny_scenario), out)
    assert counted == []
    assert [row.key for row in again] == [row.key for row in rows]


def test_an_interrupted_run_goes_on_and_gives_the_same_rows(
    tiny_scenario: Path, tmp_path: Path, counted: list[EpisodeJob]
) -> None:
    whole = run_benchmark(config(tiny_scenario), tmp_path / "whole")
    broken = tmp_path / "broken"

    def stop(what: str, done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_benchmark(config(tiny_scenario), broken, progress=stop)
    assert len(read_rows(broken / ROWS_FILE)) == 7
    counted.clear()
    resumed = run_benchmark(config(tiny_scenario), broken)
    assert len(counted) == len(whole) - 7
    assert [(row.key, row.gpu_hours, row.slo_attainment) for row in resumed] == [
        (row.key, row.gpu_hours, row.slo_attainment) for row in whole
    ]


def test_only_what_changed_runs_anew(tiny_scenario: Path, tmp_path: Path, counted: list[EpisodeJob]) -> None:
    out = tmp_path / "run"
    run_benchmark(config(tiny_scenario, "static"), out)
    counted.clear()
    run_benchmark(config(tiny_scenario, "static", num_seeds=3), out)
    assert {job.seed for job in counted} == {2}
    counted.clear()
    tiny_scenario.write_text(tiny_scenario.read_text().replace("ttft_slo_s: 1.0", "ttft_slo_s: 0.5"))
    rows = run_benchmark(config(tiny_scenario, "static"), out)
    assert len(counted) == len(rows)


def test_changed_code_runs_anew(
    tiny_scenario: Path, tmp_path: Path, counted: list[EpisodeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_benchmark(config(tiny_scenario, "static"), tmp_path / "run")
    counted.clear()
    monkeypatch.setattr(benchmark, "code_fingerprint", lambda: "other")
    assert len(run_benchmark(config(tiny_scenario, "static"), tmp_path / "run")) == len(counted) > 0


def test_a_rule_tuned_twice_keeps_what_was_found_for_each(
    tiny_scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(policy: str, *_: object, fixed: dict[str, float], targets: Sequence[float], **asked: float) -> object:
        headroom = 1.1 if fixed["admission"] == 1.0 else 3.3
        return [TuningResult(policy, {**fixed, "headroom": headroom}, one, 0.98, 1.0, 1, 1, 1.0) for one in targets]

    monkeypatch.setattr(benchmark, "tune_policy", found)
    twice = [
        {"policy": "headroom-tuned", "label": label, "knobs": {"admission": admission}}
        for label, admission in (("strict", 1.0), ("lax", 2.0))
    ]
    sizes = {"refusal": ["off"], "num_seeds": 1, "max_knob_values": 2, "refinements": 0, "span_s": 60.0}
    rows = run_benchmark(
        BenchmarkConfig.from_dict({"scenarios": [str(tiny_scenario)], "policies": twice, **sizes}), tmp_path / "run"
    )
    deployed = [(row.policy, row.knobs["headroom"]) for row in rows if row.asked_attainment is not None]
    assert deployed == [("strict", 1.1), ("lax", 3.3)]
    assert {(row.policy, row.knobs["admission"]) for row in rows} == {("strict", 1.0), ("lax", 2.0)}


def test_all_policies_of_a_seed_meet_the_same_traffic(tiny_scenario: Path, tmp_path: Path) -> None:
    rows = run_benchmark(config(tiny_scenario), tmp_path / "run")
    arrived = {seed: {row.metrics["num_arrived"] for row in rows if row.seed == seed} for seed in (0, 1)}
    assert all(len(counts) == 1 for counts in arrived.values())
    assert arrived[0] != arrived[1]


@pytest.mark.slow
def test_processes_give_the_same_rows_as_one(tiny_scenario: Path, tmp_path: Path) -> None:
    alone = run_benchmark(config(tiny_scenario), tmp_path / "one")
    together = run_benchmark(config(tiny_scenario), tmp_path / "two", num_processes=2)
    assert [(row.key, row.gpu_hours, row.slo_attainment) for row in alone] == [
        (row.key, row.gpu_hours, row.slo_attainment) for row in together
    ]


def test_refinement_adds_points_between_the_neighbours_of_a_target(tiny_scenario: Path, tmp_path: Path) -> None:
    chosen = config(tiny_scenario, "static", targets=[0.9], refusal=["off"], max_knob_values=None)
    chosen = chosen.model_copy(update={"policies": (chosen.policies[0].model_copy(update={"values": (1.0, 6.0)}),)})
    before = run_benchmark(chosen, tmp_path / "run")
    after = run_benchmark(chosen.model_copy(update={"refinements": 2}), tmp_path / "run")
    added = {row.knob_value for row in after} - {row.knob_value for row in before}
    assert added
    assert all(value is not None and 1 < value < 6 and value == int(value) for value in added)
    assert {row.seed for row in after if row.knob_value in added} == {0, 1}
    assert refine([], (0.9,)) == []


def test_tuned_variants_are_swept_and_run_as_deployed(tiny_scenario: Path, tmp_path: Path) -> None:
    chosen = config(tiny_scenario, "headroom-tuned", tune_episodes=6, tune_seeds=2, refusal=["on"])
    rows = run_benchmark(chosen, tmp_path / "run")
    assert {row.registered for row in rows} == {"headroom"}
    deployed = [row for row in rows if row.asked_attainment is not None]
    assert len(deployed) == 2
    assert {row.asked_attainment for row in deployed} == {0.98}
    constants = {row.knobs["up_time_constant_s"] for row in rows}
    assert len(constants) == 1  # swept and deployed points share the tuned constants
    assert all(row.knobs["admission"] == 1.0 for row in rows)


@pytest.mark.parametrize(
    ("policies", "error", "message"),
    [
        (("hpaa",), UnknownNameError, "unknown policy 'hpaa'; did you mean 'hpa'"),
        (("oracle-tuned",), SpecError, "cannot be tuned"),
        (("static", "static"), SpecError, "every policy label must differ; repeated: static"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    policies: tuple[str, ...], error: type[Exception], message: str, tiny_scenario: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run_benchmark(config(tiny_scenario, *policies), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_learned_policies_are_named_by_path(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    assert parse_policies([str(one)])[0].knobs == {"path": str(one)}
    assert parse_policies([f"learned={one}"])[0].name == "learned"
    both = parse_policies([f"learned={one}", f"learned={two}"])
    assert [sweep.name for sweep in both] == ["learned one", "learned two"]


def test_thin_keeps_both_ends() -> None:
    assert thin((1.0, 2.0, 3.0, 4.0, 5.0), 3) == (1.0, 3.0, 5.0)
    assert thin((1.0, 2.0), 8) == (1.0, 2.0)
    assert thin((1.0, 2.0), None) == (1.0, 2.0)


def test_batches_share_one_workload_and_keep_every_job() -> None:
    jobs = [EpisodeJob(f"{seed}/{k}", "tiny", "test", seed, "hpa") for seed in (0, 1) for k in range(8)]
    cut = batches(jobs)
    assert [job for batch in cut for job in batch] == jobs
    assert all(len({job.seed for job in batch}) == 1 and len(batch) <= episodes.JOBS_PER_BATCH for batch in cut)


def test_training_episodes_draw_capacity_error_and_startup(tiny_scenario: Path) -> None:
    scenario = load_scenario(tiny_scenario)
    runner = EpisodeRunner({"tiny": scenario}, TraceStore(download=False))
    job = EpisodeJob("x", "tiny", "train", 5, "headroom", {"headroom": 3.0}, 60.0)
    result = runner.result(job)
    plain = episodes.run_episode(
        scenario, runner.workload(job), episodes.policy_for("headroom", {"headroom": 3.0}, runner.workload(job)), seed=5
    )
    assert scenario.draw_randomisation(5) != (1.0, 1.0)
    assert result.classes[0].tpot_p50_s != plain.classes[0].tpot_p50_s


def test_a_failing_job_ends_the_run_with_its_message(tiny_scenario: Path) -> None:
    scenario = load_scenario(tiny_scenario)
    with EpisodePool({"tiny": scenario}) as pool, pytest.raises(SpecError, match="no knob 'nonsense'"):
        list(pool.run([EpisodeJob("x", "tiny", "test", 0, "hpa", {"nonsense": 1.0}, 30.0)]))
    assert np.isfinite(scenario.episode_s)


def test_the_tuning_budget_may_be_stated_in_simulated_hours(tiny_scenario: Path, tmp_path: Path) -> None:
    chosen = config(tiny_scenario, "headroom-tuned", tune_hours=0.15, tune_seeds=2, refusal=["on"])
    run_benchmark(chosen, tmp_path / "run")
    ((result,),) = json.loads((tmp_path / "run" / "tuning.json").read_text()).values()
    assert (result["num_episodes"], result["simulated_hours"]) == (8, pytest.approx(8 / 60))  # four whole candidates
    with pytest.raises(SpecError, match="as-trained needs a learned policy"):
        config(tiny_scenario, "headroom-tuned", tune_hours="as-trained")
