"""What our Kubernetes back end relies on, asked of the fake and, with KUBECONFIG and ``-m live``, of a real server."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from kubernetes import client as kube
from kubernetes import watch

from .conftest import Cluster

DEPLOYMENTS = ("apps", "v1", "deployments")
LEASES = ("coordination.k8s.io", "v1", "leases")


def lease(name: str = "writer", **spec: Any) -> dict[str, Any]:
    values = {"holderIdentity": "a", "leaseDurationSeconds": 15, **spec}
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}, "spec": values}


def read_scale(cluster: Cluster, name: str = "llm", kind: tuple[str, str, str] = DEPLOYMENTS) -> dict[str, Any]:
    group, version, plural = kind
    return cluster.objects.get_namespaced_custom_object_scale(group, version, cluster.namespace, plural, name)


def write_scale(
    cluster: Cluster, scale: dict[str, Any], kind: tuple[str, str, str] = DEPLOYMENTS, **options: Any
) -> dict[str, Any]:
    group, version, plural = kind
    return cluster.objects.replace_namespaced_custom_object_scale(
        group, version, cluster.namespace, plural, scale["metadata"]["name"], scale, **options
    )


def write_lease(cluster: Cluster, body: dict[str, Any]) -> dict[str, Any]:
    group, version, plural = LEASES
    return cluster.objects.replace_namespaced_custom_object(
        group, version, cluster.namespace, plural, body["metadata"]["name"], body
    )


def refusal(error: pytest.ExceptionInfo[kube.ApiException]) -> tuple[int, str]:
    return error.value.status, json.loads(error.value.body)["reason"]


def test_creating_twice_is_a_conflict(cluster: Cluster) -> None:
    cluster.create(*LEASES, lease())
    with pytest.raises(kube.ApiException) as error:
        cluster.create(*LEASES, lease())
    assert refusal(error) == (409, "AlreadyExists")


def test_what_is_not_there_is_not_found(cluster: Cluster) -> None:
    with pytest.raises(kube.ApiException) as error:
        read_scale(cluster, "nobody")
    assert refusal(error) == (404, "NotFound")


def test_a_kind_nobody_defined_is_404(cluster: Cluster) -> None:
    with pytest.raises(kube.ApiException) as error:
        cluster.objects.list_namespaced_custom_object("nobody.example.com", "v1", cluster.namespace, "things")
    assert error.value.status == 404


def test_a_stale_scale_is_a_conflict_and_changes_nothing(cluster: Cluster) -> None:
    cluster.deployment(replicas=1)
    stale = read_scale(cluster)
    cluster.scale("llm", 2)
    stale["spec"]["replicas"] = 5
    with pytest.raises(kube.ApiException) as error:
        write_scale(cluster, stale)
    assert refusal(error) == (409, "Conflict")
    assert read_scale(cluster)["spec"]["replicas"] == 2


def test_a_scale_without_a_version_overwrites(cluster: Cluster) -> None:
    cluster.deployment(replicas=1)
    scale = read_scale(cluster)
    del scale["metadata"]["resourceVersion"]
    cluster.scale("llm", 2)
    scale["spec"]["replicas"] = 3
    assert write_scale(cluster, scale)["spec"]["replicas"] == 3


def test_a_negative_scale_is_invalid(cluster: Cluster) -> None:
    cluster.deployment()
    scale = read_scale(cluster)
    scale["spec"]["replicas"] = -1
    with pytest.raises(kube.ApiException) as error:
        write_scale(cluster, scale)
    assert refusal(error) == (422, "Invalid")


def test_a_dry_run_answers_as_if_and_changes_nothing(cluster: Cluster) -> None:
    cluster.deployment(replicas=1)
    scale = read_scale(cluster)
    del scale["metadata"]["resourceVersion"]  # a real server's controllers change it meanwhile
    scale["spec"]["replicas"] = 4
    assert write_scale(cluster, scale, dry_run="All")["spec"]["replicas"] == 4
    assert read_scale(cluster)["spec"]["replicas"] == 1
    scale["spec"]["replicas"] = -1
    with pytest.raises(kube.ApiException) as error:
        write_scale(cluster, scale, dry_run="All")
    assert error.value.status == 422


def test_json_leaves_a_zero_out_of_a_scale(cluster: Cluster) -> None:
    cluster.deployment(replicas=0)
    assert "replicas" not in read_scale(cluster)["spec"]


def test_a_scale_names_its_pods_labels(cluster: Cluster) -> None:
    cluster.deployment()
    assert read_scale(cluster)["status"]["selector"] == "app=llm"


def test_a_deployment_has_as_many_pods_as_asked_for(cluster: Cluster) -> None:
    cluster.deployment(replicas=2)
    cluster.pods(2)
    cluster.scale("llm", 3)
    cluster.pods(3)
    cluster.scale("llm", 1)
    cluster.pods(1)


def test_a_deployment_whose_labels_do_not_match_is_invalid(cluster: Cluster) -> None:
    template = {"metadata": {"labels": {"app": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    spec = {"selector": {"matchLabels": {"app": "a"}}, "template": template}
    body = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": spec}
    with pytest.raises(kube.ApiException) as error:
        cluster.create(*DEPLOYMENTS, body)
    assert refusal(error) == (422, "Invalid")


def test_a_lease_must_name_the_version_it_replaces(cluster: Cluster) -> None:
    cluster.create(*LEASES, lease())
    with pytest.raises(kube.ApiException) as error:
        write_lease(cluster, lease(holderIdentity="b"))
    assert refusal(error) == (422, "Invalid")


def test_of_two_takers_of_a_lease_one_is_refused(cluster: Cluster) -> None:
    seen = cluster.create(*LEASES, lease())
    write_lease(cluster, {**seen, "spec": {**seen["spec"], "holderIdentity": "b"}})
    with pytest.raises(kube.ApiException) as error:
        write_lease(cluster, {**seen, "spec": {**seen["spec"], "holderIdentity": "c"}})
    assert refusal(error) == (409, "Conflict")


def test_a_lease_must_last(cluster: Cluster) -> None:
    with pytest.raises(kube.ApiException) as error:
        cluster.create(*LEASES, lease(leaseDurationSeconds=0))
    assert refusal(error) == (422, "Invalid")


def test_writing_what_is_there_keeps_the_version(cluster: Cluster) -> None:
    made = cluster.create(*LEASES, lease())
    assert write_lease(cluster, made)["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


def test_pages_are_of_one_moment(cluster: Cluster) -> None:
    for index in range(5):
        cluster.create(*LEASES, lease(f"lease-{index}"))

    def page(**options: Any) -> dict[str, Any]:
        group, version, plural = LEASES
        return cluster.objects.list_namespaced_custom_object(group, version, cluster.namespace, plural, **options)

    first = page(limit=2)
    assert len(first["items"]) == 2
    cluster.create(*LEASES, lease("lease-zzz"))
    second = page(limit=2, _continue=first["metadata"]["continue"])
    last = page(limit=2, _continue=second["metadata"]["continue"])
    assert not last["metadata"].get("continue")
    names = [item["metadata"]["name"] for part in (first, second, last) for item in part["items"]]
    assert names == [f"lease-{index}" for index in range(5)]


def test_a_list_selects_by_label(cluster: Cluster) -> None:
    cluster.deployment("llm", replicas=2)
    cluster.deployment("other", replicas=1)
    cluster.pods(3)
    assert len(cluster.core.list_namespaced_pod(cluster.namespace, label_selector="app=llm").items) == 2


def test_a_watch_tells_what_happened_after_a_version(cluster: Cluster) -> None:
    before = cluster.create(*LEASES, lease("before"))
    made = cluster.create(*LEASES, lease())
    changed = write_lease(cluster, {**made, "spec": {**made["spec"], "holderIdentity": "b"}})
    group, version, plural = LEASES
    cluster.objects.delete_namespaced_custom_object(group, version, cluster.namespace, plural, "writer")
    events = watch.Watch().stream(
        cluster.objects.list_namespaced_custom_object,
        group,
        version,
        cluster.namespace,
        plural,
        resource_version=before["metadata"]["resourceVersion"],
        timeout_seconds=1,
    )
    seen = [(event["type"], event["object"]["spec"]["holderIdentity"]) for event in events]
    assert seen == [("ADDED", "a"), ("MODIFIED", "b"), ("DELETED", "b")]
    assert int(changed["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])


def pod(name: str, **spec: Any) -> dict[str, Any]:
    containers = [{"name": "vllm", "image": "example.invalid/vllm"}]
    return {"metadata": {"name": name}, "spec": {"containers": containers, "terminationGracePeriodSeconds": 90, **spec}}


def test_a_pod_on_no_node_is_deleted_at_once(cluster: Cluster) -> None:
    cluster.core.create_namespaced_pod(cluster.namespace, pod("a", nodeSelector={"rl-autoscale-test": "nowhere"}))
    cluster.core.delete_namespaced_pod("a", cluster.namespace)
    cluster.pods(0)


def test_a_pod_on_a_node_is_marked_with_the_time_of_its_end(cluster: Cluster) -> None:
    cluster.core.create_namespaced_pod(cluster.namespace, pod("a", nodeName="nowhere"))
    cluster.core.delete_namespaced_pod("a", cluster.namespace)
    meta = cluster.core.read_namespaced_pod("a", cluster.namespace).metadata
    assert meta.deletion_grace_period_seconds == 90
    ahead_s = (meta.deletion_timestamp - datetime.now(meta.deletion_timestamp.tzinfo)).total_seconds()
    assert 60 < ahead_s <= 90
    cluster.core.delete_namespaced_pod("a", cluster.namespace, grace_period_seconds=0)
    cluster.pods(0)


def test_answers_carry_the_servers_clock(cluster: Cluster) -> None:
    response = cluster.core.list_namespaced_pod(cluster.namespace, _preload_content=False)
    assert response.headers["Date"].endswith("GMT")


CUSTOM = ("leaderworkerset.x-k8s.io", "v1", "leaderworkersets")


def test_a_custom_kind_scales_the_same_way(cluster: Cluster) -> None:
    group, version, plural = CUSTOM
    cluster.define_crd(group, version, "LeaderWorkerSet", plural, scale=True)
    body = {"apiVersion": f"{group}/{version}", "kind": "LeaderWorkerSet", "metadata": {"name": "llm"}}
    made = cluster.create(*CUSTOM, {**body, "spec": {"replicas": 1}, "status": {"hpaPodSelector": "app=llm"}})
    scale = read_scale(cluster, "llm", CUSTOM)
    assert scale["status"]["selector"] == "app=llm"
    scale["spec"]["replicas"] = 3
    assert write_scale(cluster, scale, CUSTOM)["spec"]["replicas"] == 3
    with pytest.raises(kube.ApiException) as stale:
        write_scale(cluster, {**scale, "spec": {"replicas": 4}}, CUSTOM)
    assert refusal(stale) == (409, "Conflict")
    with pytest.raises(kube.ApiException) as negative:
        write_scale(cluster, {**read_scale(cluster, "llm", CUSTOM), "spec": {"replicas": -1}}, CUSTOM)
    assert refusal(negative) == (422, "Invalid")
    del made["metadata"]["resourceVersion"]
    with pytest.raises(kube.ApiException) as unnamed:
        cluster.objects.replace_namespaced_custom_object(group, version, cluster.namespace, plural, "llm", made)
    assert refusal(unnamed) == (422, "Invalid")
