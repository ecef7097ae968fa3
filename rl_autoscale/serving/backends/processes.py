"""Server processes that outlive whoever started them: start, recognise again, signal.

A process is known by its id *and* the moment it started, so that an id that was given to someone else after a reboot
is never signalled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rl_autoscale.serving.protocols import BackendError

_UNKNOWN_EXIT = -1


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process beyond doubt."""

    pid: int
    started: str


class Processes(Protocol):
    """What the local back end needs of the operating system."""

    def start(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> ProcessId:
        """Start a command in a session of its own; output goes to the log. Raises BackendError."""
        ...

    def exit_code(self, process: ProcessId) -> int | None:
        """None while it runs; -1 when it is gone and nobody knows how."""
        ...

    def terminate(self, process: ProcessId) -> None:
        """Ask it to finish (SIGTERM to the process alone: it must shut its helpers down itself)."""
        ...

    def kill(self, process: ProcessId) -> None:
        """End it and everything it started (SIGKILL to its session's group), running or not."""
        ...


class OsProcesses:
    """`Processes` of this machine (Linux and macOS)."""

    def __init__(self) -> None:
        self._children: set[int] = set()
        self._exited: dict[int, int] = {}

    def start(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> ProcessId:
        """Start a command; the child is not tied to this process and survives it."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        streams = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            pid = os.posix_spawnp(command[0], list(command), {**os.environ, **env}, file_actions=streams, setsid=True)
        except OSError as error:
            raise BackendError(
                f"cannot start '{command[0]}' with output to {log}: {error.strerror}", retryable=False
            ) from None
        self._children.add(pid)
        self._exited.pop(pid, None)  # of an earlier child whose id this one was given
        return ProcessId(pid, start_moment(pid) or "")

    def exit_code(self, process: ProcessId) -> int | None:
        """Reap if it is ours; look it up if it was started by an earlier controller."""
        if process.pid in self._exited:
            return self._exited[process.pid]
        if process.pid in self._children:
            done, status = os.waitpid(process.pid, os.WNOHANG)
            if done == 0:
                return None
            self._children.discard(process.pid)
            self._exited[process.pid] = os.waitstatus_to_exitcode(status)
            return self._exited[process.pid]
        return None if start_moment(process.pid) == process.started else _UNKNOWN_EXIT

    def terminate(self, process: ProcessId) -> None:
        """SIGTERM, if it is still that process."""
        if self.exit_code(process) is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)

    def kill(self, process: ProcessId) -> None:
        """SIGKILL to the group; of a leader that has exited, only while its id cannot be anyone else's."""
        if self.exit_code(process) is None or process.pid in self._exited:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def start_moment(pid: int) -> str | None:
    """When a process started, in the system's own words; None if there is none (or only its zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]  # fields 3 (state) and 22 (starttime) of proc(5)
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        return None
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
