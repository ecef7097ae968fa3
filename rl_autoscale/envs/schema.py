"""The contract between an environment, a trained policy and a live controller: names and order of features and actions.

Two fleets have the same schema when their pools have the same roles and their classes the same kinds, in the same
order. Everything else (model, GPU, rates, SLOs, start-up times) is divided out, so a policy carries over. The hash
travels with an exported policy, and a policy of another schema is refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from rl_autoscale.fleet.spec import FleetSpec

SCHEMA_VERSION = 6
"""Raised whenever the meaning, order or scaling of any feature or action changes."""

POOL_FEATURES = (
    "ready",
    "starting",
    "draining",
    "asked_for",
    "oldest_start",
    "newest_start",
    "waiting",
    "batch_fill",
    "cap_fill",
    "kv_usage",
    "batch_cap",
    "itl",
    "preemptions",
    "prefill_backlog",
    "demand_window",
    "demand_slow",
    "demand_slowest",
    "demand_trend",
    "demand_peak",
    "demand_spread",
    "demand_level",
    "demand_replicas",
    "since_change",
    "age",
    "missing",
)
BATCH_POOL_FEATURES = ("backlog",)
"""Features that a batch pool has besides: its headroom and floor mean something else, see envs/action.py."""
CLASS_FEATURES = (
    "queue_wait",
    "oldest_wait",
    "ttft_mean",
    "ttft_p95",
    "tpot_p95",
    "unmet",
    "refused",
    "dropped",
    "admission",
    "share",
    "missing",
)
SHARED_FLEET_CLASS_FEATURES = ("miss_weight",)
"""Features that a class has only beside others: alone it has nothing to be weighed against."""
SIMPLE_FLEET_CLASS_FEATURES = ("correction",)
"""Features of a class that has one pool to itself: elsewhere its refusal is not corrected (fleet/corrections.py)."""
GLOBAL_FEATURES = ("miss_price", "startup")
POOL_ACTIONS = ("headroom", "floor")
COMPOUND_FLEET_POOL_ACTIONS = ("batch_cap",)
"""Actions that a pool has besides in a fleet of several pools or classes. What a law says of the mean request
(fleet/in_flight.py) is all there is to know where one pool serves one class: a say in it costs a policy there."""
CLASS_ACTIONS = ("admission",)
SHARED_FLEET_BATCH_ACTIONS = ("in_flight",)
"""Actions of a batch class beside others."""


@dataclass(frozen=True, slots=True)
class Schema:
    """Ordered names of all features and actions of one fleet layout."""

    features: tuple[str, ...]
    actions: tuple[str, ...]
    layout: tuple[str, ...]

    @staticmethod
    def of(spec: FleetSpec) -> Schema:
        """The schema of a fleet."""
        pools = [f"pool{p}.{pool.role}" for p, pool in enumerate(spec.pools)]
        classes = [f"class{c}.{item.kind}" for c, item in enumerate(spec.classes)]
        features = [
            f"{name}.{feature}"
            for name, pool in zip(pools, spec.pools, strict=True)
            for feature in POOL_FEATURES + (BATCH_POOL_FEATURES if pool.role == "batch" else ())
        ]
        of_class = CLASS_FEATURES + (SHARED_FLEET_CLASS_FEATURES if len(classes) > 1 else ())
        of_class += SIMPLE_FLEET_CLASS_FEATURES if spec.is_simple else ()
        features += [f"{item}.{name}" for item in classes for name in of_class]
        features += GLOBAL_FEATURES
        actions = [f"{pool}.{name}" for pool in pools for name in pool_actions(spec)]
        actions += [f"{item}.{name}" for item in classes for name in CLASS_ACTIONS]
        actions += [f"{classes[c]}.{name}" for c in held_classes(spec) for name in SHARED_FLEET_BATCH_ACTIONS]
        return Schema(tuple(features), tuple(actions), (*pools, *classes))

    @property
    def digest(self) -> str:
        """Sixteen hex digits that change with the version, any name or any order."""
        content = json.dumps([SCHEMA_VERSION, self.features, self.actions])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def pool_actions(spec: FleetSpec) -> tuple[str, ...]:
    """The actions of each pool, in order."""
    return POOL_ACTIONS + (() if spec.is_simple else COMPOUND_FLEET_POOL_ACTIONS)


def held_classes(spec: FleetSpec) -> list[int]:
    """The batch classes that share a fleet with other classes: what of them is in flight is a policy's to decide."""
    return [c for c, item in enumerate(spec.classes) if item.kind == "batch" and len(spec.classes) > 1]
