"""The live gateway and the emulator's engine against the simulator: same arrivals, same fate of each request."""

from __future__ import annotations

from collections import Counter

import numpy as np
from virtual_fleet import VirtualFleet

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NO_LIMIT, ScalingDecision
from rl_autoscale.serving.gateway.tickets import State
from rl_autoscale.serving.gateway_api import GatewayDecision
from rl_autoscale.sim.episode import draw_routing
from rl_autoscale.sim.layout import Outcome
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.workload.trace import Workload

PROFILE, OTHER_HARDWARE = "llama-3.1-8b_a100_tp1", "llama-3.1-8b_l40s_tp1"
STATES = {
    State.FINISHED: {Outcome.FINISHED},
    State.REFUSED: {Outcome.REFUSED},
    State.DROPPED: {Outcome.QUEUE_FULL, Outcome.TIMED_OUT},
    State.QUEUED: {Outcome.UNFINISHED},
}


def tight_fleet(rng: np.random.Generator, router: str) -> FleetSpec:
    """Small batches and KV caches, short queues, little patience."""
    batch_limit = int(rng.integers(1, 5))
    roles = [("mixed",), ("interactive", "mixed"), ("mixed", "mixed")][rng.integers(3)]
    pools = [
        {
            "name": f"{role}{number}",
            "role": role,
            "profile": (PROFILE, OTHER_HARDWARE)[number],
            "initial_replicas": int(rng.integers(1, 4)),
            "max_num_seqs": batch_limit,
            "max_num_batched_tokens": int(rng.choice([64, 256])),
            "kv_blocks": int(rng.choice([20, 60])),
            "scheduler": str(rng.choice(["vllm", "vllm-priority"])),
        }
        for number, role in enumerate(roles)
    ]
    classes = [
        {
            "name": kind,
            "kind": kind,
            "ttft_slo_s": float(rng.choice([0.1, 0.4])),
            "tpot_slo_s": 0.02,
            "priority": priority,
            "queue_limit": int(rng.choice([1, 4, 100])),
            "timeout_s": rng.choice([None, 0.5]),
        }
        for priority, kind in enumerate(("interactive", "batch"))
    ]
    return FleetSpec.from_dict({"pools": pools, "classes": classes, "router": router, "evict_batch": False})


def burst(rng: np.random.Generator, spec: FleetSpec) -> Workload:
    """Forty requests within two seconds."""
    return Workload(
        np.sort(rng.uniform(0.0, 2.0, 40)),
        rng.integers(1, 200, 40, dtype=np.int32),
        rng.integers(1, 60, 40, dtype=np.int32),
        rng.integers(0, 2, 40, dtype=np.int16),
        spec.class_names,
        3.0,
    )


def test_requests_meet_the_same_fate_as_in_the_simulator() -> None:
    met: Counter[object] = Counter()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        spec = tight_fleet(rng, ("round_robin", "least_loaded", "power_of_two", "packing")[seed % 4])
        workload = burst(rng, spec)
        caps = rng.integers(1, spec.pools[0].batch_limit + 1, len(spec.pools))
        admission = rng.choice([np.inf, 1.5, 0.8], 2)
        limits = rng.choice([NO_LIMIT, NO_LIMIT, 3, 1], 2)
        selectivity = rng.choice([0.0, 0.5, 2.0], 2)

        simulated = ReferenceFleet(spec, workload, seed=seed)
        simulated.apply(ScalingDecision(spec.initial_replicas, caps, admission, limits, selectivity))
        while simulated.advance():
            pass
        simulated.result()

        live = VirtualFleet(spec, workload, iter(draw_routing(seed, workload.num_requests)).__next__)
        levels = {
            name: None if np.isinf(level) else level for name, level in zip(spec.class_names, admission, strict=True)
        }
        in_flight = {
            name: None if limit == NO_LIMIT else limit for name, limit in zip(spec.class_names, limits, strict=True)
        }
        batch_sizes = dict(zip(spec.pool_names, caps, strict=True))
        weighed = dict(zip(spec.class_names, selectivity, strict=True))
        decision = GatewayDecision(
            max_batch_size=batch_sizes, admission=levels, max_in_flight=in_flight, selectivity=weighed
        )
        live.core.decide(decision, 0.0)
        live.run()

        for ticket, request, expected in zip(live.tickets, live.requests, simulated.requests, strict=True):
            met[expected.outcome] += 1
            assert expected.outcome in STATES[ticket.state], f"seed {seed}, request {expected.index}: {ticket}"
            if ticket.state is State.FINISHED:
                np.testing.assert_allclose(
                    (ticket.sent_s, request.first_token_s, request.end_s),
                    (expected.dispatched_s, expected.first_token_s, expected.end_s),
                    rtol=1e-9,
                )
        for book, expected_books in zip(live.core.classes, simulated.gateway.books, strict=True):
            assert book.met == expected_books.met
            assert book.late_first_tokens == expected_books.late_first_tokens
            assert book.slow_answers == expected_books.slow_answers
            met["met"] += book.met
        met["preempted"] += sum(request.num_preemptions for request in live.requests)
    hard_cases = (Outcome.FINISHED, Outcome.REFUSED, Outcome.QUEUE_FULL, Outcome.TIMED_OUT, "met", "preempted")
    assert all(met[case] > 10 for case in hard_cases), met
