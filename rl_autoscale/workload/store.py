"""Traces by name: from folders, the cache or their public address; or a fitted stand-in, and then it says so."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from rl_autoscale.fleet.errors import TraceError, UnknownNameError
from rl_autoscale.workload.catalog import KNOWN_TRACES, KnownTrace
from rl_autoscale.workload.fitted import FITTED_NAMES, stand_in
from rl_autoscale.workload.readers import ReadReport, read_trace
from rl_autoscale.workload.trace import Workload
from rl_autoscale.workload.writers import atomic_path

FOLDERS_VARIABLE = "RL_AUTOSCALE_TRACES"
"""Folders to look in, separated as in PATH."""

TIMEOUT_S = 20.0
_CHUNK_BYTES = 1 << 20

Progress = Callable[[str, int, int | None], None]
"""Called while a trace is downloaded: its name, bytes so far, bytes in all if known."""


class TraceUnavailable(TraceError):
    """A known trace that is neither on disk nor can be downloaded now."""

    def __init__(self, trace: KnownTrace, reason: str) -> None:
        """Say what is missing, why, and what to do.

        Args:
            trace: the trace.
            reason: why it could not be downloaded, short.
        """
        self.trace = trace
        self.reason = reason
        super().__init__(
            f"{trace.name} is not on this machine and could not be downloaded from {trace.url} ({reason}); "
            f"put {trace.file_name} into a folder and name it with --traces or ${FOLDERS_VARIABLE}"
        )


@dataclass(frozen=True, slots=True)
class LoadedTrace:
    """A trace as a store hands it out.

    Attributes:
        workload: the requests.
        notes: what a reader of the results must know: skipped rows, ignored columns, a stand-in used.
        report: how the file was read; None for a stand-in.
    """

    workload: Workload
    notes: tuple[str, ...] = ()
    report: ReadReport | None = None


class OpenUrl(Protocol):
    """Opens an address for reading; `urllib.request.urlopen` by default, something else in tests."""

    def __call__(self, url: str, *, timeout: float) -> IO[bytes]:
        """Open; raises OSError when it cannot."""
        ...


def open_url(url: str, *, timeout: float) -> IO[bytes]:
    """Open an http(s) address."""
    request = urllib.request.Request(url, headers={"User-Agent": "rl-autoscale"})
    response: IO[bytes] = urllib.request.urlopen(request, timeout=timeout)
    return response


class TraceStore:
    """Finds, downloads and reads traces; each is read once and kept.

    Looked for in this order: the given folders, the folders of ``$RL_AUTOSCALE_TRACES``, the cache. In each folder
    ``<name>.parquet`` and ``<name>.csv`` in our own form come before the original file.
    """

    def __init__(
        self,
        folders: Iterable[Path | str] = (),
        *,
        download: bool = True,
        progress: Progress | None = None,
        opener: OpenUrl = open_url,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare; touches neither disk nor network.

        Args:
            folders: where to look first; a folder that does not exist is an error when a trace is asked for.
            download: whether a trace that is not on disk may be downloaded.
            progress: told about downloads.
            opener: opens addresses.
            environment: environment variables; by default the process's own.
        """
        env = os.environ if environment is None else environment
        variable = [part for part in env.get(FOLDERS_VARIABLE, "").split(os.pathsep) if part]
        self._given = [Path(folder).expanduser() for folder in folders]
        self._folders = [*self._given, *(Path(part).expanduser() for part in variable)]
        cache_root = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or Path.home()) / ".cache")
        self.cache_folder = cache_root / "rl-autoscale" / "traces"
        self._download = download
        self._progress = progress
        self._opener = opener
        self._loaded: dict[str, LoadedTrace] = {}
        self._unavailable: dict[str, TraceUnavailable] = {}

    def find(self, name: str) -> Path | None:
        """Where a trace lies on this machine, or None."""
        for folder in self._given:
            if not folder.is_dir():
                raise TraceError(f"{folder}: no such folder; --traces names a folder with trace files")
        known = KNOWN_TRACES.get(name)
        names = [f"{name}.parquet", f"{name}.csv", *([known.file_name] if known else [])]
        candidates = (folder / file for folder in (*self._folders, self.cache_folder) for file in names)
        return next((path for path in candidates if path.is_file()), None)

    def fetch(self, name: str) -> Path:
        """Make sure that a known trace is on disk.

        Returns:
            Its path: what `find` found, or the downloaded original in the cache.

        Raises:
            UnknownNameError: for a name that is not in the catalog.
            TraceUnavailable: when it cannot be downloaded; says what to do.
            TraceError: when what came has another size or checksum; nothing of it is kept.
        """
        found = self.find(name)
        if found is not None:
            return found
        if name not in KNOWN_TRACES:
            raise UnknownNameError("trace", name, KNOWN_TRACES)
        if name in self._unavailable:
            raise self._unavailable[name]
        try:
            return self._fetch_original(KNOWN_TRACES[name])
        except TraceUnavailable as error:
            self._unavailable[name] = error  # one attempt per run: every episode asks again
            raise

    def load(self, name: str) -> LoadedTrace:
        """Read a known trace or a file.

        Args:
            name: a catalog name, the stem of a file in one of the folders, or a path.
        """
        if name not in self._loaded:
            known = KNOWN_TRACES.get(name)
            path = self.locate(name)
            original = known is not None and path.name == known.file_name
            result = read_trace(path, on_bad_rows=known.on_bad_rows if known and original else "error")
            notes = list(result.report.notes)
            if known and original and known.sha256 is None and path.parent == self.cache_folder:
                notes.append(f"{name}: downloaded without a checksum to compare (none is known); it is unverified")
            self._loaded[name] = LoadedTrace(result.workload, tuple(notes), result.report)
        return self._loaded[name]

    def load_or_stand_in(self, name: str) -> LoadedTrace:
        """Like `load`, but a trace that cannot be had gives its fitted stand-in, where there is one, with a note."""
        try:
            return self.load(name)
        except TraceUnavailable as error:
            if name not in FITTED_NAMES:
                raise
            note = f"{name} is not available ({error.reason}): a generator fitted to it stands in for it"
            self._loaded[name] = LoadedTrace(stand_in(name), (note,))
            return self._loaded[name]

    def locate(self, name: str) -> Path:
        """The file behind a known trace's name (downloaded if need be), the stem of a file in a folder, or a path."""
        if name in KNOWN_TRACES:
            return self.fetch(name)
        found = self.find(name)
        if found is not None:
            return found
        path = Path(name).expanduser()
        if path.is_file() or path.suffix or len(path.parts) > 1:
            return path  # read_trace says what is wrong with it
        raise UnknownNameError("trace", name, KNOWN_TRACES)

    def _fetch_original(self, trace: KnownTrace) -> Path:
        target = self.cache_folder / trace.file_name
        if not self._download:
            raise TraceUnavailable(trace, "downloads are switched off")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target) as partial, closing(self._opener(trace.url, timeout=TIMEOUT_S)) as source:
                self._copy(trace, source, partial)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)  # URLError wraps what went wrong
            raise TraceUnavailable(trace, " ".join(str(reason).split()) or type(error).__name__) from None
        return target

    def _copy(self, trace: KnownTrace, source: IO[bytes], path: Path) -> None:
        """Write what comes, then check it against the catalog, or at least against its announced length."""
        announced = int(getattr(source, "headers", {}).get("Content-Length") or 0)
        digest, num_bytes = hashlib.sha256(), 0
        with path.open("wb") as file:
            while chunk := source.read(_CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                num_bytes += len(chunk)
                if self._progress is not None:
                    self._progress(trace.name, num_bytes, trace.num_bytes or announced or None)
        if announced and num_bytes < announced:  # a dropped connection just ends the stream
            raise OSError(f"the connection ended after {num_bytes:,} of {announced:,} bytes")
        _check_download(trace, num_bytes, digest.hexdigest())


def _check_download(trace: KnownTrace, num_bytes: int, digest: str) -> None:
    if trace.sha256 is not None and digest != trace.sha256:
        raise TraceError(
            f"{trace.name}: the download from {trace.url} has {num_bytes:,} bytes and sha256 {digest}, expected "
            f"{trace.num_bytes or 0:,} bytes and {trace.sha256}; nothing was kept. Try again, or get it yourself"
        )
    if num_bytes == 0:
        raise TraceError(f"{trace.name}: {trace.url} gave an empty file; nothing was kept")
