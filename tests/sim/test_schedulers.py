"""Every scheduler has a name, a kernel and a twin."""

from __future__ import annotations

from typing import get_args

from rl_autoscale.fleet.spec import SchedulerName
from rl_autoscale.sim.layout import SCHEDULER_CODES
from rl_autoscale.sim.reference.schedulers import SCHEDULERS


def test_every_scheduler_is_in_both_simulators() -> None:
    assert set(SCHEDULER_CODES) == set(SCHEDULERS) == set(get_args(SchedulerName))
    assert len(set(SCHEDULER_CODES.values())) == len(SCHEDULER_CODES)
