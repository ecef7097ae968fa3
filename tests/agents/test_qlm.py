from __future__ import annotations

import numpy as np
import pytest

from rl_autoscale.agents.qlm import QlmPolicy
from rl_autoscale.agents.registry import make_policy
from rl_autoscale.experiments.validation.waiting_time import WaitingTimes, measure_waiting_times
from rl_autoscale.fleet.protocols import run_control_loop
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.workload.length_spec import resolve_lengths
from rl_autoscale.workload.lengths import sample_lengths
from rl_autoscale.workload.trace import Workload

JOBS = {"name": "jobs", "kind": "batch", "ttft_slo_s": 600.0, "tpot_slo_s": 1.0}


def queued(spec, make_state, queue: float, wait_s: float, time_s: float = 100.0, **given):
    given = {"ready": 2, "queue_length": queue, "oldest_wait_s": wait_s} | given
    return make_state(spec, time_s=time_s, **given)


def first_target(spec, state, **knobs):
    policy = QlmPolicy(**knobs)
    policy.reset(spec)
    return int(policy.decide(state).target_replicas[0])


def test_a_queue_that_keeps_its_time_adds_nothing_and_one_that_does_not_adds_enough(make_spec, make_state):
    spec = make_spec(classes=(JOBS,), pool={"max_replicas": 100})
    policy = QlmPolicy()
    policy.reset(spec)
    rate = policy._queues[0].instance_rate(0, 256.0)
    fits = int(2 * rate * 500.0 / 200.0 * 0.8)  # two replicas, 500 s left, 200 tokens each
    assert first_target(spec, queued(spec, make_state, fits, 100.0), z=0.0) == 2
    late = first_target(spec, queued(spec, make_state, 5 * fits, 100.0), z=0.0)
    needed = 5 * 0.8 * 2 - 2  # five queues of 0.8 of what two replicas do, less those two
    assert late == pytest.approx(2 + needed * 500 / (500 - 60), abs=1)
    assert first_target(spec, queued(spec, make_state, 5 * fits, 100.0), z=3.0) > late - 1


def test_arrivals_that_cannot_wait_set_the_base_and_shrinking_waits_a_load_time(make_spec, make_state):
    chat = {"name": "chat", "ttft_slo_s": 20.0, "tpot_slo_s": 1.0}
    spec = make_spec(classes=(chat,), pool={"max_replicas": 100})
    policy = QlmPolicy(load_share=0.5)
    policy.reset(spec)
    rate = policy._queues[0].instance_rate(0, 256.0) / 200.0
    busy = {"arrivals_per_s": 4.9 * rate, "arrived_prompt_tokens_per_s": 4.9 * rate * 1024}
    assert policy.decide(queued(spec, make_state, 0, 0.0, 0.0, **busy)).target_replicas[0] == 10
    calm = {"arrivals_per_s": 0.9 * rate, "arrived_prompt_tokens_per_s": 0.9 * rate * 1024, "ready": 10}
    seen = [
        int(policy.decide(queued(spec, make_state, 0, 0.0, 10.0 * k, **calm)).target_replicas[0]) for k in range(4, 8)
    ]
    assert seen == [10, 10, 9, 9]
    patient = make_spec(classes=(JOBS,), pool={"max_replicas": 100})
    assert first_target(patient, queued(patient, make_state, 0, 0.0, **busy)) == 2


def test_what_a_group_needs_is_not_taken_away(make_spec, make_state):
    spec = make_spec(classes=(JOBS,), pool={"max_replicas": 100})
    policy = QlmPolicy(z=0.0)
    policy.reset(spec)
    per_replica = policy._queues[0].instance_rate(0, 256.0) * 400.0 / 200.0  # in the 400 s left

    def later(queue: float) -> int:
        policy.reset(spec)
        for time_s in (0.0, 60.0):
            state = queued(spec, make_state, queue, 200.0, time_s, ready=5)
            target = policy.decide(state).target_replicas[0]
        return int(target)

    assert later(4.5 * per_replica) == 5
    assert later(3.5 * per_replica) == 4


def test_waiting_times_are_right_for_long_queues_and_not_for_short_ones():
    runs = [measure_waiting_times(seed) for seed in range(6)]
    every = WaitingTimes(*(np.concatenate([getattr(run, name) for run in runs]) for name in WaitingTimes.__slots__))
    long, short = (np.abs(every.between(*bounds).relative_error) for bounds in ((200, 1000), (1, 60)))
    assert long.mean() < 0.08
    assert np.quantile(long, 0.95) < 0.15
    assert short.mean() > 1.5 * long.mean()
    assert every.between(30, 300).coverage(1.645) > 0.75  # asked: 0.95; the errors of rate and mean are not in it
    assert every.coverage(0.0) < every.coverage(1.645)
    assert every.between(30, 1000).r_squared > 0.95


def test_a_backlog_with_hours_to_spare_is_not_rushed():
    """The estimator's use: replicas for deadlines, not for queue length. Against KEDA's queue trigger."""
    number = 4000
    prompt, output = sample_lengths(np.random.default_rng(0), resolve_lengths("azure_conv"), number)
    workload = Workload(np.zeros(number), prompt, output, np.zeros(number, dtype=np.int16), ("jobs",), 60.0)
    slo = {**JOBS, "ttft_slo_s": 900.0, "queue_limit": number}
    pool = {"name": "a", "profile": "llama-3.1-8b_a100_tp1", "max_replicas": 40}
    spec = FleetSpec.from_dict({"pools": [pool], "classes": [slo]})

    def served(name: str):
        fleet = SimFleet(spec, workload)
        run_control_loop(fleet, make_policy(name, batch_cap=64))
        return fleet.result()

    patient, eager = served("qlm"), served("keda")
    assert patient.slo_attainment > 0.99
    assert eager.slo_attainment > 0.99
    assert patient.gpu_hours < 0.7 * eager.gpu_hours
