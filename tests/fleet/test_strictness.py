"""Refusal that corrects itself: stricter where requests come late, laxer where none does, and as it was else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState
from rl_autoscale.fleet.strictness import LATE_PER_REFUSED, LAXEST, STRICTEST, StrictnessCorrection
from tests.fleet.conftest import make_spec, make_state, pool


def window(spec: FleetSpec, *, late: float = 0.0, refused: float = 0.0, **changes: Any) -> FleetState:
    """Ten seconds in which 100 requests a second arrive, so many of them are refused, and so many that end are late."""
    seen = {"arrivals_per_s": 100.0, "refused_per_s": refused, "finished_per_s": 80.0, "met_per_s": 80.0 - late}
    return make_state(spec, **(seen | {"admission": 1.0} | changes))


def after(num_windows: int, spec: FleetSpec | None = None, **seen: Any) -> float:
    spec = make_spec() if spec is None else spec
    correction = StrictnessCorrection(spec)
    for _ in range(num_windows):
        correction.update(window(spec, **seen))
    return float(correction.octaves[0])


def test_late_requests_make_it_stricter_and_refused_ones_laxer() -> None:
    assert 0.0 < after(1, late=5.0) < after(5, late=5.0) <= STRICTEST
    assert LAXEST <= after(5, refused=5.0) < after(1, refused=5.0) < 0.0
    assert after(500, late=5.0) == STRICTEST
    assert after(500, refused=5.0) == LAXEST


def test_in_balance_it_stays() -> None:
    assert after(50, refused=10.0, late=10.0 * LATE_PER_REFUSED) == pytest.approx(0.0, abs=1e-9)


def test_misses_that_are_few_say_little() -> None:
    assert 0.0 < after(5, late=0.01) < 0.2 * after(5, late=5.0)


@pytest.mark.parametrize(
    "changes", [{"admission": np.inf}, {"finished_per_s": np.nan}, {"age_s": 10.0}], ids=["open", "unknown", "old"]
)
def test_a_window_that_cannot_tell_says_nothing(changes: dict[str, float]) -> None:
    assert after(5, late=5.0, **changes) == 0.0


@pytest.mark.parametrize("kinds", [("interactive", "interactive"), ("interactive", "batch"), ("batch",)])
def test_beside_other_classes_and_for_batch_work_nothing_is_corrected(kinds: tuple[str, ...]) -> None:
    assert after(5, make_spec(kinds=kinds), late=5.0) == 0.0


def test_of_several_pools_nothing_is_corrected() -> None:
    assert after(5, make_spec(pool("one"), pool("other")), late=5.0) == 0.0


def test_fleets_of_a_batch_are_forgotten_and_taken_over_apart() -> None:
    spec = make_spec()
    many, once = StrictnessCorrection(spec, (2,)), after(1, late=5.0)
    many.update(window(spec, late=5.0, batch_shape=(2,)))
    assert many.octaves[:, 0].tolist() == [once, once]
    many.reset(np.array([True, False]))
    assert many.octaves[:, 0].tolist() == [0.0, once]
    many.adopt(StrictnessCorrection(spec, (1,)), np.array([False, True]))
    assert (many.octaves == 0.0).all()
    many.update(window(spec, late=5.0, batch_shape=(2,)))
    assert many.octaves[1, 0] == once  # what it counted was taken over, too
