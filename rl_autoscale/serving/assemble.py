"""From a configuration file to a running controller."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_autoscale.agents.base import RegisteredPolicy
from rl_autoscale.agents.envelope import Envelope
from rl_autoscale.agents.learned import LearnedPolicy
from rl_autoscale.agents.registry import make_policy
from rl_autoscale.fleet.errors import RlAutoscaleError, SpecError
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NEVER_REFUSE
from rl_autoscale.serving.backends.desired import DesiredReplicas, PublishingBackend
from rl_autoscale.serving.backends.kubernetes import KubernetesBackend, KubernetesObserver, open_api
from rl_autoscale.serving.backends.local import LocalBackend
from rl_autoscale.serving.backends.prometheus import DesiredReplicasCollector
from rl_autoscale.serving.backends.rayserve import RayServeBackend
from rl_autoscale.serving.config import (
    BackendChoice,
    ControlConfig,
    PolicyChoice,
    TelemetryConfig,
    read_choice,
    read_mode,
)
from rl_autoscale.serving.controller import Controller
from rl_autoscale.serving.controller_metrics import ControllerMetrics
from rl_autoscale.serving.decision_log import DecisionLog
from rl_autoscale.serving.dial import Dial
from rl_autoscale.serving.gateway.config import read_secret
from rl_autoscale.serving.gateway_client import HttpGateway
from rl_autoscale.serving.live_fleet import LiveFleet
from rl_autoscale.serving.metric_names import engine_names
from rl_autoscale.serving.modes import ENVIRONMENT, Mode, ModeSwitch, Reread
from rl_autoscale.serving.protocols import Backend, BackendError, Clock
from rl_autoscale.serving.sources import DirectSource, MetricsSource, PrometheusSource
from rl_autoscale.serving.status_server import History, StatusServer, describe
from rl_autoscale.serving.step_record import StepRecord
from rl_autoscale.serving.telemetry import Limits


def build_policy(choice: PolicyChoice, spec: FleetSpec) -> RegisteredPolicy:
    """Make a policy and try it on the fleet's layout.

    Raises:
        RlAutoscaleError: no such policy, a damaged file, or one that was trained for another schema.
    """
    if _is_path(choice.name):
        policy = make_policy("learned", path=Path(choice.name), **choice.given)
    else:
        policy = make_policy(choice.name, **choice.given)
    policy.reset(spec)
    return policy


def build_fallback(config: ControlConfig, policy: RegisteredPolicy | None) -> RegisteredPolicy:
    """Make the fallback rule; where its knobs do not mention ``admission``, it refuses as the policy does.

    A rule that lets in what the policy refuses builds queues that no such policy met in training, and then the way
    back to the policy is closed (docs/sim-to-real.md).

    Args:
        config: of the controller.
        policy: that it stands in for; None when it cannot be loaded.

    Raises:
        RlAutoscaleError: no such rule, or not these knobs.
    """
    choice = config.fallback
    level = _configured_admission(config.policy) if policy is None else policy.usual_admission
    if math.isfinite(level) and "admission" not in choice.knobs and not _is_path(choice.name):
        alike = {"admission": level, "selectivity": 0.0 if policy is None else policy.selectivity}
        choice = choice.model_copy(update={"knobs": alike | choice.knobs})
    return build_policy(choice, config.fleet)


def _configured_admission(choice: PolicyChoice) -> float:
    """What a policy that cannot be loaded would have done: exported policies refuse unless trained otherwise."""
    level = choice.knobs.get("admission")
    if isinstance(level, int | float):
        return float(level)
    return 1.0 if _is_path(choice.name) else NEVER_REFUSE


def _is_path(name: str) -> bool:
    return os.sep in name or Path(name).is_dir() or name.endswith(".json")


@dataclass(slots=True)
class Assembly:
    """A controller and what belongs to it."""

    controller: Controller
    fleet: LiveFleet
    modes: ModeSwitch
    metrics: ControllerMetrics
    status: StatusServer | None
    policy_error: str
    keda: Any = None

    def close(self) -> None:
        """Let go of ports, locks and connections; replicas stay."""
        if self.status is not None:
            self.status.close()
        if self.keda is not None:
            self.keda.stop()
        self.fleet.close()


def assemble(config: ControlConfig, clock: Clock, *, mode: Mode | None = None, path: Path | None = None) -> Assembly:
    """Build everything a configuration asks for; where that fails, what was built is closed again.

    A policy that cannot be loaded does not stop the controller: the fallback rule decides and every step says why.

    Args:
        config: validated.
        clock: the real one, but for tests.
        mode: asked for on the command line; default the configuration's.
        path: of the configuration, read again when it changes; None for never.

    Raises:
        SpecError: the fallback rule cannot be made, the status page's port is taken, or a back end cannot be reached
            for a reason that will not pass.
    """
    with ExitStack() as built:
        assembly = _assemble(config, clock, mode, path, built)
        built.pop_all()
    return assembly


def _assemble(config: ControlConfig, clock: Clock, mode: Mode | None, path: Path | None, built: ExitStack) -> Assembly:
    policy, error = _try_policy(config)
    fallback = build_fallback(config, policy)
    reread = Reread(path, read_mode) if path is not None else None
    modes = ModeSwitch(
        mode or config.mode,
        kill_file=config.kill_file,
        reread=reread,
        written=config.mode if "mode" in config.model_fields_set else None,
        environment=os.environ.get(ENVIRONMENT),
    )
    metrics = ControllerMetrics()
    history = History(config.status.history if config.status is not None else 1)
    status = None
    if config.status is not None:  # before any back end: a port that is taken must start no replica
        interval_s = config.fleet.control_interval_s
        status = StatusServer(config.status.host, config.status.port, history, metrics, modes, clock, interval_s)
        built.callback(status.close)
    may_act = modes.current()[0] == "active"
    backends, published = _build_backends(config, clock, may_act, built)
    if published:
        metrics.registry.register(DesiredReplicasCollector(published.values()))
    keda = _serve_keda(config, published)
    if keda is not None:
        built.callback(keda.stop)
    source = build_source(config.telemetry, clock)
    built.callback(source.close)
    fleet = _build_fleet(config, clock, backends, source)
    log = DecisionLog(config.decision_log) if config.decision_log is not None else None

    def remember(record: StepRecord) -> None:
        description = describe(record)
        history.add(description, clock.monotonic_s())
        if log is not None:
            log.write(description)

    limits = Limits(config.telemetry.stale_after_s, config.telemetry.min_coverage)
    controller = Controller(
        fleet,
        policy,
        fallback,
        config.shield,
        limits,
        config.safety,
        modes,
        clock,
        envelope=Envelope.from_card(policy.card) if isinstance(policy, LearnedPolicy) else None,
        shared_pools=published,
        policy_error=error,
        listeners=[metrics, remember],
        dial=Dial(config.policy, Reread(path, read_choice)) if path is not None else None,
    )
    return Assembly(controller, fleet, modes, metrics, status, error, keda)


def _try_policy(config: ControlConfig) -> tuple[RegisteredPolicy | None, str]:
    try:
        return build_policy(config.policy, config.fleet), ""
    except RlAutoscaleError as error:
        return None, str(error)


def _build_fleet(config: ControlConfig, clock: Clock, backends: dict[str, Backend], source: MetricsSource) -> LiveFleet:
    gateway = config.gateway
    client = None
    if gateway is not None:
        key = read_secret(gateway.key) if gateway.key is not None else None
        client = HttpGateway(gateway.url, token=key, timeout_s=gateway.timeout_s)
    return LiveFleet(
        config.fleet,
        backends,
        source,
        engine_names(config.telemetry.engine),
        clock,
        Limits(config.telemetry.stale_after_s, config.telemetry.min_coverage),
        gateway=client,
        publish_replicas=gateway is not None and gateway.publish_replicas,
    )


def build_source(config: TelemetryConfig, clock: Clock) -> MetricsSource:
    """Scrapes of every replica, or a Prometheus server."""
    names = engine_names(config.engine)
    if config.prometheus_url is None:
        return DirectSource(names, clock, timeout_s=config.timeout_s)
    return PrometheusSource(
        config.prometheus_url,
        names,
        clock,
        selector=config.selector,
        replica_label=config.replica_label,
        timeout_s=config.timeout_s,
    )


def _build_backends(
    config: ControlConfig, clock: Clock, may_act: bool, built: ExitStack
) -> tuple[dict[str, Backend], dict[str, DesiredReplicas]]:
    """Back ends by pool, and the published figures of those that are handed over.

    A local back end would start the pool's initial replicas; one of a controller that may not act takes over what runs.
    """
    backends: dict[str, Backend] = {}
    published: dict[str, DesiredReplicas] = {}
    try:
        for pool in config.fleet.pools:
            choice = config.backends[pool.name]
            if choice.observed is not None:
                published[pool.name] = DesiredReplicas(pool.name, clock)
            initial = pool.initial if may_act else 0
            backends[pool.name] = _build_backend(
                pool.name, choice, clock, config.telemetry.engine, initial, published.get(pool.name)
            )
            built.callback(backends[pool.name].close)
    except BackendError as error:
        raise SpecError(f"back end of pool '{pool.name}': {error}") from None
    return backends, published


def _build_backend(
    pool: str, choice: BackendChoice, clock: Clock, engine: str, initial: int, desired: DesiredReplicas | None
) -> Backend:
    if choice.local is not None:
        return LocalBackend(pool, choice.local, engine_names(engine), clock, initial=initial)
    if choice.rayserve is not None:
        return RayServeBackend(pool, choice.rayserve, clock)
    if choice.observed is not None and desired is not None:
        observer = KubernetesObserver(pool, choice.observed, open_api(choice.observed, clock), clock)
        return PublishingBackend(desired, observer)
    assert choice.kubernetes is not None  # BackendChoice has checked that one is given
    return KubernetesBackend.connect(pool, choice.kubernetes, clock)


def _serve_keda(config: ControlConfig, published: dict[str, DesiredReplicas]) -> Any:
    """The external scaler of all pools that KEDA owns, or None."""
    scaled = {name: published[name] for name, choice in config.backends.items() if choice.keda is not None}
    addresses = [choice.keda.address for choice in config.backends.values() if choice.keda is not None]
    if not addresses:
        return None
    from rl_autoscale.serving.backends.keda import KedaScaler  # needs grpc, which no other pool does

    scaler = KedaScaler(scaled)
    scaler.start(addresses[0])
    return scaler
