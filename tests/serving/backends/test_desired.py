"""Publishing what is wanted: silence is never zero."""

from __future__ import annotations

import threading

import pytest

from rl_autoscale.serving.backends.desired import DesiredReplicas, PublishingBackend
from rl_autoscale.serving.protocols import BackendError, PoolObservation

from .conftest import FakeClock


class Seen:
    """An observer that always sees the same."""

    def __init__(self) -> None:
        self.closed = False

    def observe(self) -> PoolObservation:
        return PoolObservation(asked_for=4, replicas=())

    def close(self) -> None:
        self.closed = True


def test_nothing_decided_is_not_zero(clock: FakeClock) -> None:
    read = DesiredReplicas("chat", clock).read()
    assert read.num_replicas is None
    assert not read.fresh


def test_a_figure_is_fresh_until_it_is_too_old(clock: FakeClock) -> None:
    desired = DesiredReplicas("chat", clock, hold_s=60.0)
    desired.publish(3)
    clock.sleep(60)
    assert desired.read().fresh
    clock.sleep(0.1)
    read = desired.read()
    assert (read.fresh, read.num_replicas, read.age_s) == (False, 3, pytest.approx(60.1))
    desired.publish(3)
    assert desired.read().fresh


def test_a_withdrawn_figure_is_stale_at_once(clock: FakeClock) -> None:
    desired = DesiredReplicas("chat", clock)
    desired.publish(3)
    desired.withdraw()
    assert not desired.read().fresh
    desired.publish(2)
    assert desired.read().fresh


def test_waiting_ends_when_something_is_said(clock: FakeClock) -> None:
    desired = DesiredReplicas("chat", clock)
    serial = desired.read().serial
    threading.Thread(target=desired.publish, args=(5,)).start()
    assert desired.wait_for_change(serial, 10.0).num_replicas == 5
    assert desired.wait_for_change(serial, 10.0).num_replicas == 5  # said already: no waiting


def test_the_back_end_publishes_and_observes_what_others_made_of_it(clock: FakeClock) -> None:
    desired, seen = DesiredReplicas("chat", clock), Seen()
    backend = PublishingBackend(desired, seen)
    backend.set_target(9)
    assert desired.read().num_replicas == 9
    assert backend.observe().asked_for == 4
    assert backend.pool == "chat"
    backend.close()
    assert seen.closed
    assert not desired.read().fresh


def test_a_negative_target_is_refused(clock: FakeClock) -> None:
    desired = DesiredReplicas("chat", clock)
    with pytest.raises(BackendError, match="at least 0"):
        PublishingBackend(desired, Seen()).set_target(-1)
    assert desired.read().num_replicas is None
