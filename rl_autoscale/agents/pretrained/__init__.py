"""Trained policies that ship with the package: one folder each, named ``pretrained/NAME`` wherever a policy is named.

pretrained/NAME/policy.onnx, policy.json    as `agents.export` writes them
pretrained/NAME/README.md                   the model card for people; `CARD_PARTS` says what it must tell
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from rl_autoscale.fleet.errors import PolicyFileError, UnknownNameError

PREFIX = "pretrained/"
CARD_FILE = "README.md"

CARD_PARTS: dict[str, tuple[str, ...]] = {
    "Use": (),
    "Envelope": ("models", "GPUs", "rates", "start-up"),
    "Measured": (),
    "Known failures": (),
}
"""Sections of a model card (``## Name``), and the list items (``- item: ...``) that each must hold."""

_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def shipped_folder() -> Path:
    """Where the shipped policies lie."""
    return Path(str(resources.files("rl_autoscale.agents") / "pretrained"))


def pretrained_names() -> list[str]:
    """Names of the shipped policies, sorted; may be empty."""
    return sorted(path.parent.name for path in shipped_folder().glob("*/policy.json"))


def is_pretrained(path: str | Path) -> bool:
    """Whether a path means a shipped policy; a folder of your own named ``pretrained`` needs its absolute path."""
    return str(path).startswith(PREFIX)


def policy_folder(path: str | Path) -> Path:
    """The folder (or card) that a policy's path means.

    Args:
        path: ``pretrained/NAME``, or any path, which is given back.

    Raises:
        UnknownNameError: no shipped policy has that name.
        PolicyFileError: none ships at all.
    """
    if not is_pretrained(path):
        return Path(path)
    name, known = str(path).removeprefix(PREFIX), pretrained_names()
    if name in known:
        return shipped_folder() / name
    if not known:
        raise PolicyFileError(
            f"{path}: no pre-trained policy ships with this version; train one with 'rl-autoscale train' and give its "
            "folder"
        )
    raise UnknownNameError("pre-trained policy", name, known)


def card_problems(folder: Path) -> list[str]:
    """What a model card lacks: sections, list items, or files that it links to.

    Args:
        folder: of a policy.

    Returns:
        One phrase per problem; empty for a complete card.
    """
    path = folder / CARD_FILE
    if not path.exists():
        return [f"no {CARD_FILE}"]
    text = path.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.+?)\s*$\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    problems = []
    for section, items in CARD_PARTS.items():
        body = sections.get(section, "")
        if not body.strip():
            problems.append(f"section '## {section}' is missing or empty")
        problems += [
            f"'## {section}' lacks '- {item}: ...'"
            for item in items
            if not re.search(rf"^- {re.escape(item)}: \S", body, re.MULTILINE)
        ]
    missing = [link for link in _LINK.findall(text) if "://" not in link and not (folder / link).exists()]
    return [*problems, *(f"links to {link}, which is not there" for link in missing)]
