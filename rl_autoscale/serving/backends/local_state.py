"""What the local back end keeps on disk: which processes are its own, the target, their logs, and whose turn it is.

The folder outlives the controller. A lock lets one controller at a time use it; the memory is replaced whole, so that a
controller that is killed while writing leaves the old one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rl_autoscale.serving.backends.processes import ProcessId
from rl_autoscale.serving.protocols import BackendError, Phase


@dataclass(slots=True)
class Member:
    """One replica and its process; ``stopping_since_s`` is when it got SIGTERM."""

    replica_id: str
    port: int
    process: ProcessId
    phase: Phase
    since_s: float
    reason: str = ""
    stopping_since_s: float | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True, slots=True)
class Memory:
    """What the next controller must know: the target, the number of the next replica, and those that run."""

    target: int
    next_id: int
    members: tuple[Member, ...]


class StateFolder:
    """A pool's folder, locked for as long as this is open.

    Args:
        path: made if missing.

    Raises:
        BackendError: another controller holds it, or it cannot be made or written to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = _claim(path)

    def close(self) -> None:
        """Release the folder."""
        self._lock.close()

    def write(self, memory: Memory) -> None:
        """Replace the memory, if it changed.

        Raises:
            BackendError: it cannot be written; the old one stays.
        """
        members = [
            {
                "replica_id": item.replica_id,
                "port": item.port,
                "pid": item.process.pid,
                "started": item.process.started,
                "draining": item.phase == "draining",
            }
            for item in memory.members
        ]
        path = self._path / "state.json"
        content = json.dumps({"target": memory.target, "next_id": memory.next_id, "members": members})
        try:
            if path.exists() and path.read_text(encoding="utf-8") == content:
                return
            path.with_suffix(".tmp").write_text(content, encoding="utf-8")
            path.with_suffix(".tmp").replace(path)
        except OSError as error:
            raise _unusable(path, error) from None

    def read(self, now_s: float) -> Memory | None:
        """What an earlier controller left, every replica that did not drain as one that starts; None if nothing.

        Raises:
            BackendError: the file is damaged, or may not be read.
        """
        path = self._path / "state.json"
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            members = tuple(_member(item, now_s) for item in state["members"])
            return Memory(int(state["target"]), int(state["next_id"]), members)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(path, error) from None
        except (ValueError, KeyError, TypeError) as error:
            raise BackendError(
                f"{path} is damaged ({error}); check what still runs, then delete it", retryable=False
            ) from None

    def log_path(self, replica_id: str) -> Path:
        """Where a replica's output goes."""
        return self._path / "logs" / f"{replica_id}.log"

    def log_text(self, replica_id: str, num_bytes: int) -> str:
        """The end of a replica's output; empty if there is none."""
        with contextlib.suppress(OSError), self.log_path(replica_id).open("rb") as log:
            log.seek(max(log.seek(0, 2) - num_bytes, 0))
            return log.read().decode("utf-8", errors="replace")
        return ""


def _member(item: dict[str, Any], now_s: float) -> Member:
    process = ProcessId(int(item["pid"]), str(item["started"]))
    phase: Phase = "draining" if item["draining"] else "starting"
    return Member(str(item["replica_id"]), int(item["port"]), process, phase, now_s, "taken over")


def _claim(state_dir: Path) -> IO[str]:
    """Hold the folder's lock for as long as the file is open."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / "lock").open("a", encoding="utf-8")
    except OSError as error:
        raise _unusable(state_dir, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise BackendError(f"{state_dir} belongs to another controller that still runs", retryable=False) from None
    return lock


def _unusable(path: Path, error: OSError) -> BackendError:
    """Nothing is started or stopped that cannot be remembered; the next pass tries again."""
    return BackendError(
        f"{path}: {error.strerror or error}; replicas stay as they are until it can be read and written: "
        "free space there, or allow this user to write",
        retryable=True,
    )
