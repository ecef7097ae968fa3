"""Which constants of a rule are tuned, and between which bounds: the tuned variants of the benchmark.

The knob that the benchmark sweeps comes first. Every space ends with the batch cap, which any rule may set; what early
refusal is set to is added where a rule refuses, and least replicas where the fleet has one pool. ``default`` is where
the search begins: the rule as published, or as its class has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rl_autoscale.fleet.errors import SpecError, did_you_mean

TUNED_SUFFIX = "-tuned"


@dataclass(frozen=True, slots=True)
class Dimension:
    """One constant of a rule, where to look for it and where to begin; ``log`` is uniform in its logarithm."""

    name: str
    low: float
    high: float
    default: float
    log: bool = False

    def unit(self, value: float) -> float:
        """Inverse of `value`, clipped to the range."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def value(self, unit: float) -> float:
        """The constant at a place of 0..1, to four digits."""
        if self.log:
            raw = math.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low)))
        else:
            raw = self.low + unit * (self.high - self.low)
        return min(max(float(f"{raw:.4g}"), self.low), self.high)


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """What a tuned variant is made of: its base policy and the constants that are searched, the knob first."""

    base: str
    dimensions: tuple[Dimension, ...]


BATCH_CAP = Dimension("batch_cap", 8.0, 256.0, 256.0, log=True)
STRICTNESS = Dimension("admission", 0.25, 4.0, 1.0, log=True)
"""How strict early refusal is; searched too where a rule refuses, since the learned policy may set it."""
SELECTIVITY = Dimension("selectivity", 0.0, 1.0, 0.0)
"""How much more readily it refuses requests of much work; likewise, since the learned policy has it."""
LEAST_REPLICAS = Dimension("least_replicas", 1.0, 50.0, 1.0, log=True)
"""That it keeps whatever it says, where a fleet has one pool; likewise, since an adapted policy has it."""


def _space(base: str, *dimensions: Dimension) -> SearchSpace:
    return SearchSpace(base, (*dimensions, BATCH_CAP))


def _load_target(name: str, default: float) -> Dimension:
    """Load per replica: from nearly idle to a full engine."""
    return Dimension(name, 2.0, 256.0, default, log=True)


SEARCH_SPACES: dict[str, SearchSpace] = {
    "static-tuned": _space("static", Dimension("replicas", 1.0, 50.0, 4.0, log=True)),
    "headroom-tuned": _space(
        "headroom",
        Dimension("headroom", 0.9, 4.0, 1.5, log=True),
        Dimension("up_time_constant_s", 5.0, 120.0, 30.0, log=True),
        Dimension("down_time_constant_s", 30.0, 900.0, 120.0, log=True),
    ),
    "headroom-backpressure-tuned": _space(
        "headroom-backpressure",
        Dimension("headroom", 0.9, 4.0, 1.5, log=True),
        Dimension("up_time_constant_s", 5.0, 120.0, 30.0, log=True),
        Dimension("down_time_constant_s", 30.0, 900.0, 120.0, log=True),
    ),
    "headroom-forecast-tuned": _space(
        "headroom-forecast",
        Dimension("headroom", 0.7, 4.0, 1.5, log=True),
        Dimension("level_time_constant_s", 10.0, 300.0, 30.0, log=True),
        Dimension("trend_time_constant_s", 30.0, 3000.0, 120.0, log=True),
        Dimension("trend_damping", 0.01, 1.0, 0.5),
    ),
    "inferline-tuned": _space(
        "inferline",
        Dimension("utilisation", 0.2, 1.5, 0.7, log=True),
        Dimension("window_up_s", 10.0, 120.0, 20.0, log=True),
        Dimension("look_back_up_s", 10.0, 600.0, 80.0, log=True),
        Dimension("window_down_s", 10.0, 120.0, 20.0, log=True),
        Dimension("look_back_down_s", 10.0, 900.0, 80.0, log=True),
    ),
    "clipper-tuned": _space(
        "clipper",
        Dimension("headroom", 0.9, 4.0, 1.5, log=True),
        Dimension("increase", 0.5, 32.0, 4.0, log=True),
        Dimension("backoff", 0.5, 0.98, 0.9),
        Dimension("initial_batch", 1.0, 256.0, 64.0, log=True),
    ),
    "infaas-tuned": _space(
        "infaas",
        Dimension("slack", 0.0, 3.0, 0.2),
        Dimension("down_wait_s", 0.0, 300.0, 20.0),
        Dimension("window_s", 10.0, 180.0, 30.0, log=True),
    ),
    "cocktail-tuned": _space(
        "cocktail",
        Dimension("headroom", 0.8, 4.0, 1.2, log=True),
        Dimension("interval_s", 10.0, 120.0, 60.0, log=True),
        Dimension("trend_weight", 0.0, 1.0, 0.3),
    ),
    "qlm-tuned": _space(
        "qlm",
        Dimension("load_share", 0.1, 1.2, 0.8, log=True),
        Dimension("z", 0.0, 3.0, 1.645),
        Dimension("window_s", 10.0, 300.0, 30.0, log=True),
    ),
    "hpa-tuned": _space(
        "hpa",
        _load_target("target", 40.0),
        Dimension("tolerance", 0.02, 0.3, 0.1),
        Dimension("down_stabilisation_s", 30.0, 600.0, 300.0, log=True),
    ),
    "keda-tuned": _space(
        "keda",
        _load_target("running", 16.0),
        Dimension("queue", 0.5, 100.0, 5.0, log=True),
        Dimension("tolerance", 0.02, 0.3, 0.1),
        Dimension("down_stabilisation_s", 30.0, 600.0, 300.0, log=True),
    ),
    "kpa-tuned": _space(
        "kpa",
        _load_target("target", 40.0),
        Dimension("stable_window_s", 20.0, 600.0, 60.0, log=True),
        Dimension("panic_threshold", 1.1, 10.0, 2.0, log=True),
        Dimension("scale_down_delay_s", 0.0, 600.0, 0.0),
    ),
    "apa-tuned": _space(
        "apa",
        _load_target("target", 40.0),
        Dimension("up_tolerance", 0.01, 0.5, 0.1),
        Dimension("down_tolerance", 0.01, 0.8, 0.1),
        Dimension("down_cooldown_s", 10.0, 600.0, 300.0, log=True),
    ),
    "ray-serve-tuned": _space(
        "ray-serve",
        _load_target("target", 40.0),
        Dimension("look_back_s", 10.0, 120.0, 30.0, log=True),
        Dimension("upscale_delay_s", 0.0, 60.0, 30.0),
        Dimension("downscale_delay_s", 10.0, 600.0, 600.0, log=True),
        Dimension("upscale_factor", 0.3, 2.0, 1.0, log=True),
    ),
    "llumnix-tuned": _space(
        "llumnix",
        Dimension("low", 5.0, 4000.0, 10.0, log=True),
        Dimension("band", 1.0, 10.0, 6.0, log=True),
        Dimension("interval_s", 10.0, 60.0, 10.0, log=True),
    ),
    "dynamo-tuned": _space(
        "dynamo",
        Dimension("sla_share", 0.08, 1.0, 1.0, log=True),
        Dimension("throughput_interval_s", 20.0, 300.0, 180.0, log=True),
        Dimension("sensitivity", 0.1, 1.0, 0.8),
        Dimension("trend_weight", 0.0, 1.0, 0.3),
    ),
    "llm-d-tuned": _space(
        "llm-d",
        Dimension("up", 0.1, 1.9, 0.55, log=True),
        Dimension("down_share", 0.2, 1.0, 0.40 / 0.55),
        Dimension("smoothing_s", 10.0, 180.0, 45.0, log=True),
        Dimension("up_stabilisation_s", 0.0, 60.0, 30.0),
        Dimension("down_stabilisation_s", 10.0, 600.0, 180.0, log=True),
        Dimension("down_period_s", 10.0, 240.0, 120.0, log=True),
    ),
    "chiron-tuned": _space(
        "chiron-tuned",
        Dimension("theta", 0.05, 1.0, 1.0 / 3.0, log=True),
        Dimension("dead_band", 0.0, 0.6, 0.25),
        Dimension("z", 0.5, 3.0, 1.645),
        Dimension("load_time_s", 10.0, 300.0, 60.0, log=True),
    ),
}
"""Tuned variants by name. Chiron: theta, h, z and the load time as reference rebuilds name them, and a ceiling on B."""


def search_space(policy: str) -> SearchSpace:
    """The search space of a tuned variant; raises SpecError for a policy that has none."""
    if policy not in SEARCH_SPACES:
        raise SpecError(
            f"policy '{policy}' cannot be tuned{did_you_mean(policy, SEARCH_SPACES)}; "
            f"tuned variants: {', '.join(SEARCH_SPACES)}"
        )
    return SEARCH_SPACES[policy]
