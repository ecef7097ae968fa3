"""Whether the controller may act: its mode, and the three switches that can take the permission away.

    paused    by order: touches nothing, and goes on looking and logging
    shadow    decides and logs what it would do; touches nothing (the default)
    active    acts

The mode in force is the lowest of what was asked for and of what the switches allow:

1. a file: while it exists, paused;
2. a signal (SIGUSR1 pauses, SIGUSR2 resumes) or a POST to the status server;
3. the environment (``RL_AUTOSCALE_MODE``) and the configuration file, read again when it changes: where its mode is
   another than at start, for the command line stands above what it said then.

A switch can only lower: nothing but the command line, the environment and the file at start can raise the mode.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, Literal, TypeVar, get_args

from rl_autoscale.fleet.errors import SpecError

Mode = Literal["paused", "shadow", "active"]
Written = TypeVar("Written")
MODES: tuple[Mode, ...] = get_args(Mode)
ENVIRONMENT = "RL_AUTOSCALE_MODE"


def parse_mode(text: str, where: str) -> Mode:
    """Check a mode that someone wrote; raises SpecError."""
    if text not in MODES:
        raise SpecError(f"{where}: mode '{text}' is not one of {', '.join(MODES)}")
    return text


class ModeSwitch:
    """The mode in force.

    Args:
        asked: by the command line or the configuration.
        kill_file: pauses while it exists; None for no such switch.
        reread: gives the mode that the configuration asks for now; None or an error changes nothing.
        written: what it asked for at start; None where it said nothing.
        environment: value of ``RL_AUTOSCALE_MODE``, if set.
    """

    def __init__(
        self,
        asked: Mode,
        *,
        kill_file: Path | None = None,
        reread: Callable[[], Mode | None] | None = None,
        written: Mode | None = None,
        environment: str | None = None,
    ) -> None:
        self._allowed: dict[str, Mode] = {"asked for": asked}
        if environment:
            self._allowed[f"environment {ENVIRONMENT}"] = parse_mode(environment, ENVIRONMENT)
        self._kill_file = kill_file
        self._reread, self._at_start = reread, written
        self._paused_by: str | None = None

    def pause(self, who: str) -> None:
        """Take the permission away, for example by a signal."""
        self._paused_by = who

    def resume(self) -> None:
        """Undo `pause`; the other switches stay as they are."""
        self._paused_by = None

    def current(self) -> tuple[Mode, str]:
        """The mode in force and what put it there."""
        allowed = dict(self._allowed)
        if self._paused_by is not None:
            allowed[f"paused by {self._paused_by}"] = "paused"
        if self._kill_file is not None and self._kill_file.exists():
            allowed[f"file {self._kill_file}"] = "paused"
        written = self._reread() if self._reread is not None else None
        if written is not None and written != self._at_start:
            allowed["configuration file"] = written
        why = min(allowed, key=lambda name: MODES.index(allowed[name]))
        return allowed[why], why


class Reread(Generic[Written]):
    """Reads something of a configuration file again whenever the file has changed.

    Args:
        path: of the file.
        read: gives what a file asks for; what it raises leaves the last answer in force.

    Attributes:
        problem: why the file could not be read as it is now; empty where it could.
    """

    def __init__(self, path: Path, read: Callable[[Path], Written]) -> None:
        self._path = path
        self._read = read
        self._seen_ns = self._changed_ns()
        self._written: Written | None = None
        self.problem = ""

    def __call__(self) -> Written | None:
        """None until the file was changed."""
        changed_ns = self._changed_ns()
        if changed_ns is not None and changed_ns != self._seen_ns:
            self._seen_ns = changed_ns
            try:
                self._written, self.problem = self._read(self._path), ""
            except SpecError as error:
                self.problem = str(error)
        return self._written

    def _changed_ns(self) -> int | None:
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return None
