"""Kubernetes: any target with a scale subresource, one writer, and no quarrel with another autoscaler.

A write happens only when, in this order, the lease is ours; no HorizontalPodAutoscaler and no KEDA ScaledObject owns
the target; and its ``replicas`` are what we last observed or wrote. It names the version that was read, so that a
change in between is a conflict and not an overwrite.

Which pods leave is Kubernetes' choice: a Deployment removes pods that are not ready first, then the youngest; a
StatefulSet the highest ordinal. They drain within their ``terminationGracePeriodSeconds``.
"""

from __future__ import annotations

import logging
import socket
import uuid
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rl_autoscale.fleet.config import Config
from rl_autoscale.serving.backends.http_failure import HttpFailure
from rl_autoscale.serving.backends.kubernetes_api import (
    AUTOSCALERS,
    SCALED_OBJECTS,
    Json,
    KubernetesApi,
    ResourceType,
    connect,
)
from rl_autoscale.serving.backends.kubernetes_lease import WriterLease
from rl_autoscale.serving.backends.kubernetes_pods import read_pod
from rl_autoscale.serving.backends.replica_view import PhaseAges, TargetMemory, to_replicas
from rl_autoscale.serving.protocols import BackendError, Clock, PoolObservation

logger = logging.getLogger(__name__)

KNOWN_KINDS: dict[str, tuple[str, str]] = {
    "Deployment": ("apps/v1", "deployments"),
    "StatefulSet": ("apps/v1", "statefulsets"),
    "LeaderWorkerSet": ("leaderworkerset.x-k8s.io/v1", "leaderworkersets"),
}
"""Kind -> API version and plural, for the kinds that need no more than their name."""

CONFLICT_ATTEMPTS = 3
"""A target's version also changes whenever one of its pods does, so a conflict or two mean nothing."""


class KubernetesConfig(Config):
    """Where a pool's replicas live. A kind of your own needs ``api_version`` and ``plural``."""

    namespace: str = Field(min_length=1)
    name: str = Field(min_length=1, description="the target's name")
    kind: str = "Deployment"
    api_version: str | None = Field(default=None, description="group/version; default by kind")
    plural: str | None = Field(default=None, description="the kind's name in URLs; default by kind")
    pod_selector: str | None = Field(default=None, description="labels of its pods; default what the scale reports")
    container: str | None = Field(default=None, description="the container that serves; default the pod's first")
    scheme: Literal["http", "https"] = "http"
    port: PositiveInt = 8000
    ready_deadline_s: PositiveFloat = Field(default=1800.0, description="a replica that starts for longer has failed")
    timeout_s: PositiveFloat = Field(default=3.0, description="longest a single request may take")
    call_timeout_s: PositiveFloat = Field(default=10.0, description="longest an observation or a write may take")
    lease_name: str | None = Field(default=None, description="default rl-autoscale-<name>")
    lease_duration_s: PositiveInt = Field(default=30, description="others wait this long for a silent writer")
    kubeconfig: Path | None = Field(default=None, description="default the service account of the controller's pod")
    context: str | None = None

    @model_validator(mode="after")
    def _check(self) -> KubernetesConfig:
        if self.kind not in KNOWN_KINDS and (self.api_version is None or self.plural is None):
            raise ValueError(f"kind '{self.kind}' is none of {', '.join(KNOWN_KINDS)}; give api_version and plural")
        if self.lease_duration_s <= self.call_timeout_s:
            raise ValueError(
                f"lease_duration_s={self.lease_duration_s} must exceed call_timeout_s={self.call_timeout_s}: "
                "a write must not outlive the right to write"
            )
        return self

    @property
    def resource(self) -> ResourceType:
        """The target's kind as the API's URLs name it."""
        default_version, default_plural = KNOWN_KINDS.get(self.kind, ("", ""))
        group, _, version = (self.api_version or default_version).rpartition("/")
        return ResourceType(group, version, self.plural or default_plural)


class KubernetesObserver:
    """Reads a pool's target and pods; writes nothing.

    Args:
        pool: the pool's name.
        config: where it lives.
        api: the way there.
        clock: measures ages.
    """

    def __init__(self, pool: str, config: KubernetesConfig, api: KubernetesApi, clock: Clock) -> None:
        self._pool = pool
        self._config = config
        self._api = api
        self._clock = clock
        self._ages = PhaseAges()

    @property
    def pool(self) -> str:
        """The pool's name."""
        return self._pool

    def observe(self) -> PoolObservation:
        """Two reads: the scale and the pods."""
        config = self._config
        with self._api.call():
            scale = self._api.read_scale(config.resource, config.name)
            pods = self._api.list_pods(self._selector(scale))
        views = [read_pod(pod, config.container) for pod in pods.items]
        ages_s = self._ages.update(views, now_s=self._clock.monotonic_s(), server_wall_s=pods.server_wall_s)
        replicas = to_replicas(
            views,
            ages_s,
            pool=self._pool,
            scheme=config.scheme,
            port=config.port,
            ready_deadline_s=config.ready_deadline_s,
        )
        return PoolObservation(asked_for=replicas_of(scale), replicas=replicas)

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def _selector(self, scale: Json) -> str:
        selector = self._config.pod_selector or (scale.get("status") or {}).get("selector")
        if not selector:
            raise BackendError(
                f"{target_name(self._config)} does not say which pods are its own; set pod_selector", retryable=False
            )
        return str(selector)


class KubernetesBackend:
    """Scales a pool by the scale subresource of its target; see `serving.protocols.Backend`.

    `set_target` is compare-and-set: when somebody else changed ``replicas`` since our last look it refuses once, with
    a retryable error, so that the next decision is taken on what is there now.

    Args:
        pool: the pool's name.
        config: where it lives.
        api: the way there.
        clock: measures ages and the lease.
        identity: who we are in the lease; None for one that is new in every process.
    """

    def __init__(
        self, pool: str, config: KubernetesConfig, api: KubernetesApi, clock: Clock, identity: str | None = None
    ) -> None:
        self._config = config
        self._api = api
        self._observer = KubernetesObserver(pool, config, api, clock)
        identity = identity or f"{socket.gethostname()}_{uuid.uuid4()}"
        lease_name = config.lease_name or f"rl-autoscale-{config.name}"
        self._lease = WriterLease(api, lease_name, identity, config.lease_duration_s, clock)
        self._memory = TargetMemory()

    @classmethod
    def connect(cls, pool: str, config: KubernetesConfig, clock: Clock) -> KubernetesBackend:
        """Connect as the configuration says; raises BackendError when there is no way in."""
        return cls(pool, config, open_api(config, clock), clock)

    @property
    def pool(self) -> str:
        """The pool's name."""
        return self._observer.pool

    @property
    def foreign_changes(self) -> int:
        """How often somebody else was seen to have changed ``replicas``."""
        return self._memory.foreign_changes

    def observe(self) -> PoolObservation:
        """Read target and pods; writes nothing, the lease included."""
        observation = self._observer.observe()
        if observation.asked_for is not None:
            self._notice(observation.asked_for)
        return observation

    def set_target(self, num_replicas: int) -> None:
        """Write ``replicas`` when everything the module promises holds; raises BackendError when not."""
        with self._api.call():
            self._lease.hold()
            self._refuse_other_owner()
            self._write_despite_conflicts(num_replicas, dry_run=False)

    def rehearse(self, num_replicas: int) -> None:
        """What `set_target` would do, as a server-side dry run: admission and permissions, no change, no lease.

        Raises:
            BackendError: as `set_target` would, except for the lease.
        """
        with self._api.call():
            self._refuse_other_owner()
            self._write_despite_conflicts(num_replicas, dry_run=True)

    def close(self) -> None:
        """Give the lease back and close the connections. Replicas stay."""
        self._lease.release()
        self._observer.close()

    def _write_despite_conflicts(self, num_replicas: int, *, dry_run: bool) -> None:
        for attempts_left in reversed(range(CONFLICT_ATTEMPTS)):
            try:
                self._write(num_replicas, dry_run=dry_run)
                return
            except HttpFailure as failure:
                if failure.status != 409 or not attempts_left:
                    raise

    def _write(self, num_replicas: int, *, dry_run: bool) -> None:
        config = self._config
        scale = self._api.read_scale(config.resource, config.name)
        in_force = replicas_of(scale)
        if self._notice(in_force):
            raise BackendError(
                f"{target_name(config)} was scaled to {in_force} by somebody else; observe again, then decide",
                retryable=True,
            )
        if in_force == num_replicas and not dry_run:
            self._memory.wrote(num_replicas)
            return
        if not dry_run:
            if self._lease.valid_for_s() <= config.timeout_s:
                raise BackendError(f"lease {self._lease.name} runs out too soon to write under it", retryable=True)
            self._memory.attempt(num_replicas)
        scale["spec"] = {**(scale.get("spec") or {}), "replicas": num_replicas}
        self._api.replace_scale(config.resource, config.name, scale, dry_run=dry_run)
        if not dry_run:
            self._memory.wrote(num_replicas)

    def _notice(self, in_force: int) -> bool:
        """Remember what is in force; True (and a warning) when somebody else changed it since our last look."""
        foreign = self._memory.notice(in_force)
        if foreign:
            logger.warning("%s was scaled to %s by somebody else", target_name(self._config), in_force)
        return foreign

    def _refuse_other_owner(self) -> None:
        """Raise when another autoscaler owns the target, or when it cannot be known."""
        for kind, what in ((AUTOSCALERS, "HorizontalPodAutoscaler"), (SCALED_OBJECTS, "ScaledObject")):
            try:
                owners = self._api.list_all(kind)
            except HttpFailure as failure:
                if failure.status == 404:  # the cluster does not know the kind: KEDA is not installed
                    continue
                raise
            for owner in owners:
                if self._owns(owner):
                    raise BackendError(
                        f"{target_name(self._config)} belongs to {what} {owner['metadata']['name']}; delete it, or "
                        "let it follow our figure with the keda or prometheus back end",
                        retryable=False,
                    )

    def _owns(self, owner: Json) -> bool:
        """Whether an autoscaler's target is ours; KEDA leaves out kind and version when it means a Deployment."""
        reference = (owner.get("spec") or {}).get("scaleTargetRef") or {}
        group = str(reference.get("apiVersion") or "apps/v1").rpartition("/")[0]
        kind = reference.get("kind") or "Deployment"
        config = self._config
        return (reference.get("name"), kind, group) == (config.name, config.kind, config.resource.group)


def open_api(config: KubernetesConfig, clock: Clock) -> KubernetesApi:
    """Connect to the API server that a configuration names."""
    client = connect(config.kubeconfig, config.context)
    return KubernetesApi(
        client, config.namespace, clock, timeout_s=config.timeout_s, call_timeout_s=config.call_timeout_s
    )


def replicas_of(scale: Json) -> int:
    """The target in force: JSON leaves a zero out."""
    return int((scale.get("spec") or {}).get("replicas") or 0)


def target_name(config: KubernetesConfig) -> str:
    """How messages name the target."""
    return f"{config.kind} {config.namespace}/{config.name}"
