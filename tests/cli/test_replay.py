"""``rl-autoscale replay`` as a user types it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from rl_autoscale.cli import root
from rl_autoscale.cli.replay import parse_duration_s, parse_moment
from rl_autoscale.experiments.replay import choose_policies, read_fleet, replay, thinned
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.readers import read_trace

FLEET = {
    "pools": [{"name": "a100", "profile": "llama-3.1-8b_a100_tp1", "max_replicas": 6, "initial_replicas": 2}],
    "classes": [{"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(FLEET))
    rows = [f"{60 * k},{300 + 100 * (k % 3)},{300_000},{60_000}" for k in range(8) if k != 5]
    (tmp_path / "week.csv").write_text("time,arrivals,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    return tmp_path


@pytest.fixture
def run(here, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            root.main(["replay", *map(str, arguments)])
        shown = capsys.readouterr()
        return int(leaving.value.code or 0), shown.out, " ".join(shown.err.split())

    return run


def test_a_week_of_counts(run, here) -> None:
    code, out, err = run(
        "--csv", "week.csv", "--fleet", "fleet.yaml", "--policies", "static,hpa", "--knob", "static.replicas=3",
        "--refusal", "both", "--write-trace", "kept.csv", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "no data in 1 of 8 buckets" in err
    found = json.loads(out)
    assert found["traffic"]["span_s"] == 7 * 60
    rows = {(row["policy"], row["refusal"]): row for row in found["policies"]}
    assert set(rows) == {("static", "off"), ("static", "on"), ("hpa", "off"), ("hpa", "on")}
    static = rows["static", "off"]
    assert static["knobs"] == {"replicas": "3.0"}
    assert static["metrics"]["gpu_hours"] == pytest.approx(3 * 7 / 60, rel=0.2)
    assert static["num_missed"] == round(static["metrics"]["num_arrived"] * (1 - static["metrics"]["slo_attainment"]))
    assert sum(static["outcomes"].values()) == found["traffic"]["num_requests"]
    assert read_trace(here / "kept.csv").workload.num_requests == found["traffic"]["num_requests"]
    assert (here / "replay.png").stat().st_size > 10_000


def test_a_table_for_people(run) -> None:
    code, out, err = run("--csv", "week.csv", "--fleet", "fleet.yaml", "--policies", "headroom")
    assert code == 0, err
    assert "SLO met" in out
    assert "wrote replay.png" in out


def test_single_requests_on_a_scenario(run, here, tiny_scenario) -> None:
    (here / "own.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + "0.5,100,20\n" * 30)
    code, out, err = run("--csv", "own.csv", "--scenario", tiny_scenario, "--policies", "oracle", "--json")
    assert code == 0, err
    assert json.loads(out)["policies"][0]["metrics"]["num_arrived"] == 30


MISTAKES = {
    "no source": (["--fleet", "fleet.yaml"], "either --prometheus URL or --csv FILE"),
    "no fleet": (["--csv", "week.csv"], "either --scenario NAME or --fleet FILE"),
    "gaps": (["--csv", "week.csv", "--fleet", "fleet.yaml", "--gaps", "zero"], "cut, error, fill"),
    "policy": (["--csv", "week.csv", "--fleet", "fleet.yaml", "--policies", "hpaa"], "did you mean 'hpa'"),
    "tuned": (["--csv", "week.csv", "--fleet", "fleet.yaml", "--policies", "hpa-tuned"], "--knob hpa.NAME"),
    "knob": (["--csv", "week.csv", "--fleet", "fleet.yaml", "--knob", "target=3"], "POLICY.NAME=VALUE"),
    "class": (["--csv", "week.csv", "--fleet", "fleet.yaml", "--class", "chap"], "did you mean 'chat'"),
    "file": (["--csv", "weak.csv", "--fleet", "fleet.yaml"], "no such file"),
    "time": (["--prometheus", "http://127.0.0.1:9", "--fleet", "fleet.yaml", "--from", "monday"], "is not a time"),
    "nobody": (["--prometheus", "http://127.0.0.1:9", "--fleet", "fleet.yaml"], "check --prometheus"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_take_one_line(run, name) -> None:
    arguments, reason = MISTAKES[name]
    code, _, err = run(*arguments)
    assert code == 2
    assert reason in err


def test_classes_of_the_data_must_be_the_fleets(run, here) -> None:
    two = {**FLEET, "classes": [FLEET["classes"][0], {**FLEET["classes"][0], "name": "code"}]}
    (here / "two.yaml").write_text(yaml.safe_dump({"fleet": two}))
    code, _, err = run("--csv", "week.csv", "--fleet", "two.yaml", "--policies", "hpa")
    assert (code, "say which it is with --class" in err) == (2, True)


def test_every_policy_meets_the_same_traffic_and_a_timeline_thins_without_losing_a_miss(here) -> None:
    (here / "own.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{k / 20},1500,300\n" for k in range(6000))
    )
    workload = read_trace(here / "own.csv").workload
    fleet = read_fleet(here / "fleet.yaml")
    from rl_autoscale.experiments.replay import fit_classes

    workload = fit_classes(workload, fleet.fleet, None)
    told = []
    outcomes = replay(
        fleet, workload, choose_policies(["static", "headroom"]), progress=lambda *what: told.append(what)
    )
    assert [item.result.num_arrived for item in outcomes] == [6000, 6000]
    assert told[0][:2] == (0, "static")
    assert told[-1][:2] == (1, "headroom")
    for outcome in outcomes:
        assert outcome.worst_hour(10.0).num_missed == outcome.num_missed  # all within one hour
        whole = outcome.result.timeline
        thin = thinned(whole, np.inf, 7)
        assert len(thin["time_s"]) <= 7
        assert thin["missed"].sum() == whole["missed"].sum() == outcome.num_missed
    assert outcomes[0].num_missed > 0  # else the test above shows nothing


@pytest.mark.parametrize(
    ("text", "expected"),
    [("now", 1e9), ("now-2h", 1e9 - 7200), ("5", 5.0), ("1970-01-02", 86400.0), ("1970-01-01T01:00+01:00", 0.0)],
)
def test_moments(text, expected) -> None:
    assert parse_moment(text, 1e9) == expected


@pytest.mark.parametrize("text", ["", "0", "-5m", "5y", "m"])
def test_lengths_of_time_that_are_none(text) -> None:
    with pytest.raises(SpecError, match="is not a length of time"):
        parse_duration_s(text)
