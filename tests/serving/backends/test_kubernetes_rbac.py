"""The Role in deploy/ is enough for the back end, and not more than it uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client as kube

from rl_autoscale.serving.protocols import BackendError

from .conftest import Cluster, FakeClock

ACCOUNT = "rl-autoscale-controller"


@pytest.fixture
def rules(repository: Path) -> list[dict[str, Any]]:
    text = (repository / "deploy" / "kubernetes" / "rbac.yaml").read_text(encoding="utf-8")
    (role,) = [document for document in yaml.safe_load_all(text) if document["kind"] == "Role"]
    return role["rules"]


def confine(cluster: Cluster, rules: list[dict[str, Any]]) -> None:
    """Let backends act with these rules and no more; on a real server by impersonation of the account."""
    if cluster.fake:
        cluster.fake.rules = rules
        return
    api = kube.RbacAuthorizationV1Api(cluster.client)
    api.create_namespaced_role(cluster.namespace, {"metadata": {"name": ACCOUNT}, "rules": rules})
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": ACCOUNT}
    subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": cluster.namespace}
    binding = {"metadata": {"name": ACCOUNT}, "roleRef": reference, "subjects": [subject]}
    api.create_namespaced_role_binding(cluster.namespace, binding)


def backend_of(cluster: Cluster, clock: FakeClock) -> Any:
    backend = cluster.backend(clock, name="vllm")
    if not cluster.fake:
        user = f"system:serviceaccount:{cluster.namespace}:{ACCOUNT}"
        backend._api._client.set_default_header("Impersonate-User", user)
    return backend


def act(backend: Any, clock: FakeClock) -> None:
    """Everything that the back end ever does."""
    backend.observe()
    backend.rehearse(2)
    backend.set_target(2)
    clock.sleep(10)
    backend.set_target(3)
    backend.observe()


def test_the_role_is_enough(cluster: Cluster, clock: FakeClock, rules: list[dict[str, Any]]) -> None:
    cluster.deployment("vllm")
    cluster.deployment("other")
    confine(cluster, rules)
    act(backend_of(cluster, clock), clock)
    if cluster.fake:
        cluster.fake.rules = None
    assert cluster.apps.read_namespaced_deployment("vllm", cluster.namespace).spec.replicas == 3


def test_the_role_reaches_no_other_target(cluster: Cluster, clock: FakeClock, rules: list[dict[str, Any]]) -> None:
    cluster.deployment("vllm")
    cluster.deployment("other")
    confine(cluster, rules)
    backend = backend_of(cluster, clock)
    backend._config = backend._config.model_copy(update={"name": "other"})
    with pytest.raises(BackendError, match="403") as error:
        backend.set_target(2)
    assert not error.value.retryable


def test_nothing_in_the_role_is_unused(fake_cluster: Cluster, clock: FakeClock, rules: list[dict[str, Any]]) -> None:
    granted = {
        (verb, group, resource)
        for rule in rules
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    fake_cluster.deployment("vllm")
    fake_cluster.fake.requests.clear()
    backend = backend_of(fake_cluster, clock)
    act(backend, clock)
    backend.close()
    fake_cluster.backends.clear()
    used = {(request.verb, request.group, request.resource) for request in fake_cluster.fake.requests}
    assert used == granted
