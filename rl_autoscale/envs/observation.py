"""From telemetry to features: dimensionless numbers, mostly within [-1, 1], always within [-LIMIT, LIMIT].

One encoder serves training (a batch of fleets), the benchmark and a live controller (one fleet). It remembers demand
(averages, the highest of late, how far it strays) and the time since each pool's target last changed, and nothing
else. Missing telemetry becomes 0 plus a ``missing`` flag, stale telemetry an ``age``; neither looks like an idle fleet,
because the demand features hold their last value.

| feature | meaning | scale |
|---|---|---|
| ready, starting, draining, asked_for | replicas per replica of demand (30 s average), plus one | log2, half |
| oldest_start, newest_start | time since the oldest/newest pending start was asked for | mean start-up time |
| waiting, batch_fill | sequences queued in engines, running, per ready replica | batch limit |
| cap_fill | requests in flight per ready replica | batch cap |
| kv_usage, batch_cap | fraction of KV blocks in use; cap over the engine's limit | 0..1 |
| itl | inter-token latency | tightest TPOT SLO of the pool's classes |
| preemptions | per running sequence in the window | |
| prefill_backlog | seconds of prefill pending per ready replica | tightest TTFT SLO |
| demand_window, demand_slow, demand_slowest | last window, 120 s and 600 s average against the 30 s average | log2 |
| demand_trend | change of the 30 s average since the previous step | log2, times 4 |
| demand_peak | highest window of late, forgotten over 900 s, against the 30 s average | log2, half |
| demand_spread | 300 s average of a window's distance from the 30 s average before it | log2 |
| demand_level | 30 s average over max_replicas | 0..1 |
| demand_replicas | 30 s average in replicas, plus one: small fleets need more slack | log2, third |
| backlog | of a batch pool: replicas that its queue needs, plus one | log2, third |
| since_change | time since the pool's target changed | 2 x start-up time, at most 1 |
| age | age of the row | control interval |
| queue_wait, oldest_wait | gateway queue over finish rate; its head's wait | TTFT SLO |
| ttft_mean, ttft_p95, tpot_p95 | in the window | their SLO |
| unmet, refused, dropped | shares of the window's finished / arrived / arrived | 0..1 |
| admission | strictness in force over what it was measured by (`Anchors.admission`) | log2 over 3 |
| share | the class's part of the arrivals | 0..1 |
| correction | of one class in one pool: by how much refusal was found too lax (fleet/corrections.py) | octaves, half |
| miss_weight | of several classes: what a miss of this one costs over the dearest | log10, over 2 |
| miss_price | what an SLO miss costs, see envs/reward.py | log10, over 2 |
| startup | mean start-up over control interval | log2 over 5 |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rl_autoscale.envs.schema import BATCH_POOL_FEATURES, POOL_FEATURES, Schema
from rl_autoscale.fleet.corrections import CapCorrection, StrictnessCorrection
from rl_autoscale.fleet.demand import DemandEstimator
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, FloatArray

LIMIT = 5.0
DEMAND_TIME_CONSTANTS_S = (30.0, 120.0, 600.0, 0.0)
FAST, SLOW, SLOWEST, WINDOW = range(4)
PEAK_TIME_CONSTANT_S = 900.0
SPREAD_TIME_CONSTANT_S = 300.0

_MIN_REPLICAS_OF_DEMAND = 0.05


def price_feature(miss_price: FloatArray | float) -> FloatArray:
    """The feature ``miss_price``, or ``miss_weight`` of weights; any shape."""
    return np.asarray(np.log10(miss_price) / 2.0)


@dataclass(frozen=True, slots=True, eq=False)
class Anchors:
    """What was measured, and actions are relative to (envs/action.py); of shape (..., num_pools) unless said.

    Attributes:
        replicas: what the headroom action multiplies; NaN before any demand is measured. The 30 s average of demand; of
            a batch pool what its queue needs to start in half of the time left.
        peak: what the floor action multiplies. The highest window of late, forgotten over 900 s; of a batch pool the
            30 s average of demand.
        in_flight: the batch cap, or what its action multiplies, see fleet/in_flight.py; of the 120 s average, and
            corrected by what came of it (fleet/corrections.py).
        admission: what the admission action multiplies, see fleet/corrections.py; shape (..., num_classes).
        found: replicas asked for when the policy began, forgotten as the peak is; 0 of a batch pool, whose work waits.
    """

    replicas: FloatArray
    peak: FloatArray
    in_flight: FloatArray
    admission: FloatArray
    found: FloatArray


class ObservationEncoder:
    """Encodes observations of one fleet, or of a batch of fleets of one spec.

    Args:
        spec: the fleet.
        batch_shape: leading dimensions, () for one fleet.
    """

    def __init__(self, spec: FleetSpec, batch_shape: tuple[int, ...] = ()) -> None:
        self.spec = spec
        self.schema = Schema.of(spec)
        self.demand = DemandEstimator(spec, DEMAND_TIME_CONSTANTS_S, batch_shape)
        self.strictness = StrictnessCorrection(spec, batch_shape)
        self.cap = CapCorrection(spec, batch_shape)
        pools, classes = range(len(spec.pools)), range(len(spec.classes))
        served = [[c for c in classes if p in spec.pools_serving(c)] or list(classes) for p in pools]
        self._tpot_slo_s = np.array([min(spec.classes[c].tpot_slo_s for c in served[p]) for p in pools])
        self._pool_ttft_slo_s = np.array([min(spec.classes[c].ttft_slo_s for c in served[p]) for p in pools])
        self._class_ttft_slo_s = np.array([item.ttft_slo_s for item in spec.classes])
        self._class_tpot_slo_s = np.array([item.tpot_slo_s for item in spec.classes])
        self._startup_s = np.array([max(pool.startup_mean_s, spec.control_interval_s) for pool in spec.pools])
        self._prefill_s = np.array([pool.hardware.prefill_s_per_token() for pool in spec.pools])
        self._last_target = np.full((*batch_shape, len(spec.pools)), np.nan)
        self._since_change_s = np.zeros((*batch_shape, len(spec.pools)))
        self._last_demand = np.full((*batch_shape, len(spec.pools)), np.nan)
        self._peak_demand = np.zeros((*batch_shape, len(spec.pools)))
        self._spread = np.zeros((*batch_shape, len(spec.pools)))
        self._backlog = np.zeros((*batch_shape, len(spec.pools)))
        self._found = np.full((*batch_shape, len(spec.pools)), np.nan)
        self._is_batch = np.array([pool.role == "batch" for pool in spec.pools])
        self._of_pool = np.ones((len(spec.pools), len(POOL_FEATURES) + len(BATCH_POOL_FEATURES)), dtype=np.bool_)
        self._of_pool[~self._is_batch, len(POOL_FEATURES) :] = False

    def reset(self, which: npt.NDArray[np.bool_] | None = None) -> None:
        """Forget, for all fleets or those selected by a boolean array of the batch shape."""
        self.demand.reset(which)
        self.strictness.reset(which)
        self.cap.reset(which)
        chosen = ... if which is None else which
        self._last_target[chosen] = np.nan
        self._since_change_s[chosen] = 0.0
        self._last_demand[chosen] = np.nan
        self._peak_demand[chosen] = 0.0
        self._spread[chosen] = 0.0
        self._backlog[chosen] = 0.0
        self._found[chosen] = np.nan

    def adopt(self, other: ObservationEncoder, which: npt.NDArray[np.bool_]) -> None:
        """Take over the memory of an encoder of fewer fleets for the selected ones."""
        self.demand.adopt(other.demand, which)
        self.strictness.adopt(other.strictness, which)
        self.cap.adopt(other.cap, which)
        self._last_target[which] = other._last_target
        self._since_change_s[which] = other._since_change_s
        self._last_demand[which] = other._last_demand
        self._peak_demand[which] = other._peak_demand
        self._spread[which] = other._spread
        self._backlog[which] = other._backlog
        self._found[which] = other._found

    def demand_replicas(self) -> FloatArray:
        """The 30 s average of demand, shape (..., num_pools)."""
        return self.demand.replicas(FAST)

    def anchors(self) -> Anchors:
        """What actions are relative to after the last `encode`."""
        demand = self.demand_replicas()
        measured = demand.sum(axis=-1, keepdims=True) > 0
        return Anchors(
            replicas=np.where(measured, np.where(self._is_batch, self._backlog, demand), np.nan),
            peak=np.where(self._is_batch, demand, self._peak_demand),
            in_flight=self.demand.in_flight(SLOW) * self.cap.factor,
            admission=self.strictness.factor,
            found=np.where(self._is_batch, 0.0, np.nan_to_num(self._found)),
        )

    def encode(
        self, state: FleetState, miss_price: FloatArray | float, miss_weight: FloatArray | float = 1.0
    ) -> npt.NDArray[np.float32]:
        """Features of one observation; call exactly once per control step.

        Args:
            state: leading dimensions as given at construction.
            miss_price: see envs/reward.py; scalar or the batch shape, > 0.
            miss_weight: see there; scalar or shape (..., num_classes), in (0, 1].

        Returns:
            float32, shape (..., len(schema.features)).
        """
        self.demand.update(state)
        in_force = self.strictness.octaves
        self.strictness.update(state)
        self.cap.update(state)
        if self._is_batch.any():
            backlog = self.demand.backlog_replicas(state)
            self._backlog = np.where(np.isnan(backlog), self._backlog, backlog)
        pool = np.stack(self._pool_features(state), axis=-1)
        cls = np.stack(self._class_features(state, miss_weight, in_force), axis=-1)
        lead = pool.shape[:-2]
        price = np.broadcast_to(price_feature(miss_price), lead)
        startup = np.broadcast_to(np.log2(self._startup_s.max() / self.spec.control_interval_s) / 5.0, lead)
        parts = [pool[..., self._of_pool], cls.reshape(*lead, -1), price[..., None], startup[..., None]]
        features = np.concatenate(parts, axis=-1)
        known = np.where(np.isnan(features), 0.0, features)
        return np.minimum(np.maximum(known, -LIMIT), LIMIT).astype(np.float32)

    def _pool_features(self, state: FleetState) -> list[FloatArray]:
        pools, spec = state.pools, self.spec
        demand = self.demand.replicas_by_scale()
        fast = demand[FAST]
        base = np.maximum(fast, _MIN_REPLICAS_OF_DEMAND)
        ready = np.fmax(pools.ready, 1.0)

        def per_demand(replicas: FloatArray) -> FloatArray:
            return np.asarray(0.5 * np.log2((replicas + 1.0) / (base + 1.0)))

        def against_fast(scale: int) -> FloatArray:
            return np.asarray(np.log2((demand[scale] + 0.2) / (fast + 0.2)))

        before = np.where(np.isnan(self._last_demand), fast, self._last_demand)
        window_s = np.asarray(state.window_s)[..., None]
        self._remember_demand(demand[WINDOW], before, window_s)
        remembered = self._found * np.exp(-window_s / PEAK_TIME_CONSTANT_S)
        self._found = np.where(np.isnan(self._found), pools.asked_for, remembered)
        self._last_demand = fast
        limits = spec.batch_limits
        return [
            per_demand(pools.ready),
            pools.starting / (base + 1.0),
            pools.draining / (base + 1.0),
            per_demand(pools.asked_for),
            pools.oldest_start_age_s / self._startup_s,
            pools.newest_start_age_s / self._startup_s,
            pools.waiting / (ready * limits),
            pools.running / (ready * limits),
            pools.in_flight / (ready * np.maximum(pools.batch_cap, 1.0)),
            pools.kv_usage,
            pools.batch_cap / limits,
            pools.itl_s / self._tpot_slo_s,
            pools.preemptions / np.maximum(pools.running, 1.0),
            pools.pending_prompt_tokens * self._prefill_s / (ready * self._pool_ttft_slo_s),
            against_fast(WINDOW),
            against_fast(SLOW),
            against_fast(SLOWEST),
            4.0 * np.log2((fast + 0.2) / (before + 0.2)),
            0.5 * np.log2((self._peak_demand + 0.2) / (fast + 0.2)),
            self._spread,
            fast / spec.max_replicas,
            np.log2(fast + 1.0) / 3.0,
            self._since_change(state),
            pools.age_s / spec.control_interval_s,
            np.isnan(pools.ready).astype(np.float64),
            np.log2(self._backlog + 1.0) / 3.0,
        ]

    def _remember_demand(self, window: FloatArray, before: FloatArray, window_s: FloatArray) -> None:
        """Highest and spread of demand by windows; a window without data repeats the last and moves neither much."""
        self._peak_demand = np.maximum(window, self._peak_demand * np.exp(-window_s / PEAK_TIME_CONSTANT_S))
        strayed = np.abs(np.log2((window + 0.2) / (before + 0.2)))
        self._spread = self._spread + (1.0 - np.exp(-window_s / SPREAD_TIME_CONSTANT_S)) * (strayed - self._spread)

    def _since_change(self, state: FleetState) -> FloatArray:
        target = state.pools.asked_for
        known = ~np.isnan(target)
        changed = known & ~np.isnan(self._last_target) & (target != self._last_target)
        self._since_change_s = np.where(changed, 0.0, self._since_change_s + np.asarray(state.window_s)[..., None])
        self._last_target = np.where(known, target, self._last_target)
        return np.minimum(self._since_change_s / (2.0 * self._startup_s), 1.0)

    def _class_features(
        self, state: FleetState, miss_weight: FloatArray | float, in_force: FloatArray
    ) -> list[FloatArray]:
        """Features by class; ``in_force`` is the correction, in octaves, with which the last decision was made."""
        classes = state.classes
        arrivals = np.maximum(classes.arrivals_per_s, 1e-9)
        finished = np.maximum(classes.finished_per_s, 0.1)
        admission = np.clip(classes.admission * 2.0**in_force, 1.0 / 8.0, 8.0)
        total = np.nansum(classes.arrivals_per_s, axis=-1, keepdims=True)
        features = [
            classes.queue_length / finished / self._class_ttft_slo_s,
            classes.oldest_wait_s / self._class_ttft_slo_s,
            classes.ttft_mean_s / self._class_ttft_slo_s,
            classes.ttft_p95_s / self._class_ttft_slo_s,
            classes.tpot_p95_s / self._class_tpot_slo_s,
            np.where(
                classes.finished_per_s > 0, 1.0 - classes.met_per_s / np.maximum(classes.finished_per_s, 1e-9), 0.0
            ),
            classes.refused_per_s / arrivals,
            classes.dropped_per_s / arrivals,
            np.log2(admission) / 3.0,
            classes.arrivals_per_s / np.maximum(total, 1e-9),
            np.isnan(classes.arrivals_per_s).astype(np.float64),
        ]
        if len(self.spec.classes) > 1:
            features.append(np.broadcast_to(price_feature(miss_weight), classes.arrivals_per_s.shape))
        if self.spec.is_simple:
            features.append(0.5 * self.strictness.octaves)
        return features
