"""The live fleet behind the `Fleet` protocol: the same words as the simulated one, spoken by real servers.

A control interval has the simulator's shape: a decision takes effect at once, time passes, ``telemetry_age_s`` before
the next decision everything is read (the *look*), then the decision is taken on what the look saw. Nothing is read
between a look and its decision, so nothing is fresher than it was in training.

All durations are monotonic; the wall clock decides nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NO_LIMIT, ClassTelemetry, FleetState, PoolTelemetry, ScalingDecision
from rl_autoscale.serving.gateway_api import GatewayDecision, ReplicaAddress, ReplicaList
from rl_autoscale.serving.gateway_client import GatewayPort
from rl_autoscale.serving.metric_names import EngineNames
from rl_autoscale.serving.protocols import Backend, BackendError, Clock, PoolObservation, Replica
from rl_autoscale.serving.sources import MetricsSource
from rl_autoscale.serving.telemetry import (
    GatewayWindow,
    Limits,
    PoolReadings,
    class_row_at_gateway,
    class_row_without_gateway,
    columns,
    pool_row,
)
from rl_autoscale.serving.windows import ReplicaTrack

_NEVER = -math.inf


@dataclass(frozen=True, slots=True)
class TelemetryReport:
    """What stands behind an observation, for the log and for whoever must judge it.

    Attributes:
        coverage: pool -> share of its serving replicas with fresh readings.
        ages_s: ``pool.field`` -> age at the decision; inf for what was never read. ``pool.replicas`` is the back
            end's, ``gateway`` the gateway's.
        problems: one line per thing that could not be read.
        failed: pool -> replicas that crashed or never became ready, with the back end's reasons.
        gateway_reached: whether the gateway answered, and took the list of replicas; also true without a gateway.
    """

    coverage: dict[str, float] = field(default_factory=dict)
    ages_s: dict[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    failed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gateway_reached: bool = True


@dataclass(frozen=True, slots=True)
class _Seen:
    """A back end's answer and when it was true."""

    observation: PoolObservation
    at_s: float


class LiveFleet:
    """Replicas of real back ends as a `Fleet`; takes its first look when made.

    Args:
        spec: what the fleet is made of; pools and classes as the policy was trained on.
        backends: pool name -> who starts and stops its replicas.
        source: replica metrics; closed with the fleet.
        names: of the engine the source reads.
        clock: monotonic time and waiting.
        limits: when readings are too old.
        gateway: None scales only: one class, no batch cap, no early refusal.
        publish_replicas: whether this fleet tells the gateway where replicas are; off if someone else does.

    Raises:
        SpecError: a pool without back end, or several classes without a gateway to tell them apart.
    """

    def __init__(
        self,
        spec: FleetSpec,
        backends: Mapping[str, Backend],
        source: MetricsSource,
        names: EngineNames,
        clock: Clock,
        limits: Limits,
        *,
        gateway: GatewayPort | None = None,
        publish_replicas: bool = True,
    ) -> None:
        without = sorted(set(spec.pool_names) ^ set(backends))
        if without:
            raise SpecError(f"pools and back ends must match; differing: {', '.join(without)}")
        if gateway is None and len(spec.classes) > 1:
            raise SpecError(
                f"{len(spec.classes)} classes need a gateway: engines do not know classes; name one, or keep one class"
            )
        self._spec = spec
        self._backends = dict(backends)
        self._source = source
        self._names = names
        self._clock = clock
        self._limits = limits
        self._gateway = gateway
        self._publish = publish_replicas and gateway is not None
        self._has_published = False  # a list with replicas in it
        self._seen: dict[str, _Seen] = {}
        self._tracks: dict[str, ReplicaTrack] = {}
        self._gateway_window: GatewayWindow | None = None
        self._gateway_at_s = _NEVER
        self._gateway_reached = True
        self._last_waiting = math.nan
        self._stopped = False
        self.apply_failures: dict[str, BackendError] = {}
        """What the last `apply` could not do: pool name (or ``gateway``) -> why."""
        self._origin_s = self._tick_s = clock.monotonic_s()
        self._look_s = self._origin_s
        self._look(window_s=0.0)

    @property
    def spec(self) -> FleetSpec:
        """What the fleet is made of."""
        return self._spec

    @property
    def report(self) -> TelemetryReport:
        """What stands behind the observation."""
        return self._report

    def observe(self) -> FleetState:
        """The last look, aged to the moment of the decision."""
        return self._state

    def apply(self, decision: ScalingDecision, leave: Collection[str] = ()) -> None:
        """Ask the back ends for the targets and tell the gateway its part; see `apply_failures` for what failed.

        Back ends are asked at every step, also for what is in force already: a lease or a published figure lives from
        being renewed. A pool whose present target cannot be read is left alone: writing blindly could undo what
        someone else did.

        Args:
            decision: absolute targets.
            leave: pools whose back end is not called.
        """
        self.apply_failures = {}
        shrunk = False
        for p, name in enumerate(self._spec.pool_names):
            present, target = self._state.pools.asked_for[p], int(decision.target_replicas[p])
            if name in leave:
                continue
            try:
                if np.isnan(present):
                    raise BackendError("its present target cannot be read; left as it is", retryable=True)
                self._backends[name].set_target(target)
                shrunk |= target < present
            except BackendError as error:
                self.apply_failures[name] = error
        if self._gateway is not None:
            self._tell_gateway(self._gateway, decision, shrunk)

    def advance(self) -> bool:
        """Wait for the next control step and look shortly before it; False after `stop`.

        A step that was missed (a slow scrape, a suspended machine) is skipped, never made up for.
        """
        interval_s = self._spec.control_interval_s
        self._tick_s = max(self._tick_s + interval_s, self._clock.monotonic_s())
        self._wait_until(self._tick_s - self._spec.telemetry_age_s)
        if self._stopped:
            return False
        started_s = self._clock.monotonic_s()
        window_s, self._look_s = started_s - self._look_s, started_s
        self._look(window_s)
        self._wait_until(self._tick_s)
        return not self._stopped

    def stop(self) -> None:
        """Make `advance` return False from now on."""
        self._stopped = True

    def close(self) -> None:
        """Let go of the source and of back ends; replicas stay."""
        self._source.close()
        for backend in self._backends.values():
            backend.close()

    # -- the look ----------------------------------------------------------------------------------------------------

    def _look(self, window_s: float) -> None:
        problems: list[str] = []
        self._observe_backends(problems)
        self._gateway_reached = self._gateway is None or self._read_gateway(self._gateway, problems)
        if self._publish and self._gateway is not None:
            self._gateway_reached &= self._publish_replicas(self._gateway, problems)
        self._read_replicas(problems)
        decision_s = max(self._tick_s, self._clock.monotonic_s())
        self._tick_s = decision_s
        readings = {name: self._pool_readings(name, decision_s) for name in self._spec.pool_names}
        pools = [self._pool(p, readings[name], window_s, decision_s) for p, name in enumerate(self._spec.pool_names)]
        classes = self._classes(readings, window_s, decision_s)
        self._state = FleetState(
            np.asarray(decision_s - self._origin_s),
            np.asarray(window_s),
            PoolTelemetry(**columns(PoolTelemetry, pools)),
            ClassTelemetry(**columns(ClassTelemetry, classes)),
        )
        self._report = self._make_report(readings, decision_s, problems)

    def _observe_backends(self, problems: list[str]) -> None:
        for name, backend in self._backends.items():
            try:
                observation = backend.observe()
            except BackendError as error:
                problems.append(f"{name}: back end: {error}")
                continue
            self._seen[name] = _Seen(observation, self._clock.monotonic_s() - observation.age_s)

    def _read_gateway(self, gateway: GatewayPort, problems: list[str]) -> bool:
        """Whether it had something new to say."""
        try:
            snapshot = gateway.snapshot()
        except BackendError as error:
            problems.append(str(error))
            return False
        last = self._gateway_window.now if self._gateway_window is not None else None
        if last is not None and last.started_at_s == snapshot.started_at_s and snapshot.uptime_s <= last.uptime_s:
            problems.append(f"gateway: frozen at uptime {snapshot.uptime_s:.0f} s")
            return False
        self._gateway_window = GatewayWindow.between(last, snapshot)
        self._gateway_at_s = self._clock.monotonic_s()
        return True

    def _read_replicas(self, problems: list[str]) -> None:
        now_s = self._clock.monotonic_s()
        existing = [replica for seen in self._seen.values() for replica in seen.observation.replicas]
        self._update_tracks(existing, now_s)
        serving = [replica for replica in existing if replica.phase in ("ready", "draining")]
        readings = self._source.read(serving)
        window = self._gateway_window if self._gateway_reached else None  # what it knew before it fell silent is over
        in_flight = window.now.in_flight_by_replica if window is not None else {}
        for replica_id, sample in readings.samples.items():
            track = self._tracks.get(replica_id)
            if track is None:
                continue  # a source may know replicas that no back end knows any more
            track.take(sample, self._names, in_flight=in_flight.get(replica_id))
            if track.frozen_since_s is not None:
                problems.append(
                    f"{replica_id}: metrics frozen for {now_s - track.frozen_since_s:.0f} s while it has work"
                )
        problems += [f"{replica_id}: {reason}" for replica_id, reason in sorted(readings.failures.items())]

    def _update_tracks(self, existing: list[Replica], now_s: float) -> None:
        """One track per existing replica; one that began to serve after the last look counts from zero."""
        first_look = not self._tracks and self._look_s == self._origin_s
        tracks: dict[str, ReplicaTrack] = {}
        for replica in existing:
            track = self._tracks.get(replica.replica_id)
            if track is None:
                is_new = replica.phase == "ready" and now_s - replica.phase_age_s > self._look_s - self._interval_s
                track = ReplicaTrack(now_s - replica.phase_age_s if is_new else now_s)
                track.began_at_zero = replica.phase == "starting" or (is_new and not first_look)
            if replica.phase == "starting":
                track.since_s, track.began_at_zero = now_s, True
            tracks[replica.replica_id] = track
        self._tracks = tracks

    @property
    def _interval_s(self) -> float:
        return self._spec.control_interval_s

    # -- rows --------------------------------------------------------------------------------------------------------

    def _pool_readings(self, name: str, decision_s: float) -> PoolReadings:
        seen = self._seen.get(name)
        replicas = seen.observation.replicas if seen is not None else ()
        serving = [replica for replica in replicas if replica.phase in ("ready", "draining")]
        return PoolReadings(serving, self._tracks, decision_s, self._limits)

    def _pool(self, p: int, readings: PoolReadings, window_s: float, decision_s: float) -> dict[str, float]:
        seen = self._seen.get(self._spec.pool_names[p])
        backend_age_s = math.inf if seen is None else decision_s - seen.at_s
        fresh = seen.observation if seen is not None and backend_age_s <= self._limits.stale_after_s else None
        row = pool_row(p, self._spec, fresh, readings, self._fresh_gateway(decision_s), window_s)
        if self._gateway is not None and self._fresh_gateway(decision_s) is None:
            row |= dict.fromkeys(("in_flight", "in_flight_interactive", "busy_interactive"), math.nan)
            row |= dict.fromkeys(("pending_prompt_tokens", "batch_cap", "evictions"), math.nan)
        return row | {
            "age_s": max(readings.age_s(), backend_age_s if seen is not None else self._age_of_nothing(decision_s))
        }

    def _classes(
        self, readings: Mapping[str, PoolReadings], window_s: float, decision_s: float
    ) -> list[dict[str, float]]:
        if self._gateway is None:
            return [self._only_class(readings, window_s)]
        window = self._fresh_gateway(decision_s)
        age_s = (
            decision_s - self._gateway_at_s if self._gateway_window is not None else self._age_of_nothing(decision_s)
        )
        empty = dict.fromkeys((name for name in ClassTelemetry.__dataclass_fields__), math.nan)
        rows = [
            class_row_at_gateway(item.name, window) if window is not None else dict(empty)
            for item in self._spec.classes
        ]
        return [row | {"age_s": age_s} for row in rows]

    def _only_class(self, readings: Mapping[str, PoolReadings], window_s: float) -> dict[str, float]:
        """The class of a fleet without a gateway; all pools serve it, so their replicas are read as one."""
        everything = PoolReadings.joined(list(readings.values()))
        waiting = everything.total("waiting")
        growth_per_s = (waiting - self._last_waiting) / window_s if window_s > 0 else math.nan
        self._last_waiting = waiting
        row = class_row_without_gateway(self._spec.classes[0], everything, growth_per_s)
        return row | {"age_s": everything.age_s()}

    def _fresh_gateway(self, decision_s: float) -> GatewayWindow | None:
        fresh = decision_s - self._gateway_at_s <= self._limits.stale_after_s
        return self._gateway_window if fresh else None

    def _age_of_nothing(self, decision_s: float) -> float:
        """Of what was never read: as old as this process (ages stay finite numbers)."""
        return decision_s - self._origin_s + self._limits.stale_after_s

    def _make_report(
        self, readings: Mapping[str, PoolReadings], decision_s: float, problems: list[str]
    ) -> TelemetryReport:
        ages: dict[str, float] = {}
        for name, item in readings.items():
            seen = self._seen.get(name)
            ages[f"{name}.replicas"] = decision_s - seen.at_s if seen is not None else math.inf
            ages |= {f"{name}.{signal}": item.field_age_s(signal) for signal in self._names.fields}
        if self._gateway is not None:
            ages["gateway"] = decision_s - self._gateway_at_s
        failed = {
            name: tuple(replica.reason for replica in seen.observation.replicas if replica.phase == "failed")
            for name, seen in self._seen.items()
        }
        coverage = {name: item.coverage() for name, item in readings.items()}
        return TelemetryReport(coverage, ages, tuple(problems), failed, self._gateway_reached)

    # -- the gateway -------------------------------------------------------------------------------------------------

    def _tell_gateway(self, gateway: GatewayPort, decision: ScalingDecision, shrunk: bool) -> None:
        """Caps, admission and limits; and, when replicas were told to leave, at once where not to send any more.

        An engine that drains accepts requests and answers them with nothing, so routing must stop first.
        """
        problems: list[str] = []
        if shrunk and self._publish:
            self._observe_backends(problems)
            self._publish_replicas(gateway, problems)
        finite = [None if np.isinf(level) else float(level) for level in decision.admission]
        limits = [None if limit == NO_LIMIT else int(limit) for limit in decision.in_flight_limits]
        said = self._spec.class_names if decision.max_in_flight is not None else ()  # else what is in force stays
        selective = (
            {}
            if decision.selectivity is None
            else dict(zip(self._spec.class_names, map(float, decision.selectivity), strict=True))
        )
        try:
            gateway.put_decision(
                GatewayDecision(
                    max_batch_size=dict(zip(self._spec.pool_names, map(int, decision.max_batch_size), strict=True)),
                    admission=dict(zip(self._spec.class_names, finite, strict=True)),
                    max_in_flight=dict(zip(said, limits, strict=bool(said))),
                    selectivity=selective,
                )
            )
        except BackendError as error:
            self.apply_failures["gateway"] = error

    def _publish_replicas(self, gateway: GatewayPort, problems: list[str]) -> bool:
        addresses = [
            ReplicaAddress(replica_id=item.replica_id, pool=item.pool, url=item.url, phase=item.phase)
            for seen in self._seen.values()
            for item in seen.observation.replicas
            if item.url is not None
        ]
        known = self._gateway_window.now.in_flight_by_replica if self._gateway_window is not None else {}
        if not addresses and not self._has_published and known:
            problems.append(
                f"replica list not delivered: it is empty, and the gateway serves {len(known)} that are nobody's here"
            )
            return True
        try:
            gateway.put_replicas(ReplicaList(replicas=tuple(addresses)))
        except BackendError as error:
            problems.append(f"replica list not delivered: {error}")
            return False
        self._has_published |= bool(addresses)
        return True

    def _wait_until(self, moment_s: float) -> None:
        left_s = moment_s - self._clock.monotonic_s()
        if left_s > 0 and not self._stopped:
            self._clock.sleep(left_s)
