"""Hypothesis strategies for the package's vocabulary: small fleets, what they may see, and what they may be told.

Small on purpose: a failing example must be readable. Fleets are tight (few KV blocks, small batches, short queues):
laws break when something is full. `test_strategies.py` checks that the strategies reach those cases.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from hypothesis import strategies as st

from rl_autoscale.fleet.pool import PoolSpec, Role, StartupPhase
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.fleet.spec import ROLES_SERVING, FleetSpec, ServiceClass
from rl_autoscale.fleet.state import ClassTelemetry, FleetState, PoolTelemetry, ScalingDecision
from rl_autoscale.workload.trace import Workload

PROFILE = "llama-3.1-8b_a100_tp1"
MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS = 200, 60
SMALLEST_KV_BLOCKS = -(-(MAX_PROMPT_TOKENS + MAX_OUTPUT_TOKENS) // BLOCK_SIZE_TOKENS)
"""Any one request fits an empty replica; two large ones do not."""


@st.composite
def service_classes(draw: st.DrawFn, name: str) -> ServiceClass:
    """One class; batch classes have loose SLOs, queues are short or long."""
    interactive = draw(st.booleans())
    return ServiceClass(
        name=name,
        kind="interactive" if interactive else "batch",
        ttft_slo_s=draw(st.sampled_from([0.2, 1.0, 5.0])) * (1 if interactive else 100),
        tpot_slo_s=draw(st.sampled_from([0.02, 0.1])),
        deadline_s=draw(st.sampled_from([None, 1000.0])),
        priority=draw(st.integers(0, 2)),
        queue_limit=draw(st.sampled_from([0, 3, 2000])),
        timeout_s=draw(st.sampled_from([None, 2.0, 60.0])),
    )


@st.composite
def pool_specs(draw: st.DrawFn, name: str, role: Role) -> PoolSpec:
    """One pool of at most four replicas whose batches and KV caches fill quickly."""
    smallest = draw(st.integers(0, 2))
    largest = draw(st.integers(max(smallest, 1), 4))
    max_num_seqs = draw(st.integers(1, 8))
    return PoolSpec(
        name=name,
        role=role,
        profile=PROFILE,
        min_replicas=smallest,
        max_replicas=largest,
        initial_replicas=draw(st.integers(smallest, largest)),
        startup=(StartupPhase(mean_s=draw(st.sampled_from([0.0, 5.0, 30.0])), cv=draw(st.sampled_from([0.0, 0.25]))),),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max(max_num_seqs, 16), 256)),
        kv_blocks=draw(st.integers(SMALLEST_KV_BLOCKS, 3 * SMALLEST_KV_BLOCKS)),
        scheduler=draw(st.sampled_from(["vllm", "vllm-priority"])),
    )


@st.composite
def fleet_specs(draw: st.DrawFn, max_classes: int = 2) -> FleetSpec:
    """A fleet of one to three pools in which every class has a pool that may serve it."""
    classes = tuple(draw(service_classes(f"class{c}")) for c in range(draw(st.integers(1, max_classes))))
    roles = [draw(st.sampled_from(ROLES_SERVING[item.kind])) for item in classes]
    roles += draw(st.lists(st.sampled_from(["interactive", "mixed", "batch"]), max_size=3 - len(roles)))
    return FleetSpec(
        pools=tuple(draw(pool_specs(f"pool{p}", role)) for p, role in enumerate(roles)),
        classes=classes,
        router=draw(st.sampled_from(["round_robin", "least_loaded", "power_of_two", "packing"])),
        control_interval_s=draw(st.sampled_from([1.0, 10.0])),
        telemetry_age_s=draw(st.sampled_from([0.0, 1.0])),
        evict_batch=draw(st.booleans()),
    )


@st.composite
def workloads(draw: st.DrawFn, class_names: tuple[str, ...], max_requests: int = 40) -> Workload:
    """A short workload, bunched arrivals included; every request fits the fleets of `fleet_specs`."""
    num_requests = draw(st.integers(1, max_requests))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mean_gap_s = draw(st.sampled_from([0.0, 0.01, 0.3, 3.0]))
    arrival_s = np.cumsum(rng.exponential(mean_gap_s, num_requests)) if mean_gap_s else np.zeros(num_requests)
    return Workload(
        arrival_s=arrival_s,
        prompt_tokens=rng.integers(1, MAX_PROMPT_TOKENS, num_requests, endpoint=True, dtype=np.int32),
        output_tokens=rng.integers(1, MAX_OUTPUT_TOKENS, num_requests, endpoint=True, dtype=np.int32),
        class_index=rng.integers(0, len(class_names), num_requests, dtype=np.int16),
        class_names=class_names,
        span_s=float(arrival_s[-1]) + 1.0,
    )


@st.composite
def fleet_states(draw: st.DrawFn, spec: FleetSpec) -> FleetState:
    """What a scrape may deliver: any non-negative number, or NaN where a signal is missing."""
    signal = st.one_of(st.integers(0, 8).map(float), st.floats(0, 1e6, allow_subnormal=False), st.just(np.nan))

    def matrix(num_items: int, num_fields: int) -> np.ndarray:
        size = num_items * num_fields
        return np.array(draw(st.lists(signal, min_size=size, max_size=size))).reshape(num_items, num_fields)

    return FleetState(
        time_s=np.array(draw(st.floats(0, 1e6))),
        window_s=np.array(spec.control_interval_s),
        pools=PoolTelemetry.from_matrix(matrix(len(spec.pools), len(fields(PoolTelemetry)))),
        classes=ClassTelemetry.from_matrix(matrix(len(spec.classes), len(fields(ClassTelemetry)))),
    )


@st.composite
def scaling_decisions(draw: st.DrawFn, spec: FleetSpec) -> ScalingDecision:
    """What a policy may ask for, far outside the fleet's limits included."""
    num_pools, num_classes = len(spec.pools), len(spec.classes)
    replicas = st.one_of(st.integers(0, 6), st.integers(0, 10**6))
    admission = st.one_of(st.just(np.inf), st.floats(0, 5))
    return ScalingDecision(
        target_replicas=np.array(draw(st.lists(replicas, min_size=num_pools, max_size=num_pools)), dtype=np.int64),
        max_batch_size=np.array(
            draw(st.lists(st.integers(1, 512), min_size=num_pools, max_size=num_pools)), dtype=np.int64
        ),
        admission=np.array(draw(st.lists(admission, min_size=num_classes, max_size=num_classes)), dtype=np.float64),
    )
