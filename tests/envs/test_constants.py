"""Constants of a policy: one number or several by price, and what they do to a decision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rl_autoscale.envs.action import ActionDecoder
from rl_autoscale.envs.constants import Constants, mean_constants
from rl_autoscale.envs.mdp import EpisodeSetup, FleetMdp
from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.errors import SpecError

from .toy import SHIELD, poisson_workload, sampler, toy_spec


def test_one_number_holds_at_every_price():
    at = Constants(hysteresis=0.3).at(np.array([[0.1, 20.0], [600.0, 1e9]]))
    assert at.hysteresis.tolist() == [[0.3, 0.3], [0.3, 0.3]]
    assert (at.selectivity == 0.0).all()
    assert (at.cap_share == 1.0).all()


def test_several_cover_the_prices_evenly_in_their_logarithm():
    constants = Constants(hysteresis=(0.0, 0.1, 0.5), miss_price=(1.0, 100.0))
    at = constants.at(np.array([0.01, 1.0, 10.0**0.5, 10.0, 10.0**1.5, 100.0, 1e6])).hysteresis
    assert at == pytest.approx([0.0, 0.0, 0.05, 0.1, 0.3, 0.5, 0.5])


def test_what_is_alike_at_all_prices_is_one_number_and_a_card_says_so():
    assert Constants(cap_share=(0.5, 0.5)).cap_share == 0.5
    assert Constants(cap_share=[0.5, 1.0]).to_card() == {
        "hysteresis": 0.0, "selectivity": 0.0, "cap_share": [0.5, 1.0], "found_share": 0.0, "least_replicas": 0.0,
    }  # fmt: skip


def test_no_replica_takes_a_share_of_nothing():
    with pytest.raises(SpecError, match="cap_share=0 is not allowed; it must be more than 0, one number or several"):
        Constants(cap_share=0)


def test_nobody_keeps_more_than_was_found():
    with pytest.raises(SpecError, match=r"found_share=1.2 is not allowed; it must be 0 to 1, one number or several"):
        Constants(found_share=1.2)


def test_a_fleet_in_training_is_found_as_somebody_sized_it_who_knew_its_load():
    workload = poisson_workload(20.0, 400.0, seed=0)
    late = replace(workload, arrival_s=300.0 + workload.arrival_s / 4.0)  # the first minute says nothing
    mean = DemandEstimator(toy_spec()).request_work_s(late.prompt_tokens, late.output_tokens, late.class_index).sum()
    found = []
    for headroom in (1.0, 2.5):
        mdp = FleetMdp(toy_spec(), SHIELD, lambda _: EpisodeSetup(late, 20.0, initial_headroom=headroom))  # noqa: B023
        mdp.reset(0)
        assert mdp.state is not None
        found.append(mdp.state.pools.asked_for.item())
    assert found == [np.ceil(mean / 400.0), np.ceil(2.5 * mean / 400.0)]


def test_what_was_found_is_kept_for_a_while_and_most_of_it_where_misses_are_dear():
    mdp = FleetMdp(
        toy_spec(initial_replicas=7), SHIELD, sampler(rate_per_s=2.0, span_s=2000.0), num_fleets=3,
        constants=Constants(found_share=(0.0, 0.5, 1.0), miss_price=(1.0, 100.0)),
    )  # fmt: skip
    mdp.reset(0)
    mdp.miss_price[:] = 1.0, 10.0, 100.0
    idle = -np.ones((3, ActionDecoder(mdp.spec).num_actions))
    assert mdp.state is not None
    found = mdp.state.pools.asked_for[:, 0].copy()
    kept = np.array([mdp.step(idle).decision.target_replicas[:, 0] for _ in range(300)])
    age_s = np.arange(300) * mdp.spec.control_interval_s
    for fleet, share in enumerate((0.0, 0.5, 1.0)):
        least = np.ceil(share * found[fleet] * np.exp(-age_s / 900.0) - 1e-9)
        assert least[1] == np.ceil(share * 7 * np.exp(-5 / 900))
        assert (kept[1:, fleet] == np.maximum(least, kept[:, 0])[1:]).all()


def test_no_lull_takes_the_least_replicas_of_a_price():
    mdp = FleetMdp(
        toy_spec(initial_replicas=1, max_replicas=6), SHIELD, sampler(rate_per_s=2.0, span_s=2000.0), num_fleets=4,
        constants=Constants(least_replicas=(0.0, 3.4, 9.0), miss_price=(1.0, 100.0)),
    )  # fmt: skip
    mdp.reset(0)
    mdp.miss_price[:] = 1.0, 10.0**0.5, 10.0, 100.0
    idle = -np.ones((4, ActionDecoder(mdp.spec).num_actions))
    kept = np.array([mdp.step(idle).decision.target_replicas[:, 0] for _ in range(300)])
    assert kept[:, 0].min() == 1
    assert (kept[1:, 1:].min(axis=0) == [2, 4, 6]).all()  # between two prices between theirs; never above the maximum


def test_one_price_has_one_value():
    with pytest.raises(SpecError, match=r"hysteresis=\(0.1, 0.2\) has 2 values for one price, 20; give one"):
        Constants(hysteresis=(0.1, 0.2), miss_price=(20.0, 20.0))


def test_fleets_at_different_prices_have_different_constants():
    mdp = FleetMdp(
        toy_spec(), SHIELD, sampler(rate_per_s=20.0), num_fleets=2,
        constants=Constants(cap_share=(0.5, 1.0), selectivity=(0.0, 0.6), miss_price=(2.0, 200.0)),
    )  # fmt: skip
    mdp.reset(0)
    mdp.miss_price[:] = 2.0, 200.0
    neutral_action = np.zeros((2, ActionDecoder(mdp.spec).num_actions))
    for _ in range(3):
        step = mdp.step(neutral_action)
        mdp.state, before = step.state, mdp.encoder.anchors().in_flight
    decided = mdp.step(neutral_action).decision
    law = np.clip(np.round(np.array([[0.5], [1.0]]) * before), 1, mdp.spec.batch_limits)
    assert decided.max_batch_size.tolist() == law.tolist()
    assert decided.max_batch_size[0, 0] < decided.max_batch_size[1, 0]
    assert decided.selectivities.tolist() == [[0.0], [0.6]]


def test_over_other_prices_they_are_what_held_there():
    constants = Constants(hysteresis=(0.0, 0.4), selectivity=0.5, miss_price=(1.0, 100.0))
    over = constants.over((10.0, 1000.0))
    assert over.hysteresis == pytest.approx((0.2, 0.4))
    assert (over.selectivity, over.cap_share, over.miss_price) == (0.5, 1.0, (10.0, 1000.0))
    assert constants.over((10.0, 10.0)).hysteresis == pytest.approx(0.2)
    assert constants.over((1.0, 100.0)) == constants


def test_the_mean_of_several_keeps_what_they_agree_on():
    by_price = Constants(hysteresis=(0.0, 0.2, 0.4), cap_share=0.5, miss_price=(1.0, 100.0))
    mean = mean_constants([by_price, Constants(hysteresis=0.2, cap_share=1.0, miss_price=(1.0, 100.0))])
    assert mean.hysteresis == pytest.approx((0.1, 0.2, 0.3))
    assert (mean.cap_share, mean.selectivity) == (0.75, 0.0)
    assert mean_constants([by_price, by_price]) == by_price
