"""The docs do what they say: Python blocks run, every command line is one that the program takes, and most are run."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from rl_autoscale.cli import root
from rl_autoscale.envs.scenario import shipped_scenario_names

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


CHEAP = ("trace ls", "scenario ls", "scenario show", "profile ls", "policy ls")
"""Commands that read the package alone; with those that end in --help they are run as written."""

SMALL = {
    "train": ("--timesteps", "2048"),
    "evaluate": ("--seeds", "1"),
    "benchmark": ("--seeds", "1", "--knob-values", "2", "--refinements", "0", "--tune-episodes", "4", "--jobs", "1"),
    "report": (),
}
"""Verbs that are run on a tiny scenario in place of their own, and what makes them quick; the last option wins."""


def command_lines() -> list[tuple[str, str]]:
    """(page, command line) of every ``rl-autoscale`` line in a plain block, continuation lines joined."""
    found = []
    for page in PAGES:
        for language in ("", "sh", "bash", "console"):
            for text in blocks(page, language):
                for line in text.replace("\\\n", " ").splitlines():
                    words = re.sub(r"^\s*(\$ )?((\w+=\S+ )*)", "", line)
                    if words.startswith("rl-autoscale "):
                        found.append((page.name, re.split(r"\s+#\s|\s[|>&]", words)[0]))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_blocks_run(page: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_every_page_is_looked_at() -> None:
    assert {name for name, _ in command_lines()} >= {"README.md", "benchmark.md", "workloads.md", "profiles.md"}


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_the_command_takes_what_the_docs_give_it(page: str, line: str) -> None:
    """Parses without running; a removed option, verb or argument fails here."""
    command = get_command(root.app)
    context = command.make_context("rl-autoscale", shlex.split(line)[1:])
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        if rest == ["--help"]:  # would be answered at once
            break
        context = command.make_context(name, rest, parent=context)
    assert command.name


def test_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match="seedz"):
        test_the_command_takes_what_the_docs_give_it("", "rl-autoscale benchmark --seedz 3")


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line in this process; returns stdout."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        root.main(words)
    shown = capsys.readouterr()
    assert not leaving.value.code, f"rl-autoscale {shlex.join(words)}: {shown.err}"
    return shown.out


def cheap_command_lines() -> list[str]:
    """Those in blocks, and those in the middle of a sentence."""
    told = [
        line for page in PAGES for line in re.findall(r"`(rl-autoscale [^`\n]+)`", page.read_text(encoding="utf-8"))
    ]
    lines = dict.fromkeys([line for _, line in command_lines()] + told)
    return [line for line in lines if line.endswith("--help") or line.split(" ", 1)[1].startswith(CHEAP)]


@pytest.mark.parametrize("line", cheap_command_lines())
def test_a_cheap_command_runs_as_written(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(line)[1:], capsys).strip()


def test_there_are_cheap_commands() -> None:
    assert {"rl-autoscale trace ls", "rl-autoscale scenario ls"} <= set(cheap_command_lines())


def shrunk(line: str, scenario: Path) -> list[str]:
    """The command line with another scenario and, behind its own options, those of `SMALL`."""
    words = shlex.split(line)[1:]
    if words[0] != "report" and "--scenario" not in words:
        words += ["--scenario", ""]
    words = [
        str(scenario) if before == "--scenario" else word for before, word in zip(["", *words], words, strict=False)
    ]
    return [*words, *SMALL[words[0]]]


@pytest.mark.parametrize("name", ["README.md", pytest.param("benchmark.md", marks=pytest.mark.slow), "policies.md"])
def test_research_commands_run_one_after_the_other(
    name: str, tiny_scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("stable_baselines3")
    monkeypatch.chdir(tmp_path)
    research = [(page, line) for page, line in command_lines() if line.split()[1] in SMALL and "/NAME" not in line]
    readme = [line for page, line in research if page == "README.md"]
    if name != "README.md":  # what the page begins with: a policy, trained as the README says
        run(shrunk(next(line for line in readme if line.split()[1] == "train"), tiny_scenario), capsys)
        shutil.copytree("runs/bursty", "runs/train")
    lines = [line for page, line in research if page == name]
    assert lines
    for line in lines:
        run(shrunk(line, tiny_scenario), capsys)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)", prose, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("link_page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(link_page: Path) -> None:
    text = link_page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if "://" in target:
            continue
        page = link_page.parent / target if target else link_page
        assert page.exists(), f"{link_page.name}: {target}"
        assert not anchor or anchor in anchors(page), f"{link_page.name}: {target}#{anchor}"


def test_the_picture_of_the_fronts_is_drawn_from_a_table_of_every_scenario(tmp_path: Path) -> None:
    code = runpy.run_path(str(REPOSITORY / "benchmarks" / "draw_fronts.py"))
    changes = code["read_changes"]((REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8"))
    assert set(changes) == set(shipped_scenario_names()) - {"model-swapping"}  # it has no network
    assert all(len(row) == 4 for row in changes.values())
    code["draw"](changes, tmp_path / "fronts.png")
    assert (tmp_path / "fronts.png").stat().st_size > 10_000
