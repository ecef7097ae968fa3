"""The Kubernetes back end on a cluster: what it sees, what it writes, and when it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes import client as kube

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.serving.backends.kubernetes import KubernetesConfig
from rl_autoscale.serving.protocols import BackendError

from .conftest import Cluster, FakeClock, asked_for, refused


def autoscaler(name: str = "llm", kind: str = "Deployment") -> dict[str, Any]:
    reference = {"apiVersion": "apps/v1", "kind": kind, "name": name}
    return {
        "apiVersion": "autoscaling/v1",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "theirs"},
        "spec": {"scaleTargetRef": reference, "minReplicas": 1, "maxReplicas": 9},
    }


def test_scales_and_says_what_is_in_force(cluster: Cluster, clock: FakeClock) -> None:
    cluster.deployment(replicas=1)
    backend = cluster.backend(clock)
    assert backend.observe().asked_for == 1
    backend.set_target(3)
    cluster.pods(3)
    assert backend.observe().asked_for == 3
    backend.set_target(0)
    cluster.pods(0)
    assert backend.observe() == type(backend.observe())(asked_for=0, replicas=())
    assert backend.foreign_changes == 0


def test_asking_twice_writes_once(cluster: Cluster, clock: FakeClock) -> None:
    cluster.deployment()
    backend = cluster.backend(clock)
    backend.set_target(2)
    before = cluster.apps.read_namespaced_deployment("llm", cluster.namespace).metadata.generation
    backend.set_target(2)
    assert cluster.apps.read_namespaced_deployment("llm", cluster.namespace).metadata.generation == before


def test_pods_become_replicas(cluster: Cluster, clock: FakeClock) -> None:
    cluster.deployment(replicas=3)
    serving, broken, pending = cluster.pods(3)
    cluster.make_ready(serving, ip="10.1.2.3")
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}}
    crashed = {"name": "vllm", "state": waiting, "ready": False, "restartCount": 2, "image": "i", "imageID": ""}
    cluster.set_status(broken, phase="Running", containerStatuses=[crashed])
    unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"}
    cluster.set_status(pending, phase="Pending", conditions=[unplaced])

    replicas = {replica.replica_id.rsplit("-", 2)[0]: replica for replica in cluster.backend(clock).observe().replicas}
    assert replicas[serving].phase == "ready"
    assert replicas[serving].url == "http://10.1.2.3:8000"
    assert replicas[serving].phase_age_s > 3600
    assert replicas[broken].phase == "failed"
    assert replicas[broken].reason == "CrashLoopBackOff: back-off 40s"
    assert replicas[broken].replica_id.endswith("-2")
    assert replicas[pending].phase == "starting"
    assert replicas[pending].reason == "Unschedulable: no GPU"
    assert replicas[pending].phase_age_s < 60


def test_a_replica_that_starts_for_too_long_has_failed(cluster: Cluster, clock: FakeClock) -> None:
    cluster.deployment(replicas=1)
    cluster.pods(1)
    backend = cluster.backend(clock, ready_deadline_s=600.0)
    assert backend.observe().replicas[0].phase == "starting"
    clock.sleep(601)
    (replica,) = backend.observe().replicas
    assert replica.phase == "failed"
    assert "not ready after 600 s" in replica.reason


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_a_jump_of_the_wall_clock_changes_no_age(fake_cluster: Cluster, clock: FakeClock, jump_s: float) -> None:
    fake_cluster.deployment(replicas=1)
    backend = fake_cluster.backend(clock)
    before = backend.observe().replicas[0].phase_age_s
    clock.sleep(5)
    clock.wall_offset_s += jump_s
    assert backend.observe().replicas[0].phase_age_s == pytest.approx(before + 5)


def test_refuses_a_target_that_an_hpa_owns(cluster: Cluster, clock: FakeClock) -> None:
    cluster.deployment(replicas=1)
    cluster.create("autoscaling", "v1", "horizontalpodautoscalers", autoscaler())
    error = refused(cluster.backend(clock), 4)
    assert "belongs to HorizontalPodAutoscaler theirs" in str(error)
    assert not error.retryable
    assert asked_for(cluster) == 1


@pytest.mark.parametrize("other", [autoscaler("another"), autoscaler("llm", kind="StatefulSet")])
def test_an_hpa_on_something_else_is_none_of_our_business(
    cluster: Cluster, clock: FakeClock, other: dict[str, Any]
) -> None:
    cluster.deployment(replicas=1)
    cluster.create("autoscaling", "v1", "horizontalpodautoscalers", other)
    cluster.backend(clock).set_target(2)
    assert asked_for(cluster) == 2


def test_refuses_a_target_that_keda_owns(cluster: Cluster, clock: FakeClock) -> None:
    cluster.define_crd("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects", scale=False)
    cluster.deployment(replicas=1)
    body = {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "theirs"}}
    cluster.create("keda.sh", "v1alpha1", "scaledobjects", {**body, "spec": {"scaleTargetRef": {"name": "llm"}}})
    error = refused(cluster.backend(clock), 4)
    assert "belongs to ScaledObject theirs" in str(error)
    assert asked_for(cluster) == 1


def test_one_writer_at_a_time(cluster: Cluster, clock: FakeClock) -> None:
    cluster.deployment(replicas=1)
    first, second = cluster.backend(clock, "first"), cluster.backend(clock, "second")
    first.set_target(2)
    error = refused(second, 5)
    assert "is held by first" in str(error)
    assert error.retryable
    clock.sleep(20)
    first.set_target(3)  # renews
    clock.sleep(20)
    assert "is held by first" in str(refused(second, 5))
    assert asked_for(cluster) == 3


def test_a_silent_writer_loses_its_right(cluster: Cluster, clock: FakeClock) -> None:
    cluster.deployment(replicas=1)
    first, second = cluster.backend(clock, "first"), cluster.backend(clock, "second")
    first.set_target(2)
    refused(second, 5)
    clock.sleep(31)
    second.set_target(5)
    assert asked_for(cluster) == 5
    error = refused(first, 2)
    assert "is held by second" in str(error)
    assert asked_for(cluster) == 5


def test_a_stranger_waits_a_whole_duration_of_its_own(cluster: Cluster, clock: FakeClock) -> None:
    """Time stamps of another machine say nothing: only what we watched ourselves counts."""
    cluster.deployment()
    cluster.backend(clock, "first").set_target(2)
    clock.sleep(1000)
    second = cluster.backend(clock, "second")
    assert "free in 30 s" in str(refused(second, 5))


def test_closing_gives_the_right_back(cluster: Cluster, clock: FakeClock) -> None:
    cluster.deployment()
    first, second = cluster.backend(clock, "first"), cluster.backend(clock, "second")
    first.set_target(2)
    first.close()
    second.set_target(5)
    assert asked_for(cluster) == 5


def test_a_manual_scale_is_seen_and_not_overwritten_unseen(cluster: Cluster, clock: FakeClock) -> None:
    cluster.deployment(replicas=1)
    backend = cluster.backend(clock)
    backend.set_target(2)
    cluster.scale("llm", 7)
    error = refused(backend, 3)
    assert "was scaled to 7 by somebody else" in str(error)
    assert error.retryable
    assert asked_for(cluster) == 7
    assert backend.observe().asked_for == 7
    backend.set_target(3)
    assert asked_for(cluster) == 3
    assert backend.foreign_changes == 1


def test_a_manual_scale_between_look_and_decision(cluster: Cluster, clock: FakeClock) -> None:
    cluster.deployment(replicas=1)
    backend = cluster.backend(clock)
    backend.observe()
    cluster.scale("llm", 7)
    assert refused(backend, 3).retryable
    assert asked_for(cluster) == 7


def test_a_rehearsal_changes_nothing_and_finds_what_is_forbidden(cluster: Cluster, clock: FakeClock) -> None:
    cluster.deployment(replicas=1)
    backend = cluster.backend(clock)
    backend.rehearse(5)
    assert asked_for(cluster) == 1
    with pytest.raises(BackendError, match="422") as error:
        backend.rehearse(-1)
    assert not error.value.retryable
    leases = kube.CoordinationV1Api(cluster.client).list_namespaced_lease(cluster.namespace)
    assert leases.items == []


def test_a_negative_target_is_invalid(cluster: Cluster, clock: FakeClock) -> None:
    cluster.deployment(replicas=1)
    error = refused(cluster.backend(clock), -1)
    assert "422" in str(error)
    assert not error.retryable


def test_a_missing_target_says_so(cluster: Cluster, clock: FakeClock) -> None:
    with pytest.raises(BackendError, match="deployments/llm") as error:
        cluster.backend(clock).observe()
    assert not error.value.retryable


def test_a_leader_worker_set_needs_no_more_than_its_name(cluster: Cluster, clock: FakeClock) -> None:
    group, version, plural = "leaderworkerset.x-k8s.io", "v1", "leaderworkersets"
    cluster.define_crd(group, version, "LeaderWorkerSet", plural, scale=True)
    body = {"apiVersion": f"{group}/{version}", "kind": "LeaderWorkerSet", "metadata": {"name": "llm"}}
    cluster.create(group, version, plural, {**body, "spec": {"replicas": 2}, "status": {"hpaPodSelector": "app=llm"}})
    backend = cluster.backend(clock, kind="LeaderWorkerSet")
    backend.set_target(4)
    assert backend.observe().asked_for == 4


def test_a_kind_of_your_own_needs_its_url() -> None:
    with pytest.raises(SpecError, match="give api_version and plural"):
        KubernetesConfig.from_dict({"namespace": "n", "name": "x", "kind": "Fleet"})
    config = KubernetesConfig(namespace="n", name="x", kind="Fleet", api_version="acme.io/v2", plural="fleets")
    assert (config.resource.group, config.resource.version, config.resource.plural) == ("acme.io", "v2", "fleets")


def test_a_lease_must_outlive_a_write() -> None:
    with pytest.raises(SpecError, match="must not outlive"):
        KubernetesConfig.from_dict({"namespace": "n", "name": "x", "lease_duration_s": 5})


def test_a_target_without_labels_asks_for_a_selector(fake_cluster: Cluster, clock: FakeClock) -> None:
    group, version, plural = "leaderworkerset.x-k8s.io", "v1", "leaderworkersets"
    fake_cluster.define_crd(group, version, "LeaderWorkerSet", plural, scale=True)
    body = {"apiVersion": f"{group}/{version}", "kind": "LeaderWorkerSet", "metadata": {"name": "llm"}}
    fake_cluster.create(group, version, plural, {**body, "spec": {"replicas": 2}})
    with pytest.raises(BackendError, match="set pod_selector"):
        fake_cluster.backend(clock, kind="LeaderWorkerSet").observe()
    selected = fake_cluster.backend(clock, kind="LeaderWorkerSet", pod_selector="app=llm")
    assert selected.observe().asked_for == 2
