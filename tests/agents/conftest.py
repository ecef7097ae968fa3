"""Hand-made fleets and observations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import ClassTelemetry, FleetState, PoolTelemetry

PROFILE = "llama-3.1-8b_a100_tp1"
CHAT = {"name": "chat", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
JOBS = {"name": "jobs", "kind": "batch", "ttft_slo_s": 3600.0, "tpot_slo_s": 1.0}

SpecMaker = Callable[..., FleetSpec]
StateMaker = Callable[..., FleetState]


@pytest.fixture
def make_spec() -> SpecMaker:
    """Make a fleet from roles, one pool each; ``pool`` overrides settings of every pool."""

    def make(
        *roles: str, classes: tuple[dict[str, Any], ...] = (CHAT,), pool: dict[str, Any] | None = None, **fleet: Any
    ) -> FleetSpec:
        settings = {"profile": PROFILE, "min_replicas": 0, "initial_replicas": 1, **(pool or {})}
        pools = [{"name": f"{role}{k}", "role": role, **settings} for k, role in enumerate(roles or ("mixed",))]
        return FleetSpec.from_dict({"pools": pools, "classes": list(classes), **fleet})

    return make


@pytest.fixture
def make_state() -> StateMaker:
    """Make an observation: zeros, one ready replica per pool, no latencies; override fields by name.

    Names are those of the telemetry fields; where pools and classes share one, the class's is ``class_<name>``. Scalars
    are repeated for every pool or class. Ready replicas count as asked for unless that is given.
    """

    def make(spec: FleetSpec, time_s: float = 0.0, window_s: float = 10.0, **given: Any) -> FleetState:
        pool_names = [field.name for field in fields(PoolTelemetry)]
        pools: dict[str, Any] = dict.fromkeys(pool_names, 0.0)
        pools |= {"ready": 1.0, "itl_s": np.nan, "batch_cap": spec.batch_limits}
        classes: dict[str, Any] = {field.name: 0.0 for field in fields(ClassTelemetry)}
        missing = ("ttft_mean_s", "ttft_p95_s", "tpot_mean_s", "tpot_p95_s", "mean_output_tokens")
        classes |= dict.fromkeys(missing, np.nan) | {"admission": np.inf}
        for name, value in given.items():
            if name.startswith("class_"):
                classes[name.removeprefix("class_")] = value
            else:
                known = pools if name in pools else classes
                assert name in known, name
                known[name] = value
        if "asked_for" not in given:
            pools["asked_for"] = pools["ready"]

        def spread(values: dict[str, Any], count: int) -> list[np.ndarray]:
            return [np.broadcast_to(np.asarray(value, dtype=np.float64), (count,)).copy() for value in values.values()]

        return FleetState(
            np.float64(time_s),
            np.float64(window_s),
            PoolTelemetry(*spread(pools, len(spec.pools))),
            ClassTelemetry(*spread(classes, len(spec.classes))),
        )

    return make
