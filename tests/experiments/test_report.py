"""Reports from rows with a known answer: wins and losses are told as they are, in every form."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rl_autoscale.experiments.analysis import analyse, operating_point
from rl_autoscale.experiments.report import render_markdown, write_report
from rl_autoscale.experiments.rows import ROWS_FILE, Row
from rl_autoscale.experiments.tables import all_tables, comparison_table, usage_table, verdicts
from rl_autoscale.fleet.errors import SpecError

MakeRows = Callable[..., list[Row]]


def test_findings_know_who_is_cheaper(make_rows: MakeRows) -> None:
    one = analyse(make_rows({"learned": 0.9, "hpa-tuned": 1.0, "headroom-tuned": 0.8, "oracle": 0.7}))[0]
    assert one.focal is not None
    assert one.focal.policy == "learned"
    against = {item.other.policy: [item.verdict(k) for k in range(4)] for item in one.comparisons}
    assert against["hpa-tuned"] == ["wins"] * 4
    assert against["headroom-tuned"] == ["loses"] * 4
    cheapest = one.cheapest_rule(1)
    assert cheapest is not None
    assert cheapest.policy == "headroom-tuned"  # the oracle and the learned policy are no rules
    np.testing.assert_allclose(one.gap_closed, -1.0, atol=0.1)  # 0.9 lies one gap behind 0.8 on the way to 0.7
    assert verdicts([one]) == (4, 4, 0)


def test_without_a_learned_policy_the_best_rule_is_compared(make_rows: MakeRows) -> None:
    one = analyse(make_rows({"hpa": 1.0, "headroom": 0.9}))[0]
    assert one.focal is not None
    assert one.focal.policy == "headroom"


def test_a_policy_that_never_gets_there_is_said_so(make_rows: MakeRows) -> None:
    rows = make_rows({"learned": 0.9})
    weak = [row for row in make_rows({"hpa": 1.0}) if row.slo_attainment < 0.95]
    text = render_markdown(analyse(rows + weak), {}, None)
    assert "hpa: not reached" in text
    assert "not reached" in text.split("### GPU-hours at equal attainment")[1]


def test_knob_values_that_lack_a_seed_are_left_out(make_rows: MakeRows) -> None:
    rows = [row for row in make_rows({"hpa": 1.0}) if row.key != "hpa/3/2"]
    assert analyse(rows)[0].entries[0].settings == ((None, 0.0), (None, 1.0), (None, 3.0))


def test_losses_are_bold_and_wins_are_not(make_rows: MakeRows) -> None:
    table = comparison_table(analyse(make_rows({"learned": 0.9, "hpa": 1.0, "headroom": 0.8}))[0])
    assert table is not None
    cells = {row[0].text: row[2] for row in table.rows}
    assert (cells["headroom"].strong, cells["headroom"].tone) == (True, "loss")
    assert (cells["hpa"].strong, cells["hpa"].tone) == (False, "win")
    assert cells["hpa"].text.startswith("-10")
    assert "**+12" in table.markdown()


def test_deployed_policies_are_listed_in_order_whatever_order_their_episodes_ended_in(make_rows: MakeRows) -> None:
    rows = make_rows({"learned": 0.9, "hpa": 1.0})
    asked = [
        replace(row, key=f"{row.key}/{refusal}/{target}", refusal=refusal, asked_attainment=target)
        for refusal, target in (("on", 0.98), ("off", 0.99), ("off", 0.9), ("on", 0.95))
        for row in rows
        if row.knob_value == 0.0
    ]
    found = [(item.policy, item.refusal, item.asked_attainment) for item in analyse(rows + asked)[0].deployed]
    assert len(found) == 8
    assert found == sorted(found)


def test_operating_point_is_the_cheapest_that_attains(make_rows: MakeRows) -> None:
    entry = analyse(make_rows({"hpa": 1.0}))[0].entries[0]
    assert operating_point(entry, 0.95) == 2
    assert operating_point(entry, 0.999) == 3


def test_usage_is_told_at_the_operating_point_and_of_the_worst_class(make_rows: MakeRows) -> None:
    rows = make_rows({"hpa": 1.0, "keda": 1.1})
    assert usage_table(analyse(rows)[0]) is None  # rows from before these were measured
    names = ("gpu_efficiency", "over_provisioned", "under_provisioned", "scale_ups", "scale_downs", "reversals")
    measured = [
        replace(
            row,
            metrics={"gpu_utilisation": (row.knob_value or 0.0) / 10 + row.seed / 100, **dict.fromkeys(names, 2.0)}
            | {"qoe/chat": 0.9, "qoe/code": 0.8, "qoe/jobs": np.nan, "hol_blocking_s/chat": 0.5},
        )
        for row in rows
        if row.policy == "hpa"
    ]
    table = usage_table(analyse(measured + [row for row in rows if row.policy == "keda"])[0])
    assert table is not None
    assert [cell.text for cell in table.rows[0]] == [
        *("hpa", "on", "99.5%", "32%", "200%", "2.00 ×", "2.00 ×", "0.800", "0.500", "4", "2"),
    ]
    assert len(table.rows) == 1


class _Checker(HTMLParser):
    """Collects tags and refuses anything that would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        if tag not in ("img", "meta"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith("data:")
                self.images.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_write_report_leaves_one_self_contained_page_and_its_tables(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows({"learned": 0.9, "chiron-tuned": 1.0, "oracle": 0.7})
    (tmp_path / ROWS_FILE).write_text("".join(row.to_json() + "\n" for row in rows))
    cards = {"made-up": {"description": "A <made-up> scenario.", "notes": ["a stand-in was used"]}}
    (tmp_path / "workloads.json").write_text(json.dumps(cards))
    report = write_report(tmp_path, extra_notes=["trained for 3 minutes"])
    page = report.html.read_text()
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.images) == 1  # no time line: the scenario cannot be found again
    for needed in (
        "our rebuild of Chiron",
        "A &lt;made-up&gt; scenario.",
        "a stand-in was used",
        "trained for 3 minutes",
    ):
        assert needed in page
    assert (tmp_path / "front-made-up.png").stat().st_size > 10_000
    lines = list(csv.DictReader((tmp_path / "tables.csv").read_text().splitlines()))
    assert len(lines) == 3 * 4
    assert float(next(line for line in lines if line["policy"] == "learned")["gpu_hours"]) > 0
    data = json.loads((tmp_path / "tables.json").read_text())
    assert data[0]["focal"] == {"policy": "learned", "refusal": "on"}
    assert len(all_tables(report.findings[0])) == 2


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="holds no benchmark results; run 'rl-autoscale benchmark"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
