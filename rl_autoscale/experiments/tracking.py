"""Where metrics go while a run is under way: nowhere, TensorBoard, or Weights & Biases.

A tracker is opened with a name and closed by ``with``. Both services belong to the ``train`` extra and are imported
when they are opened, not before. Weights & Biases is never used unless asked for; ``WANDB_MODE=offline`` works as the
service documents it: nothing leaves the machine before ``wandb sync``. What a project looks like there:
docs/tracking.md.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rl_autoscale.fleet.errors import MissingExtraError, TrackingError, UnknownNameError

SERVICES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}
TRACKERS = ("none", *SERVICES)
WANDB_PROJECT = "rl-autoscale"
MOST_TAG_CHARACTERS, MOST_ARTIFACT_CHARACTERS = 64, 128
"""That Weights & Biases takes."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a run is, for services that sort runs.

    Attributes:
        kind: ``train`` or ``benchmark``.
        name: of the run; None: its folder's.
        group: runs that belong together, such as the seeds of one training.
        tags: scenarios.
        config: as resolved.
    """

    kind: str = "train"
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table: text as a report shows it, or numbers, None where there is none."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]

    def markdown(self) -> str:
        """For services that show text only."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


@dataclass(frozen=True, slots=True)
class Showing:
    """What a finished run has to show. Names have the form ``section/name``.

    Attributes:
        kind: of the files, ``policy`` or ``benchmark``.
        numbers: for the run's summary.
        sheets: tables by name.
        figures: PNG files by name.
        page: an HTML file that needs no other.
        files: to be kept with the run.
    """

    kind: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    sheets: Mapping[str, Sheet] = field(default_factory=dict)
    figures: Mapping[str, Path] = field(default_factory=dict)
    page: Path | None = None
    files: tuple[Path, ...] = ()


class Tracker(Protocol):
    """Takes scalars while a run is under way, and what it has to show at its end; names as in docs/metrics.md."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record scalars of one moment; ``step`` counts environment steps, and does not go back."""
        ...

    def show(self, showing: Showing) -> None:
        """Record what came of the run; call it once, last."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NoTracker:
    """Forgets everything."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def show(self, showing: Showing) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""


class TensorBoardTracker:
    """Writes an event file into ``<folder>/tensorboard``; needs no torch and no TensorFlow.

    Tables are shown as text. Page and files are not copied: they lie in the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._metadata = event_pb2.Event, summary_pb2.Summary, summary_pb2.SummaryMetadata
        self._writer: Any = EventFileWriter(str(folder / "tensorboard"))
        self._step = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one event with all finite scalars."""
        self._step = step
        self._write(self._summary.Value(tag=name, simple_value=value) for name, value in _finite(metrics).items())

    def show(self, showing: Showing) -> None:
        """Numbers as scalars, tables as text, figures as images."""
        self.log(showing.numbers, self._step)
        self._write(self._text(name, sheet) for name, sheet in showing.sheets.items())
        self._write(self._image(name, path) for name, path in showing.figures.items())

    def _write(self, values: Iterator[Any]) -> None:
        import time

        summary = self._summary(value=list(values))
        self._writer.add_event(self._event(wall_time=time.time(), step=self._step, summary=summary))

    def _text(self, name: str, sheet: Sheet) -> Any:
        from tensorboard.compat.proto import tensor_pb2, types_pb2

        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[sheet.markdown().encode()])
        plugin = self._metadata(plugin_data=self._metadata.PluginData(plugin_name="text"))
        return self._summary.Value(tag=name, metadata=plugin, tensor=tensor)

    def _image(self, name: str, path: Path) -> Any:
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # PNG, section 11.2.2: the header chunk comes first
        image = self._summary.Image(encoded_image_string=data, width=width, height=height, colorspace=4)
        return self._summary.Value(tag=name, image=image)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """Logs to Weights & Biases; files lie in ``<folder>/wandb``.

    Account, mode, another project or folder (``WANDB_PROJECT``, ``WANDB_DIR``) come from W&B's own environment.

    Raises:
        TrackingError: nobody is logged in, or the service does not answer.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._wandb: Any = wandb
        self._name = job.name or folder.name
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
                name=self._name,
                group=job.group,
                job_type=job.kind,
                tags=[tag[:MOST_TAG_CHARACTERS] for tag in job.tags],
                dir=os.environ.get("WANDB_DIR", str(folder)),
                config=dict(job.config),
                reinit="create_new",
            )
        except wandb.Error as error:
            raise TrackingError(
                f"Weights & Biases: {error} Or set WANDB_MODE=offline to keep the run on this machine"
            ) from None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log all finite scalars."""
        self._run.log(_finite(metrics), step=step)

    def show(self, showing: Showing) -> None:
        """Numbers into the summary; tables, figures and the page as panels; the files as an artifact."""
        wandb = self._wandb
        self._run.summary.update(_finite(showing.numbers))
        panels = {
            name: wandb.Table(columns=list(sheet.columns), data=[list(row) for row in sheet.rows])
            for name, sheet in showing.sheets.items()
        }
        panels |= {name: wandb.Image(str(path)) for name, path in showing.figures.items()}
        if showing.page is not None:
            panels[showing.page.stem] = wandb.Html(str(showing.page), inject=False)
        if panels:
            self._run.log(panels)
        if showing.files:
            name = re.sub(r"[^\w.-]+", "-", f"{showing.kind}-{self._name}", flags=re.ASCII)
            kept = wandb.Artifact(name[:MOST_ARTIFACT_CHARACTERS], type=showing.kind)
            for path in showing.files:
                kept.add_file(str(path), name=path.name)
            self._run.log_artifact(kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the run; a run that ended in an exception is marked as failed."""
        self._run.finish(exit_code=0 if error is None else 1)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def check_tracker(kind: str) -> None:
    """That `make_tracker` will find it, before hours of work.

    Raises:
        UnknownNameError: no such tracker.
        MissingExtraError: its library is not installed.
    """
    if kind not in TRACKERS:
        raise UnknownNameError("tracker", kind, TRACKERS)
    spec = importlib.util.find_spec(kind) if kind != "none" else None
    if kind != "none" and (spec is None or spec.origin is None):  # without: a folder that has the library's name
        raise MissingExtraError(f"{SERVICES[kind]} tracking", "train")


def make_tracker(kind: str, folder: Path, job: Job | None = None) -> Tracker:
    """Open a tracker by name.

    Args:
        kind: one of `TRACKERS`.
        folder: the run's folder.
        job: what the run is.

    Raises:
        UnknownNameError, MissingExtraError: see `check_tracker`.
        TrackingError: the service cannot be used.
    """
    check_tracker(kind)
    if kind == "tensorboard":
        return TensorBoardTracker(folder)
    if kind == "wandb":
        return WandbTracker(folder, job or Job())
    return NoTracker()
