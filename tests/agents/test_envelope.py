"""The bounds of training: what is inside, what is unusual, and cards of every age."""

from __future__ import annotations

import numpy as np

from rl_autoscale.agents.envelope import Envelope

NAMES = tuple(f"f{k}" for k in range(20))


def fitted():
    return Envelope.fit(np.random.default_rng(0).normal(size=(5000, 20)), NAMES)


def test_training_itself_is_usual_and_another_world_is_not():
    envelope = fitted()
    rng = np.random.default_rng(1)
    ordinary = [len(envelope.outside(rng.normal(size=20))) for _ in range(500)]
    assert np.mean(np.array(ordinary) > envelope.usually_outside) < 0.02
    assert len(envelope.outside(rng.normal(size=20) + 9.0)) == 20


def test_a_constant_feature_has_a_margin_too():
    envelope = Envelope.fit(np.ones((50, 1)), ("a",))
    assert envelope.outside(np.array([1.05])) == ()
    assert envelope.outside(np.array([1.5])) == ("a",)


def test_a_card_gives_back_what_was_written():
    envelope = fitted()
    again = Envelope.from_card({"features": list(NAMES), "training": envelope.to_card()})
    np.testing.assert_array_equal(again.low, envelope.low)
    assert again.usually_outside == envelope.usually_outside


def test_cards_without_counts_get_a_tenth_and_cards_without_bounds_nothing():
    old = fitted().to_card()
    del old["envelope_outside"]
    assert Envelope.from_card({"features": list(NAMES), "training": old}).usually_outside == 2
    assert Envelope.from_card({"features": list(NAMES)}) is None
    assert Envelope.from_card({"features": ["other"], "training": fitted().to_card()}) is None
