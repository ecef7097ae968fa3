"""Where metrics go while a run is under way: nowhere, TensorBoard, or Weights & Biases.

A tracker is opened with a name and closed by ``with``. Both services belong to the ``train`` extra and are imported
when they are opened, not before. Weights & Biases is never used unless asked for; ``WANDB_MODE=offline`` works as the
service documents it: everything stays in the run's folder until ``wandb sync``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rl_autoscale.fleet.errors import MissingExtraError, UnknownNameError

TRACKERS = ("none", "tensorboard", "wandb")
WANDB_PROJECT = "rl-autoscale"


class Tracker(Protocol):
    """Takes scalars; metric names are defined in docs/metrics.md."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record scalars of one moment; ``step`` counts environment steps, and does not go back."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NoTracker:
    """Forgets everything."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""


class TensorBoardTracker:
    """Writes an event file into ``<folder>/tensorboard``; needs no torch and no TensorFlow.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise MissingExtraError("TensorBoard tracking", "train") from None
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer: Any = EventFileWriter(str(folder / "tensorboard"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one event with all finite scalars."""
        import time

        values = [
            self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items() if math.isfinite(value)
        ]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """Logs to Weights & Biases; files lie in ``<folder>/wandb``. Account and mode come from W&B's own environment.

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], name: str | None = None) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtraError("Weights & Biases tracking", "train") from None
        folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=WANDB_PROJECT, name=name or folder.name, dir=str(folder), config=dict(config), reinit="create_new"
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log all finite scalars."""
        self._run.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the run; a run that ended in an exception is marked as failed."""
        self._run.finish(exit_code=0 if error is None else 1)


def make_tracker(kind: str, folder: Path, config: Mapping[str, Any] | None = None) -> Tracker:
    """Open a tracker by name.

    Args:
        kind: one of `TRACKERS`.
        folder: the run's folder.
        config: the resolved configuration, for services that show it.

    Raises:
        UnknownNameError: no such tracker.
        MissingExtraError: its library is not installed.
    """
    if kind == "none":
        return NoTracker()
    if kind == "tensorboard":
        return TensorBoardTracker(folder)
    if kind == "wandb":
        return WandbTracker(folder, config or {})
    raise UnknownNameError("tracker", kind, TRACKERS)
