"""Headroom with the learned policy's backpressure: the same replicas, another batch cap, and a refusal that learns."""

from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.headroom import HeadroomPolicy
from rl_autoscale.agents.headroom_backpressure import HeadroomBackpressurePolicy
from rl_autoscale.fleet.corrections import CapCorrection, StrictnessCorrection
from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NEVER_REFUSE
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.workload.length_spec import resolve_lengths
from rl_autoscale.workload.lengths import sample_lengths
from rl_autoscale.workload.trace import Workload

LOAD = {
    "arrivals_per_s": 5.0, "arrived_prompt_tokens_per_s": 10_000.0, "mean_output_tokens": 28.0, "finished_per_s": 4.0,
    "met_per_s": 4.0, "admission": 1.0,
}  # fmt: skip


def decisions(policy, spec, make_state, num_steps: int = 30, **signals):
    policy.reset(spec)
    return [policy.decide(make_state(spec, time_s=10.0 * step, **(LOAD | signals))) for step in range(1, num_steps + 1)]


def test_replicas_are_those_of_headroom(make_spec, make_state):
    spec = make_spec("mixed")
    plain, ours = (
        decisions(rule(headroom=2.0), spec, make_state) for rule in (HeadroomPolicy, HeadroomBackpressurePolicy)
    )
    assert [int(d.target_replicas[0]) for d in ours] == [int(d.target_replicas[0]) for d in plain]


def test_the_batch_cap_is_what_meets_the_slos_and_at_most_the_knob(make_spec, make_state):
    spec = make_spec("mixed")
    demand = DemandEstimator(spec, (30.0, 120.0))
    for step in range(1, 31):
        demand.update(make_state(spec, time_s=10.0 * step, **LOAD))
    law = round(float(demand.in_flight(1)[0]))
    assert 1 < law < spec.batch_limits[0]
    assert decisions(HeadroomBackpressurePolicy(), spec, make_state)[-1].max_batch_size[0] == law
    assert decisions(HeadroomBackpressurePolicy(batch_cap=law - 1), spec, make_state)[-1].max_batch_size[0] == law - 1


@pytest.mark.parametrize(
    ("seen", "stricter"),
    [({"late_first_tokens_per_s": 1.0}, True), ({"slow_answers_per_s": 1.0}, True), ({"refused_per_s": 1.0}, False)],
)
def test_refusal_learns_from_what_became_of_it(make_spec, make_state, seen, stricter):
    last = decisions(HeadroomBackpressurePolicy(admission=1.0), make_spec("mixed"), make_state, **seen)[-1]
    assert (last.admission[0] < 1.0) == stricter
    assert last.admission[0] != 1.0
    never = decisions(HeadroomBackpressurePolicy(), make_spec("mixed"), make_state, **seen, admission=np.inf)[-1]
    assert never.admission[0] == NEVER_REFUSE


@pytest.mark.parametrize(("seen", "falls"), [({"slow_answers_per_s": 1.0}, True), ({"refused_per_s": 1.0}, False)])
def test_the_batch_cap_learns_from_slow_answers(make_spec, make_state, seen, falls):
    law, learned = (
        decisions(HeadroomBackpressurePolicy(), make_spec("mixed"), make_state, **signals)[-1].max_batch_size[0]
        for signals in ({}, seen)
    )
    assert (learned < law) == falls


def loaded(speed: float) -> tuple[int, int]:
    """Requests refused, and served late, by one well-filled replica that takes ``speed`` times the profile's time."""
    rng = np.random.default_rng(0)
    number = 6000
    prompt, output = sample_lengths(rng, resolve_lengths("azure_conv"), number)
    arrivals = np.sort(rng.uniform(0.0, 900.0 * speed, number))
    workload = Workload(arrivals, prompt, output, np.zeros(number, dtype=np.int16), ("chat",), 900.0 * speed)
    pool = {"name": "gpu", "profile": "llama-3.1-8b_a100_tp1", "min_replicas": 1, "max_replicas": 1}
    chat = {"name": "chat", "kind": "interactive", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
    fleet = SimFleet(FleetSpec.from_dict({"pools": [pool], "classes": [chat]}), workload, speed=speed)
    run_control_loop(fleet, HeadroomBackpressurePolicy(admission=1.0))
    result = fleet.result()
    late = result.outcomes["finished"] - round(result.slo_attainment * number)
    return result.outcomes["refused"], late


def test_where_iterations_take_longer_than_the_profile_says_fewer_come_late(monkeypatch):
    """Half as long again, which nobody tells the estimate of the wait; where it is right, little is to mend."""
    right, slow = loaded(1.0), loaded(1.5)
    for correction in (StrictnessCorrection, CapCorrection):
        monkeypatch.setattr(correction, "update", lambda self, state: None)
    right_blind, slow_blind = loaded(1.0), loaded(1.5)
    assert slow[1] < 0.5 * slow_blind[1]
    assert sum(slow) < 0.8 * sum(slow_blind)
    assert sum(right) == pytest.approx(sum(right_blind), abs=10)
