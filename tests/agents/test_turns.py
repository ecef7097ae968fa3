from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rl_autoscale.agents.turns import take_turns

ONE_GPU_EACH = np.ones(3, dtype=np.int64)


def turns(needed: list[int], held: list[int], slack_s: list[float], num_gpus: int, margin_s: float = 5.0) -> Any:
    given = take_turns(
        np.array(needed),
        np.array(held),
        np.array(slack_s),
        margin_s=margin_s,
        gpus_each=ONE_GPU_EACH,
        num_gpus=num_gpus,
    )
    return given.tolist()


def test_what_fits_is_given_and_what_nobody_needs_stays_loaded() -> None:
    assert turns([1, 0, 1], [1, 1, 0], [np.inf, np.inf, 50.0], 3) == [1, 1, 1]
    assert turns([1, 0, 1], [1, 1, 0], [np.inf, np.inf, 50.0], 2) == [1, 0, 1]
    assert turns([0, 0, 0], [0, 2, 0], [np.inf] * 3, 4) == [0, 2, 0]


def test_a_loaded_model_with_work_stays_until_another_would_be_late() -> None:
    assert turns([1, 1, 0], [1, 0, 0], [80.0, 20.0, np.inf], 1) == [1, 0, 0]
    assert turns([1, 1, 0], [1, 0, 0], [80.0, 5.0, np.inf], 1) == [0, 1, 0]
    assert turns([1, 1, 0], [1, 0, 0], [-9.0, 5.0, np.inf], 1) == [1, 0, 0]  # the loaded one is later still


def test_of_the_equally_urgent_every_one_gets_a_replica_before_any_gets_two() -> None:
    assert turns([4, 1, 1], [4, 0, 0], [-3.0, 2.0, 1.0], 4) == [2, 1, 1]
    assert turns([4, 3, 0], [4, 0, 0], [60.0, 2.0, np.inf], 4) == [1, 3, 0]
    assert turns([2, 1, 1], [2, 0, 0], [60.0, 70.0, 80.0], 3) == [2, 1, 0]


def test_work_with_time_to_spare_waits_for_work_without() -> None:
    assert turns([3, 1, 0], [1, 1, 1], [-90.0, 3500.0, np.inf], 3) == [3, 0, 0]


COUNTS = hnp.arrays(np.int64, 4, elements=st.integers(0, 5))


@given(
    needed=COUNTS,
    held=COUNTS,
    slack_s=hnp.arrays(np.float64, 4, elements=st.one_of(st.just(np.inf), st.floats(-100, 100))),
    gpus_each=hnp.arrays(np.int64, 4, elements=st.sampled_from([1, 2, 4])),
    num_gpus=st.integers(0, 12),
)
def test_what_is_given_fits_and_no_gpu_idles_that_somebody_could_use(
    needed: Any, held: Any, slack_s: Any, gpus_each: Any, num_gpus: int
) -> None:
    given = take_turns(needed, held, slack_s, margin_s=5.0, gpus_each=gpus_each, num_gpus=num_gpus)
    left = num_gpus - int(given @ gpus_each)
    assert left >= 0
    assert (given <= np.maximum(needed, held)).all()
    assert all(left < gpus_each[p] for p in np.flatnonzero(given < needed))
