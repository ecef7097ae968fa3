"""Refusal and batch cap correct themselves: stricter where requests come late, laxer where none does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.corrections import BALANCE, CapCorrection, StrictnessCorrection
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState
from tests.fleet.conftest import make_spec, make_state, pool

BOTH = (StrictnessCorrection, CapCorrection)


def window(
    spec: FleetSpec, *, late: float = 0.0, slow: float = 0.0, refused: float = 0.0, **changes: Any
) -> FleetState:
    """Ten seconds in which 100 requests a second arrive: so many begin late, so many are slow, so many are refused."""
    seen = {"arrivals_per_s": 100.0, "refused_per_s": refused, "finished_per_s": 80.0, "met_per_s": 80.0 - late - slow}
    told = {"late_first_tokens_per_s": late, "slow_answers_per_s": slow, "admission": 1.0}
    return make_state(spec, **(seen | told | changes))


def after(
    num_windows: int,
    spec: FleetSpec | None = None,
    kind: type[StrictnessCorrection | CapCorrection] = StrictnessCorrection,
    **seen: Any,
) -> float:
    spec = make_spec() if spec is None else spec
    correction = kind(spec)
    for _ in range(num_windows):
        correction.update(window(spec, **seen))
    assert correction.factor == pytest.approx(2.0**-correction.octaves)
    return float(correction.octaves[0])


@pytest.mark.parametrize("seen", [{"late": 5.0}, {"slow": 5.0}], ids=["late", "slow"])
def test_refusal_is_stricter_where_requests_come_late_and_laxer_where_they_are_refused(seen: dict[str, float]) -> None:
    laxest, strictest = StrictnessCorrection.LAXEST, StrictnessCorrection.STRICTEST
    assert 0.0 < after(1, **seen) < after(5, **seen) <= strictest
    assert laxest <= after(5, refused=5.0) < after(1, refused=5.0) < 0.0
    assert after(500, **seen) == strictest
    assert after(500, refused=5.0) == laxest


def test_the_cap_falls_where_answers_are_slow_and_never_rises_above_what_the_load_allows() -> None:
    assert 0.0 < after(1, kind=CapCorrection, slow=5.0) < after(5, kind=CapCorrection, slow=5.0)
    assert after(500, kind=CapCorrection, slow=5.0) == CapCorrection.STRICTEST
    assert after(5, kind=CapCorrection, late=5.0) == after(5, kind=CapCorrection, refused=5.0) == 0.0


@pytest.mark.parametrize("seen", [{"late": 5.0}, {"refused": 5.0}], ids=["late", "refused"])
def test_the_cap_rises_again_where_requests_wait(seen: dict[str, float]) -> None:
    spec = make_spec()
    correction = CapCorrection(spec)
    for _ in range(5):
        correction.update(window(spec, slow=5.0))
    fallen = float(correction.octaves[0])
    correction.update(window(spec, **seen))
    assert 0.0 < correction.octaves[0] < fallen


@pytest.mark.parametrize("kind", BOTH)
def test_in_balance_it_stays(kind: type[StrictnessCorrection | CapCorrection]) -> None:
    assert after(50, kind=kind, refused=10.0, slow=10.0 * BALANCE) == pytest.approx(0.0, abs=1e-9)


def test_short_answers_that_are_late_say_nothing() -> None:
    for kind in BOTH:
        assert after(50, kind=kind, met_per_s=60.0) == 0.0


@pytest.mark.parametrize("kind", BOTH)
def test_misses_that_are_few_say_little(kind: type[StrictnessCorrection | CapCorrection]) -> None:
    assert 0.0 < after(5, kind=kind, slow=0.01) < 0.2 * after(5, kind=kind, slow=5.0)


@pytest.mark.parametrize(
    "changes", [{"admission": np.inf}, {"slow_answers_per_s": np.nan}, {"age_s": 10.0}], ids=["open", "unknown", "old"]
)
@pytest.mark.parametrize("kind", BOTH)
def test_a_window_that_cannot_tell_says_nothing(
    kind: type[StrictnessCorrection | CapCorrection], changes: dict[str, float]
) -> None:
    assert after(5, kind=kind, **({"slow": 5.0} | changes)) == 0.0


@pytest.mark.parametrize("kinds", [("interactive", "interactive"), ("interactive", "batch"), ("batch",)])
def test_beside_other_classes_and_for_batch_work_nothing_is_corrected(kinds: tuple[str, ...]) -> None:
    for kind in BOTH:
        assert after(5, make_spec(kinds=kinds), kind, slow=5.0) == 0.0


def test_of_several_pools_nothing_is_corrected() -> None:
    for kind in BOTH:
        assert after(5, make_spec(pool("one"), pool("other")), kind, slow=5.0) == 0.0


@pytest.mark.parametrize("kind", BOTH)
def test_fleets_of_a_batch_are_forgotten_and_taken_over_apart(
    kind: type[StrictnessCorrection | CapCorrection],
) -> None:
    spec = make_spec()
    many, once = kind(spec, (2,)), after(1, kind=kind, slow=5.0)
    many.update(window(spec, slow=5.0, batch_shape=(2,)))
    assert many.octaves[:, 0].tolist() == [once, once]
    many.reset(np.array([True, False]))
    assert many.octaves[:, 0].tolist() == [0.0, once]
    many.adopt(kind(spec, (1,)), np.array([False, True]))
    assert (many.octaves == 0.0).all()
    many.update(window(spec, slow=5.0, batch_shape=(2,)))
    assert many.octaves[1, 0] == once  # what it counted was taken over, too
