"""What changes from one control step to the next, in lines for whoever reads the controller's output."""

from __future__ import annotations

import re
from collections.abc import Callable

from rl_autoscale.serving.step_record import StepRecord

_NUMBER = re.compile(r"\d+(\.\d+)?")


class Changes:
    """Listens to a controller; tells of its first step, and then only what is new: mode, who decides, what is wrong.

    Args:
        tell: called with one line.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._state: dict[str, str] = {}
        self._wrong: dict[str, str] = {}

    def __call__(self, record: StepRecord) -> None:
        """Tell what this step has that the one before had not."""
        state = {"mode": f"{record.mode} ({record.mode_reason})", "decided by": record.source}
        for name, value in state.items():
            before = self._state.get(name)
            if value != before:
                self._tell(f"step {record.step}: {name} {value}{f', was {before}' if before else ''}")
        wrong = {_NUMBER.sub("#", line): line for line in _problems(record)}  # times and counts change, the problem not
        for kind, line in wrong.items():
            if kind not in self._wrong:
                self._tell(f"step {record.step}: {line}")
        for kind, line in self._wrong.items():
            if kind not in wrong:
                self._tell(f"step {record.step}: over: {line}")
        self._state, self._wrong = state, wrong


def _problems(record: StepRecord) -> list[str]:
    found = [*record.report.problems, *(f"{name}: {why}" for name, why in record.failures.items())]
    found += [f"{pool}: replica failed: {why}" for pool, reasons in record.report.failed.items() for why in reasons]
    return [*found, *((f"breaker open: {record.breaker}",) if record.breaker else ())]
