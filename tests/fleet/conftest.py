"""A small fleet and states that say only what a test names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import ClassTelemetry, FleetState, PoolTelemetry, ScalingDecision


def pool(name: str, role: str = "mixed", **changes: Any) -> dict[str, Any]:
    base = {"name": name, "role": role, "profile": "llama-3.1-8b_a100_tp1", "min_replicas": 0, "max_replicas": 10}
    return {**base, **changes}


def make_spec(*pools: dict[str, Any], kinds: tuple[str, ...] = ("interactive",), **changes: Any) -> FleetSpec:
    classes = [
        {"name": f"class{c}", "kind": kind, "ttft_slo_s": 1.0, "tpot_slo_s": 0.1} for c, kind in enumerate(kinds)
    ]
    return FleetSpec.from_dict({"pools": list(pools or (pool("gpu"),)), "classes": classes, **changes})


def make_state(
    spec: FleetSpec, *, time_s: Any = 10.0, window_s: Any = 10.0, batch_shape: tuple[int, ...] = (), **signals: Any
) -> FleetState:
    """Signals by field name; everything else is zero."""
    parts = []
    for kind, width in ((PoolTelemetry, len(spec.pools)), (ClassTelemetry, len(spec.classes))):
        shape = (*batch_shape, width)
        columns = {field.name: np.zeros(shape) for field in fields(kind)}
        for name in columns.keys() & signals.keys():
            columns[name] = np.broadcast_to(np.asarray(signals[name], dtype=np.float64), shape).copy()
        parts.append(kind(**columns))
    unknown = signals.keys() - {field.name for kind in (PoolTelemetry, ClassTelemetry) for field in fields(kind)}
    assert not unknown, unknown
    times = np.broadcast_to(np.asarray(time_s, dtype=np.float64), batch_shape)
    return FleetState(times, np.broadcast_to(np.asarray(window_s, dtype=np.float64), batch_shape), *parts)


def make_decision(targets: Any, *, caps: Any = None, admission: Any = np.inf, num_classes: int = 1) -> ScalingDecision:
    targets = np.asarray(targets, dtype=np.int64)
    caps = np.full_like(targets, 8) if caps is None else np.asarray(caps, dtype=np.int64)
    return ScalingDecision(
        targets, caps, np.broadcast_to(np.asarray(admission, dtype=np.float64), (num_classes,)).copy()
    )


@pytest.fixture
def a_pool() -> Callable[..., dict[str, Any]]:
    return pool


@pytest.fixture
def a_spec() -> Callable[..., FleetSpec]:
    return make_spec


@pytest.fixture
def a_state() -> Callable[..., FleetState]:
    return make_state


@pytest.fixture
def a_decision() -> Callable[..., ScalingDecision]:
    return make_decision
