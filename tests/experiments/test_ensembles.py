"""Majority votes of several models, and what they make of a workload."""

from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.experiments.ensembles import answered_in_time, choose_members, fan_out, vote_accuracy
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.sim.layout import REQUEST
from rl_autoscale.workload.trace import Workload


def test_a_vote_is_right_as_often_as_counting_says() -> None:
    assert vote_accuracy([0.7]) == pytest.approx(0.7)
    assert vote_accuracy([0.7, 0.8, 0.9]) == pytest.approx(0.7 * 0.8 + 0.7 * 0.2 * 0.9 + 0.3 * 0.8 * 0.9)
    assert vote_accuracy([0.8, 0.8]) == pytest.approx(0.8)  # two that differ are a coin's to decide
    assert vote_accuracy([0.6] * 9) == pytest.approx(0.7334, abs=1e-4)
    assert vote_accuracy([0.4] * 9) == pytest.approx(1.0 - 0.7334, abs=1e-4)


def test_what_all_say_alike_is_no_better_than_one() -> None:
    assert vote_accuracy([0.7, 0.8, 0.9], common=1.0) == pytest.approx(0.8)
    assert vote_accuracy([0.8] * 3, common=0.5) == pytest.approx(0.5 * 0.8 + 0.5 * vote_accuracy([0.8] * 3))


def test_votes_agree_with_a_simulated_ballot() -> None:
    rng = np.random.default_rng(0)
    accuracies = np.array([0.55, 0.7, 0.8, 0.9])
    right = (rng.random((200_000, 4)) < accuracies).sum(axis=1)
    drawn = np.where(right == 2, rng.random(200_000) < 0.5, right > 2).mean()
    assert vote_accuracy(accuracies.tolist()) == pytest.approx(drawn, abs=4e-3)


ACCURACIES = {"weak": 0.55, "a": 0.8, "b": 0.8, "c": 0.8, "large": 0.86}
PRICE = {"weak": 0.1, "a": 1.0, "b": 1.0, "c": 1.0, "large": 5.0}


@pytest.mark.parametrize(
    ("wanted", "members"), [(0.5, ("weak",)), (0.8, ("a",)), (0.85, ("a", "b", "c")), (0.91, ("a", "b", "large"))]
)
def test_the_cheapest_set_that_is_good_enough(wanted: float, members: tuple[str, ...]) -> None:
    """Nobody pays for a weak voter that does harm, nor for the large model while three small ones do."""
    assert choose_members(ACCURACIES, PRICE, wanted) == members


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(SpecError, match="the best set is"):
        choose_members(ACCURACIES, PRICE, 0.99)
    with pytest.raises(SpecError, match="at most 12"):
        choose_members({str(k): 0.5 for k in range(13)}, {}, 0.5)
    for wrong in ([], [1.2], [0.5, float("nan")]):
        with pytest.raises(SpecError, match=r"must be in \[0, 1\]"):
            vote_accuracy(wrong)


def test_every_question_is_asked_of_every_member_and_waits_for_the_last_vote() -> None:
    workload = Workload(
        np.array([0.5, 2.0]),
        np.array([10, 20], dtype=np.int32),
        np.array([3, 4], dtype=np.int32),
        np.zeros(2, dtype=np.int16),
        ("chat",),
        5.0,
    )
    asked = fan_out(workload, ("a", "b", "c"))
    assert asked.class_names == ("a", "b", "c")
    assert asked.class_index.tolist() == [0, 1, 2, 0, 1, 2]
    assert asked.arrival_s.tolist() == [0.5, 0.5, 0.5, 2.0, 2.0, 2.0]
    assert asked.prompt_tokens.tolist() == [10, 10, 10, 20, 20, 20]
    requests = np.zeros(6, dtype=REQUEST)
    requests["slo_met"] = [1, 1, 1, 1, 0, 1]
    assert answered_in_time(requests, 3).tolist() == [True, False]
