"""The docs do what they say: Python blocks run, and every command line is one that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from rl_autoscale.cli import root

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


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


@pytest.mark.parametrize("link_page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(link_page: Path) -> None:
    text = link_page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (link_page.parent / target).exists(), f"{link_page.name}: {target}"
