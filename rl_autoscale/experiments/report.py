"""From a benchmark's folder to ``report.html``, ``report.md``, figures, and the tables as CSV and JSON.

The HTML is one file: style inside, figures embedded, no script, nothing loaded from anywhere. The time line of two
policies is simulated anew on one seed (a row keeps only an episode's totals), at the cheapest knob value of each
that attains the chosen target.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from rich import box
from rich.table import Table as RichTable

from rl_autoscale.envs.scenario import Scenario, load_scenario
from rl_autoscale.experiments.analysis import Entry, Findings, analyse, operating_point
from rl_autoscale.experiments.episodes import EpisodeJob, EpisodeRunner
from rl_autoscale.experiments.grid import BenchmarkConfig
from rl_autoscale.experiments.report_data import as_data, plain, render_csv
from rl_autoscale.experiments.rows import ROWS_FILE, Row, read_rows
from rl_autoscale.experiments.runs import RunInfo, read_run, write_text
from rl_autoscale.experiments.statistics import MIN_SEEDS
from rl_autoscale.experiments.suite_analysis import Suite, analyse_suite
from rl_autoscale.experiments.suite_tables import suite_summary, suite_tables
from rl_autoscale.experiments.tables import Table, all_tables, verdicts
from rl_autoscale.experiments.tuning import describe_budgets
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.workload.store import TraceStore

TIMELINE_TARGET = 0.98
CHIRON_NOTE = (
    "Chiron's code is not public. Everything named chiron here is our rebuild of Chiron (arXiv 2501.08090) from the "
    "paper and from others' rebuilds: literal (steps of one, no smoothing), robust (straight to the target, dead band) "
    "and tuned (robust, constants searched on training traffic). Do not compare with the paper's own numbers."
)


@dataclass(frozen=True, slots=True)
class Report:
    """What was written.

    Attributes:
        html: the report.
        figures: PNG files beside it.
        findings: what it says, per scenario.
        suite: what it says over all scenarios together; None for one.
    """

    html: Path
    figures: tuple[Path, ...]
    findings: tuple[Findings, ...]
    suite: Suite | None = None

    @property
    def suite_tables(self) -> list[Table]:
        """Tables over all scenarios; none for one."""
        return [] if self.suite is None else suite_tables(self.suite)


def write_report(
    folder: Path,
    *,
    trace_folders: Sequence[Path] = (),
    timeline: tuple[str, str] | None = None,
    title: str = "Benchmark",
    extra_notes: Sequence[str] = (),
) -> Report:
    """Analyse a benchmark's rows and write everything beside them.

    Args:
        folder: of `run_benchmark`.
        trace_folders: where to look for traces first, for the time line.
        timeline: two policies to show side by side; default the focal one and Chiron.
        title: of the page.
        extra_notes: further paragraphs for the top of the page, for example how the learned policy was trained.

    Raises:
        SpecError: the folder holds no results.
    """
    rows = read_rows(folder / ROWS_FILE)
    if not rows:
        raise SpecError(f"{folder}: holds no benchmark results; run 'rl-autoscale benchmark --out {folder}' first")
    config = BenchmarkConfig.from_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else None
    findings = analyse(rows) if config is None else analyse(rows, targets=config.targets)
    cards = _read_json(folder / "workloads.json")
    suite = analyse_suite(rows, findings, {name: card.get("groups", ()) for name, card in cards.items()})
    tuned = [item if isinstance(item, list) else [item] for item in _read_json(folder / "tuning.json").values()]
    extra_notes = (*extra_notes, *describe_budgets([result for results in tuned for result in results]))
    figures = _draw(folder, rows, findings, _scenarios(config), trace_folders, timeline, config)
    if config is not None and config.span_s is not None:
        extra_notes = (*extra_notes, f"Test traffic cut to {config.span_s:g} s: a look, not the benchmark.")
    suite_figures = () if suite is None else _draw_suite(folder, suite)
    info = read_run(folder)
    page = render_html(findings, cards, info, figures, title, extra_notes, suite, suite_figures)
    write_text(folder / "report.html", page)
    write_text(folder / "report.md", render_markdown(findings, cards, info, title, extra_notes, suite))
    write_text(folder / "tables.csv", render_csv(findings))
    write_text(folder / "tables.json", json.dumps(as_data(findings), indent=2) + "\n")
    if suite is not None:
        write_text(folder / "suite.json", json.dumps([plain(table) for table in suite_tables(suite)], indent=2) + "\n")
    files = tuple(path for of_scenario in figures.values() for path in of_scenario)
    return Report(folder / "report.html", (*suite_figures, *files), tuple(findings), suite)


def _draw_suite(folder: Path, suite: Suite) -> tuple[Path, Path]:
    from rl_autoscale.experiments.suite_figures import draw_profiles, draw_suite_front

    paths = folder / "suite-front.png", folder / "suite-profiles.png"
    draw_suite_front(suite, paths[0])
    draw_profiles(suite, paths[1])
    return paths


def render_markdown(
    findings: Sequence[Findings],
    cards: Mapping[str, Any],
    info: RunInfo | None,
    title: str = "Benchmark",
    extra_notes: Sequence[str] = (),
    suite: Suite | None = None,
) -> str:
    """The report without figures."""
    parts = [f"# {title}", *extra_notes, *_lead(findings, suite), provenance(info, findings)]
    for table in () if suite is None else suite_tables(suite):
        parts += [f"## {table.title}", table.full_note, table.markdown()]
    for one in findings:
        parts.append(f"## {one.scenario}")
        parts += _card_lines(cards.get(one.scenario, {}))
        for table in all_tables(one):
            parts += [f"### {table.title}", table.full_note, table.markdown()]
    return "\n\n".join([*parts, CHIRON_NOTE]) + "\n"


def render_html(
    findings: Sequence[Findings],
    cards: Mapping[str, Any],
    info: RunInfo | None,
    figures: Mapping[str, Sequence[Path]],
    title: str = "Benchmark",
    extra_notes: Sequence[str] = (),
    suite: Suite | None = None,
    suite_figures: Sequence[Path] = (),
) -> str:
    """The report as one file; the scenarios of a suite can be unfolded.

    Args:
        findings: per scenario.
        cards: ``workloads.json``.
        info: how the run came about.
        figures: PNG files by scenario; they are embedded.
        title: of the page.
        extra_notes: paragraphs for the top.
        suite: findings over all scenarios together.
        suite_figures: PNG files; they are embedded.
    """
    template = (resources.files("rl_autoscale") / "experiments" / "report_page.html").read_text(encoding="utf-8")
    lead = [*extra_notes, *_lead(findings, suite)]
    parts = [_section(one, cards.get(one.scenario, {}), figures.get(one.scenario, ())) for one in findings]
    if suite is not None:
        tables = "".join(_html_table(table) for table in suite_tables(suite))
        folded = [
            f"<details><summary>{html.escape(one.scenario)}</summary>{part}</details>"
            for one, part in zip(findings, parts, strict=True)
        ]
        parts = [f"<section><h2>All scenarios</h2>{''.join(map(_image, suite_figures))}{tables}</section>", *folded]
    return Template(template).substitute(
        title=html.escape(title),
        lead="\n".join(f"<p>{html.escape(text)}</p>" for text in lead),
        sections="\n".join(parts),
        chiron=html.escape(CHIRON_NOTE),
        provenance=html.escape(provenance(info, findings)),
    )


def summary(findings: Sequence[Findings]) -> str:
    """Wins and losses in one sentence."""
    focal = next((one.focal for one in findings if one.focal is not None), None)
    if focal is None:
        return "No policy reaches any of the attainments reported."
    wins, losses, ties = verdicts(findings)
    return (
        f"{focal.policy} (early refusal {focal.refusal}) against every rule at every attainment reported: cheaper in "
        f"{wins} of {wins + losses + ties} comparisons, dearer in {losses}, undecided in {ties}. All knobs are "
        "chosen in hindsight, on the test traffic itself."
    )


def _lead(findings: Sequence[Findings], suite: Suite | None) -> list[str]:
    return [summary(findings)] if suite is None else suite_summary(suite)


def provenance(info: RunInfo | None, findings: Sequence[Findings]) -> str:
    """Command, seeds, commit, versions."""
    seeds = sorted({seed for one in findings for seed in one.seeds})
    few = "" if len(seeds) >= MIN_SEEDS else f" Fewer than {MIN_SEEDS} seeds: take the intervals as rough."
    if info is None:
        return f"Seeds {seeds}.{few} How this run came about is not recorded."
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    return (
        f"Command: {info.command}. Seeds {seeds}.{few} Git commit: {info.git_commit or 'not in a checkout'}. "
        f"rl-autoscale {info.package_version} (code {info.code}), Python {info.python}, {versions}. "
        f"{info.num_cores} cores, {info.machine}, {info.started}."
    )


def rich_table(table: Table) -> RichTable:
    """For the terminal, without intervals; wins green, losses bold red."""
    shown = RichTable(
        title=table.title, caption=table.note, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left"
    )
    for k, heading in enumerate(table.headings):
        shown.add_column(heading, justify="left" if k < table.num_text else "right", no_wrap=k < table.num_text)
    tones = {"win": "green", "loss": "red"}
    for row in table.rows:
        shown.add_row(*(_markup(cell.short or cell.text, cell.strong, tones.get(cell.tone, "")) for cell in row))
    return shown


def _markup(text: str, strong: bool, colour: str) -> str:
    style = " ".join(part for part in ("bold" if strong else "", colour) if part)
    escaped = text.replace("[", r"\[")
    return f"[{style}]{escaped}[/]" if style and text else escaped


def _card_lines(card: Mapping[str, Any]) -> list[str]:
    notes = [f"Note on the traffic: {note}" for note in card.get("notes", ())]
    return [*([str(card["description"]).strip()] if "description" in card else []), *notes]


def _section(one: Findings, card: Mapping[str, Any], figures: Sequence[Path]) -> str:
    parts = [f"<h2>{html.escape(one.scenario)}</h2>"]
    parts += [f'<p class="card">{html.escape(line)}</p>' for line in _card_lines(card)]
    parts += [_image(path) for path in figures]
    parts += [_html_table(table) for table in all_tables(one)]
    return f"<section>{''.join(parts)}</section>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def _html_table(table: Table) -> str:
    def cells(texts: Sequence[str], tag: str, classes: Sequence[str]) -> str:
        return "".join(f'<{tag} class="{c}">{t}</{tag}>' for t, c in zip(texts, classes, strict=True))

    kinds = ["text" if k < table.num_text else "number" for k in range(len(table.headings))]
    body = []
    for row in table.rows:
        texts = [f"<b>{html.escape(c.text)}</b>" if c.strong else html.escape(c.text) for c in row]
        body.append(f"<tr>{cells(texts, 'td', [f'{k} {c.tone}' for k, c in zip(kinds, row, strict=True)])}</tr>")
    head = cells([html.escape(text) for text in table.headings], "th", kinds)
    return (
        f'<h3>{html.escape(table.title)}</h3><p class="note">{html.escape(table.full_note)}</p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _scenarios(config: BenchmarkConfig | None) -> dict[str, Scenario]:
    """Those that can still be found; a report must not fail because a scenario file has moved."""
    found = {}
    for name in () if config is None else config.scenarios:
        try:
            scenario = load_scenario(name)
        except (SpecError, KeyError):
            continue
        found[scenario.name] = scenario
    return found


def _draw(
    folder: Path,
    rows: Sequence[Row],
    findings: Sequence[Findings],
    scenarios: Mapping[str, Scenario],
    trace_folders: Sequence[Path],
    chosen: tuple[str, str] | None,
    config: BenchmarkConfig | None,
) -> dict[str, list[Path]]:
    from rl_autoscale.experiments.figures import draw_front, draw_timeline  # Matplotlib takes a while to import

    figures: dict[str, list[Path]] = {}
    runner = EpisodeRunner(scenarios, TraceStore(trace_folders))
    for one in findings:
        path = folder / f"front-{one.scenario}.png"
        draw_front(one, path)
        figures[one.scenario] = [path]
        pair = _timeline_pair(one, chosen)
        if pair is not None and one.scenario in scenarios:
            span_s = None if config is None else config.span_s
            shown = [_timeline(item, one, rows, runner, span_s) for item in pair]
            path = folder / f"timeline-{one.scenario}.png"
            draw_timeline(shown[0], shown[1], path)
            figures[one.scenario].append(path)
    return figures


def _timeline_pair(one: Findings, chosen: tuple[str, str] | None) -> tuple[Entry, Entry] | None:
    """The two policies of the time line: those asked for, else the focal one and the better of the Chirons."""
    if one.focal is None:
        return None

    def find(policy: str) -> Entry | None:
        named = [item for item in one.entries if item.policy == policy]
        return max(named, key=lambda item: item.refusal == "on", default=None)

    if chosen is not None:
        left, right = find(chosen[0]), find(chosen[1])
    else:
        left = one.focal
        rivals = [item for item in one.entries if item.policy.startswith("chiron") and item is not left]
        rivals = rivals or [item for item in one.entries if item.is_rule and item is not left]
        right = max(rivals, key=lambda item: item.hypervolume.value, default=None)
    return None if left is None or right is None else (left, right)


def _timeline(entry: Entry, one: Findings, rows: Sequence[Row], runner: EpisodeRunner, span_s: float | None) -> Any:
    from rl_autoscale.experiments.figures import Timeline

    setting = entry.settings[operating_point(entry, TIMELINE_TARGET)]
    row = next(
        row
        for row in rows
        if (row.scenario, row.policy, row.refusal, row.seed)
        == (one.scenario, entry.policy, entry.refusal, one.seeds[0])
        and row.asked_attainment is None
        and (row.tuned_for, row.knob_value) == setting
    )
    knobs = {name: float(v) if v in ("inf", "-inf") else v for name, v in row.knobs.items()}
    result = runner.result(EpisodeJob(row.key, one.scenario, "test", row.seed, row.registered, knobs, span_s))
    knob = "" if row.knob is None else f", {row.knob} {row.knob_value:g}"
    knob += "" if row.tuned_for is None else f", tuned for {row.tuned_for:.3g}"
    title = f"{entry.policy}{knob}, refusal {entry.refusal}"
    interval_s = runner.scenario(one.scenario).fleet.control_interval_s
    return Timeline(title, result.timeline, interval_s, result.gpu_hours, result.slo_attainment)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
