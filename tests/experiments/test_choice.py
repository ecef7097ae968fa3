"""What is deployed: the cheapest setting that delivers, the policy that deserves it, and nothing seen of the test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rl_autoscale.cli import root
from rl_autoscale.envs.scenario import load_scenario
from rl_autoscale.experiments.benchmark import run_benchmark, run_choice
from rl_autoscale.experiments.choice import (
    BEST,
    FIRST_SEED,
    FOLDER,
    MARGIN,
    Candidate,
    Choice,
    best_policy,
    best_setting,
    choice_split,
    choose,
    deployed,
    trial_config,
)
from rl_autoscale.experiments.grid import BenchmarkConfig, Cell, PolicySweep
from rl_autoscale.experiments.rows import ROWS_FILE, Row, read_rows
from rl_autoscale.experiments.suite_analysis import _focal
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.serving.config import PolicyChoice
from rl_autoscale.workload.store import TraceStore

TRAINED = PolicySweep(policy="learned", label="PPO", knobs={"path": "pretrained/single-pool"})


def candidate(attainment: float, hours: float, sweep: PolicySweep | str = "hpa") -> Candidate:
    chosen = sweep if isinstance(sweep, PolicySweep) else PolicySweep(policy=sweep)
    return Candidate(chosen, "on", "knob", hours, {"knob": hours}, attainment, hours)


def test_a_setting_is_the_cheapest_that_delivers() -> None:
    points = [candidate(0.95, 5.0), candidate(0.99, 9.0), candidate(0.985, 8.0), candidate(0.981, 8.5)]
    assert best_setting(points, 0.98).gpu_hours == 8.0
    assert best_setting(points, 0.90).gpu_hours == 5.0


def test_a_tenth_more_misses_than_allowed_is_what_a_few_episodes_cannot_tell() -> None:
    points = [candidate(0.9782, 7.0), candidate(0.9778, 6.0), candidate(0.981, 9.0)]
    assert best_setting(points, 0.98).gpu_hours == 7.0


def test_where_none_delivers_it_is_the_cheapest_that_misses_hardly_more_than_the_best() -> None:
    cheap, near, best = candidate(0.90, 5.0), candidate(0.956, 7.0), candidate(0.96, 12.0)
    assert best_setting([cheap, near, best], 0.98) is near
    assert best_setting([cheap, candidate(0.955, 7.0), best], 0.98) is best


def test_a_setting_that_aims_at_less_is_not_for_whoever_asks_for_more() -> None:
    fixed = candidate(0.96, 12.0)
    aims = [replace(candidate(0.957, hours), knobs={"attainment": aim}) for aim, hours in ((0.95, 9.0), (0.99, 11.0))]
    assert best_setting([fixed, *aims], 0.95) is aims[0]
    assert best_setting([fixed, *aims], 0.98) is aims[1]
    assert best_setting([aims[0]], 0.98) is aims[0]


@given(
    points=st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.1, 100.0)), min_size=1, max_size=12),
    asked=st.tuples(st.floats(0.5, 0.999), st.floats(0.5, 0.999)),
)
def test_whoever_asks_for_more_never_gets_a_cheaper_setting(
    points: list[tuple[float, float]], asked: tuple[float, float]
) -> None:
    candidates = [candidate(*point) for point in points]
    less, more = sorted(asked)
    assert best_setting(candidates, less).gpu_hours <= best_setting(candidates, more).gpu_hours


@pytest.mark.parametrize(
    ("rule", "label"),
    [
        (candidate(0.98, 10.0 * (1 - MARGIN) + 0.01), "PPO"),  # cheaper, but not by enough
        (candidate(0.98, 10.0 * (1 - MARGIN) - 0.01), "rule"),
        (candidate(0.97, 9.0), "PPO"),  # a point short weighs more than a tenth of the bill
        (candidate(0.99, 9.0), "rule"),
        (candidate(0.999, 5.0, "static"), "PPO"),  # follows no traffic
        (candidate(0.999, 5.0, "oracle"), "PPO"),  # sees the future
    ],
)
def test_the_trained_policy_stays_unless_a_rule_is_better_by_more_than_the_margin(rule: Candidate, label: str) -> None:
    assert best_policy({"PPO": candidate(0.98, 10.0, TRAINED), "rule": rule}, 0.98) == label


def test_a_rule_that_delivers_beats_a_trained_policy_that_falls_far_short() -> None:
    assert best_policy({"PPO": candidate(0.90, 10.0, TRAINED), "rule": candidate(0.98, 20.0)}, 0.98) == "rule"
    assert best_policy({"PPO": candidate(0.97, 10.0, TRAINED), "rule": candidate(0.98, 20.0)}, 0.98) == "PPO"


def test_among_rules_alone_the_margin_favours_nobody_and_without_any_there_is_no_choice() -> None:
    assert best_policy({"a": candidate(0.98, 10.0), "b": candidate(0.98, 9.9)}, 0.98) == "b"
    assert best_policy({"static": candidate(0.99, 1.0, "static")}, 0.98) is None


def row_of(cell: Cell, attainment: float, hours: float) -> Row:
    place = (cell.scenario, cell.sweep.name, cell.sweep.registered, cell.knob, cell.knob_value, cell.refusal, cell.seed)
    return Row(f"{cell}", *place, hours, attainment, cell.asked_attainment, cell.knobs)


def test_settings_are_means_over_seeds_and_scenarios_are_chosen_for_apart() -> None:
    sweep, runs = PolicySweep(policy="hpa"), []
    for scenario, scale in (("calm", 1.0), ("wild", 3.0)):
        for seed, noise in ((FIRST_SEED, 0.02), (FIRST_SEED + 1, -0.02)):
            for target, attainment in ((10.0, 0.99), (50.0, 0.96)):
                cell = Cell(scenario, seed, sweep, "on", "target", target, {"target": target}, split="validation")
                runs.append((cell, row_of(cell, attainment + noise / scale, scale * 100.0 / target)))
    found = choose(runs, [0.95, 0.98])
    assert [(one.scenario, one.asked, one.settings["hpa"].knob_value) for one in found] == [
        ("calm", 0.95, 50.0), ("calm", 0.98, 10.0), ("wild", 0.95, 50.0), ("wild", 0.98, 10.0),
    ]  # fmt: skip
    assert found[3].settings["hpa"].gpu_hours == pytest.approx(30.0)
    assert {one.best for one in found} == {"hpa"}


def config(tiny: Path, **changes: Any) -> BenchmarkConfig:
    given = {
        "scenarios": [str(tiny)], "policies": [{"policy": "headroom"}, {"policy": "hpa"}, {"policy": "static"}],
        "num_seeds": 2, "max_knob_values": 2, "refinements": 0, "refusal": ["on"], "asked": [0.9],
        "chosen_on": "history", "choice_seeds": 2,
    }  # fmt: skip
    return BenchmarkConfig.from_dict(given | changes)


def test_what_history_chose_is_deployed_on_the_test_and_stands_beside_the_sweeps(
    tiny_scenario: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    rows = run_benchmark(config(tiny_scenario), out)
    tried = read_rows(out / FOLDER / ROWS_FILE)
    assert {row.seed for row in tried} == {FIRST_SEED, FIRST_SEED + 1}
    assert {row.seed for row in rows} == {0, 1}
    chosen = {item["policy"]: item for item in json.loads((out / "chosen.json").read_text())}
    assert set(chosen) == {"headroom", "hpa", "static"}
    live = [row for row in rows if row.asked_attainment is not None]
    assert {row.policy for row in live} == {*chosen, BEST}
    best = next(item for item in chosen.values() if item["best"])
    assert best["registered"] != "static"
    for row in live:
        expected = best if row.policy == BEST else chosen[row.policy]
        assert (row.registered, row.knobs) == (expected["registered"], expected["knobs"])
    again = run_benchmark(config(tiny_scenario), out)
    assert [row.key for row in again] == [row.key for row in rows]


def test_constants_are_searched_for_each_attainment_and_chosen_among_with_the_knob(
    tiny_scenario: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    policies, asked = [{"policy": "headroom-tuned", "values": [0.6, 4.0]}], [0.5, 0.9, 0.99]
    changes = {"tune_episodes": 4, "tune_seeds": 2, "tune_episode_s": 60.0}
    run_benchmark(config(tiny_scenario, policies=policies, asked=asked, **changes), out)
    (searched,) = json.loads((out / "tuning.json").read_text()).values()
    chosen = json.loads((out / "chosen.json").read_text())
    assert [item["asked_attainment"] for item in searched] == [0.98, *asked]
    assert [item["asked_attainment"] for item in chosen] == asked
    assert all(item["knobs"]["least_replicas"] >= 1 for item in searched)  # of a fleet of one pool

    def constants(item: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in item["knobs"].items() if name != "headroom"}

    assert all(constants(item) in [constants(one) for one in searched] for item in chosen)
    assert chosen[0]["knobs"]["headroom"] <= chosen[-1]["knobs"]["headroom"]


def test_choosing_alone_plays_no_test_traffic_and_a_benchmark_goes_on_from_it(
    tiny_scenario: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    [choice] = run_choice(config(tiny_scenario), out)
    assert not (out / ROWS_FILE).exists()
    before = (out / FOLDER / ROWS_FILE).read_text()
    rows = run_benchmark(config(tiny_scenario), out)
    assert (out / FOLDER / ROWS_FILE).read_text() == before
    assert {row.registered for row in rows if row.policy == BEST} == {choice.best}


def test_chosen_on_history_else_on_validation_else_on_training_traffic() -> None:
    chatbot = load_scenario("chatbot")
    assert choice_split(chatbot, "history") == "history"
    assert choice_split(chatbot, "validation") == "validation"
    whole = tuple(item.model_copy(update={"slice_s": None}) for item in chatbot.test.streams)
    from_the_start = chatbot.model_copy(update={"test": chatbot.test.model_copy(update={"streams": whole})})
    assert choice_split(from_the_start, "history") == "validation"
    with pytest.raises(SpecError, match="has no history: its test traffic is a trace from its first second on"):
        from_the_start.build_history(0, TraceStore())
    traced = tuple(source for source in chatbot.train if source not in chatbot.validation_sources)
    assert traced
    assert choice_split(from_the_start.model_copy(update={"train": traced}), "history") == "train"


def test_a_trained_policy_is_tried_as_asked_and_a_little_above(tiny_scenario: Path) -> None:
    trial = trial_config(config(tiny_scenario, asked=[0.9, 0.98]))
    assert trial.asked == (0.9, 0.94, 0.98, 0.988)
    assert trial.targets == (0.9, 0.98)


def test_nothing_to_choose_for_is_refused(tiny_scenario: Path) -> None:
    with pytest.raises(SpecError, match="chosen_on needs the attainments to choose for"):
        config(tiny_scenario, asked=None)


def test_the_choice_is_never_the_policy_that_others_are_compared_with() -> None:
    runs = {(BEST, "on"): ("learned", ()), ("PPO", "on"): ("learned", ()), ("hpa", "on"): ("hpa", ())}
    assert _focal(runs, 0.98) == ("PPO", "on")  # type: ignore[arg-type]


def test_deployed_cells_meet_the_test_with_the_seeds_of_the_benchmark(tiny_scenario: Path) -> None:
    chosen = config(tiny_scenario, first_seed=5)
    cell = Cell("s", FIRST_SEED, PolicySweep(policy="hpa"), "on", "target", 20.0, {"target": 20.0}, split="validation")
    cells = deployed(choose([(cell, row_of(cell, 0.95, 3.0))], (0.9,)), chosen)
    assert [(item.sweep.name, item.seed, item.split, item.asked_attainment) for item in cells] == [
        ("hpa", 5, "test", 0.9), (BEST, 5, "test", 0.9), ("hpa", 6, "test", 0.9), (BEST, 6, "test", 0.9),
    ]  # fmt: skip


SMALL = ["--policies", "headroom,hpa", "--attainment", "0.9", "--episodes", "2", "--knob-values", "2"]
SMALL += ["--refinements", "0", "--jobs", "1"]


def run(words: list[str]) -> int:
    with pytest.raises(SystemExit) as leaving:
        root.main(["choose", *words])
    return int(leaving.value.code or 0)


def test_the_command_writes_what_a_controller_reads(
    tiny_scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "chosen"
    assert run(["--scenario", str(tiny_scenario), *SMALL, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "asked for 90.0%" in shown.out
    assert "no trained policy among them" in " ".join(shown.err.split())
    written = PolicyChoice.from_dict(yaml.safe_load((out / "policy.yaml").read_text())["policy"], where="policy.yaml")
    best = next(item for item in json.loads((out / "chosen.json").read_text()) if item["best"])
    assert written.name == best["policy"]
    assert written.knobs == best["knobs"]


def test_without_refusal_what_is_written_is_strict_json() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    item = replace(candidate(0.98, 10.0, TRAINED), knobs={"path": "pretrained/single-pool", "admission": float("inf")})
    [record] = Choice("s", "off", 0.98, {"PPO": item}, "PPO").to_json()
    assert json.loads(json.dumps(record), parse_constant=refuse)["knobs"]["admission"] == "inf"


FLEET = {
    "pools": [{"name": "a100", "profile": "llama-3.1-8b_a100_tp1", "max_replicas": 6, "initial_replicas": 2}],
    "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}],
}


def test_recorded_requests_on_a_fleet_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet, trace, out = tmp_path / "fleet.yaml", tmp_path / "week.csv", tmp_path / "chosen"
    fleet.write_text(yaml.safe_dump(FLEET))
    rows = "".join(f"{k / 4},{200 + 50 * (k % 5)},{20 + k % 9}\n" for k in range(1200))
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    words = ["--trace", str(trace), "--fleet", str(fleet), *SMALL, "--span", "120", "--out", str(out), "--json"]
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert {item["policy"] for item in found} == {"headroom", "hpa"}
    recorded = load_scenario(out / "scenario.yaml")
    assert recorded.fleet.class_names == ("chat",)
    assert choice_split(recorded, "history") == "train"
    windows = {row.metrics["num_arrived"] for row in read_rows(out / FOLDER / ROWS_FILE)}
    assert all(400 < arrived < 500 for arrived in windows)  # 120 s of 4 requests a second
    before = (out / FOLDER / ROWS_FILE).read_text()
    assert run(words) == 0
    assert (out / FOLDER / ROWS_FILE).read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --scenario NAME, or --trace FILE and --fleet FILE"),
        (["--scenario", "bursty", "--trace", "x.csv", "--fleet", "fleet.yaml"], "either --scenario NAME"),
        (["--trace", "x.csv"], "either --scenario NAME"),
        (["--trace", "none.csv", "--fleet", "fleet.yaml"], "none.csv: no such file; rl-autoscale replay --write-trace"),
        (["--trace", "none.csv", "--fleet", "two.yaml"], "has the classes chat, jobs; which request is of which"),
    ],
)
def test_mistakes_of_the_command_are_told_in_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fleet.yaml").write_text(yaml.safe_dump(FLEET))
    jobs = {"name": "jobs", "kind": "batch", "ttft_slo_s": 600.0, "tpot_slo_s": 1.0}
    Path("two.yaml").write_text(yaml.safe_dump({**FLEET, "classes": [*FLEET["classes"], jobs]}))
    assert run(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()
