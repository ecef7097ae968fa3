"""A cluster to test on (the fake, or a real one under KUBECONFIG), pods that get their status by hand, a clock.

And a local back end on make-believe processes.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="needs the 'serve' extra")

from kubernetes import client as kube
from kubernetes import config as kube_config
from serving.fake_kubernetes import FakeKubernetes
from serving.local_bench import Bench

from rl_autoscale.serving.backends.kubernetes import KubernetesBackend, KubernetesConfig
from rl_autoscale.serving.backends.kubernetes_api import KubernetesApi
from rl_autoscale.serving.protocols import BackendError

Json = dict[str, Any]


@dataclass
class FakeClock:
    """Time that passes only when told."""

    now_s: float = 1000.0
    wall_offset_s: float = 1.8e9

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s + self.wall_offset_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


@dataclass
class Cluster:
    """A namespace of its own on some API server."""

    client: kube.ApiClient
    namespace: str
    fake: FakeKubernetes | None = None
    backends: list[KubernetesBackend] = field(default_factory=list)
    defined: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = kube.CoreV1Api(self.client)
        self.apps = kube.AppsV1Api(self.client)
        self.objects = kube.CustomObjectsApi(self.client)

    def deployment(self, name: str = "llm", replicas: int = 1) -> Json:
        """Create a Deployment whose pods no scheduler can place and no kubelet will run."""
        labels = {"app": name}
        template = {
            "metadata": {"labels": labels},
            "spec": {
                "nodeSelector": {"rl-autoscale-test": "nowhere"},
                "containers": [{"name": "vllm", "image": "example.invalid/vllm"}],
            },
        }
        spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
        body = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}
        return self.create("apps", "v1", "deployments", body)

    def create(self, group: str, version: str, plural: str, body: Json) -> Json:
        return self.objects.create_namespaced_custom_object(group, version, self.namespace, plural, body)

    def scale(self, name: str, replicas: int) -> None:
        """Scale as a person with kubectl does."""
        body = {"spec": {"replicas": replicas}}
        self.objects.patch_namespaced_custom_object_scale(
            "apps", "v1", self.namespace, "deployments", name, body, _content_type="application/merge-patch+json"
        )

    def pods(self, count: int | None = None) -> list[str]:
        """Names of the pods, once there are ``count``."""
        names: list[str] = []

        def enough() -> bool:
            names[:] = sorted(pod.metadata.name for pod in self.core.list_namespaced_pod(self.namespace).items)
            return count is None or len(names) == count

        self.eventually(enough)
        return names

    def set_status(self, pod: str, **status: Any) -> None:
        """Write a pod's status as its kubelet would."""
        self.core.patch_namespaced_pod_status(
            pod, self.namespace, {"status": status}, _content_type="application/merge-patch+json"
        )

    def make_ready(self, pod: str, ip: str = "10.0.0.1") -> None:
        conditions = [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]
        self.set_status(pod, phase="Running", podIP=ip, podIPs=[{"ip": ip}], conditions=conditions)

    def define_crd(self, group: str, version: str, kind: str, plural: str, *, scale: bool) -> None:
        """Teach the server a custom kind, with a scale like LeaderWorkerSet's when asked for."""
        loose = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        schema = {"type": "object", "properties": {"spec": loose, "status": loose}}
        if scale:
            replicas = {"replicas": {"type": "integer", "minimum": 0}}
            schema["properties"]["spec"] = {**loose, "properties": replicas}
        served: Json = {"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
        if scale:
            paths = {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.hpaPodSelector",
            }
            served["subresources"] = {"scale": paths}
        names = {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": kind + "List"}
        spec = {"group": group, "scope": "Namespaced", "names": names, "versions": [served]}
        body = {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.{group}"},
            "spec": spec,
        }
        try:
            self.objects.create_cluster_custom_object("apiextensions.k8s.io", "v1", "customresourcedefinitions", body)
            self.defined.append(f"{plural}.{group}")
        except kube.ApiException as error:
            if error.status != 409:
                raise
        self.eventually(lambda: self._serves(group, version, plural))

    def _serves(self, group: str, version: str, plural: str) -> bool:
        try:
            self.objects.list_namespaced_custom_object(group, version, self.namespace, plural)
        except kube.ApiException:
            return False
        return True

    def eventually(self, holds: Callable[[], bool]) -> None:
        """Wait for a real server's controllers; the fake's are never late."""
        deadline = time.monotonic() + (0.0 if self.fake else 20.0)
        while not holds():
            assert time.monotonic() < deadline, "did not come true in time"
            time.sleep(0.05)

    def backend(self, clock: FakeClock, identity: str | None = None, **config: Any) -> KubernetesBackend:
        settings = KubernetesConfig(**{"namespace": self.namespace, "name": "llm", **config})
        client = self.fake.client() if self.fake else kube_config.new_client_from_config()
        client.configuration.retries = False
        api = KubernetesApi(client, self.namespace, clock, timeout_s=settings.timeout_s, call_timeout_s=10.0)
        backend = KubernetesBackend("chat", settings, api, clock, identity)
        self.backends.append(backend)
        return backend


def asked_for(cluster: Cluster) -> int:
    return kube.AppsV1Api(cluster.client).read_namespaced_deployment("llm", cluster.namespace).spec.replicas


def refused(backend: Any, replicas: int) -> BackendError:
    with pytest.raises(BackendError) as error:
        backend.set_target(replicas)
    return error.value


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.live)])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The fake, and with ``-m live`` the server that KUBECONFIG names."""
    if request.param == "fake":
        yield from _on_fake()
        return
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("no real API server: set KUBECONFIG")
    client = kube_config.new_client_from_config()
    namespace = f"rl-autoscale-test-{uuid.uuid4().hex[:8]}"
    core = kube.CoreV1Api(client)
    core.create_namespace({"metadata": {"name": namespace}})
    cluster = Cluster(client, namespace)
    yield cluster
    _close(cluster)
    for name in cluster.defined:  # what was there before stays
        kube.ApiextensionsV1Api(client).delete_custom_resource_definition(name)
    core.delete_namespace(namespace)
    client.close()


@pytest.fixture
def fake_cluster() -> Iterator[Cluster]:
    """The fake alone, for faults that a real server does not make on demand."""
    yield from _on_fake()


def _on_fake() -> Iterator[Cluster]:
    with FakeKubernetes() as fake:
        client = fake.client()
        cluster = Cluster(client, "serving", fake)
        yield cluster
        _close(cluster)
        client.close()


def _close(cluster: Cluster) -> None:
    for backend in cluster.backends:
        backend.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A local back end whose processes are make-believe."""
    bench = Bench(tmp_path)
    yield bench
    bench.backend.close()
