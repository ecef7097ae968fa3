"""The Kubernetes back end when the API server refuses, hangs, loses answers or is not there; only the fake does."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving.fake_kubernetes import Fault

from rl_autoscale.serving.backends.kubernetes import KubernetesBackend, KubernetesConfig
from rl_autoscale.serving.protocols import BackendError

from .conftest import Cluster, FakeClock, asked_for, refused


@pytest.mark.parametrize(("status", "retryable"), [(500, True), (503, True), (429, True), (403, False), (401, False)])
def test_a_refusal_says_whether_to_try_again(
    fake_cluster: Cluster, clock: FakeClock, status: int, retryable: bool
) -> None:
    fake_cluster.deployment(replicas=1)
    fake_cluster.fake.faults = [Fault(status, matching="update deployments/scale")]
    backend = fake_cluster.backend(clock)
    error = refused(backend, 2)
    assert str(status) in str(error)
    assert error.retryable is retryable
    assert asked_for(fake_cluster) == 1
    backend.set_target(2)
    assert asked_for(fake_cluster) == 2


def test_retry_after_is_kept_without_sleeping(fake_cluster: Cluster, clock: FakeClock) -> None:
    fake_cluster.deployment(replicas=1)
    fake_cluster.fake.faults = [Fault(429, matching="get deployments/scale", headers={"Retry-After": "7"})]
    backend = fake_cluster.backend(clock)
    with pytest.raises(BackendError, match="429") as first:
        backend.observe()
    assert first.value.retry_after_s == 7
    num_requests = len(fake_cluster.fake.requests)
    clock.sleep(5)
    with pytest.raises(BackendError, match=r"wait 2\.0 s more"):
        backend.observe()
    assert len(fake_cluster.fake.requests) == num_requests
    clock.sleep(2)
    assert backend.observe().asked_for == 1


def test_a_conflict_or_two_are_tried_again(fake_cluster: Cluster, clock: FakeClock) -> None:
    fake_cluster.deployment(replicas=1)
    backend = fake_cluster.backend(clock)
    fake_cluster.fake.faults = [Fault(409, matching="update deployments/scale", times=2)]
    backend.rehearse(2)
    fake_cluster.fake.faults = [Fault(409, matching="update deployments/scale", times=2)]
    backend.set_target(2)
    assert asked_for(fake_cluster) == 2


def test_a_target_in_constant_conflict_is_left_for_the_next_tick(fake_cluster: Cluster, clock: FakeClock) -> None:
    fake_cluster.deployment(replicas=1)
    fake_cluster.fake.faults = [Fault(409, matching="update deployments/scale", times=99)]
    error = refused(fake_cluster.backend(clock), 2)
    assert error.retryable
    assert fake_cluster.fake.faults[0].times == 99 - 3


@pytest.mark.parametrize("status", [0, 504])
def test_a_lost_reply_is_no_foreign_change(fake_cluster: Cluster, clock: FakeClock, status: int) -> None:
    """The write was done, its answer never came: the next look finds our own figure."""
    fake_cluster.deployment(replicas=1)
    backend = fake_cluster.backend(clock)
    backend.observe()
    fake_cluster.fake.faults = [Fault(status, matching="update deployments/scale", after=True)]
    assert refused(backend, 2).retryable
    assert asked_for(fake_cluster) == 2
    backend.set_target(3)
    assert backend.foreign_changes == 0
    assert asked_for(fake_cluster) == 3


def test_a_cut_line_is_retryable(fake_cluster: Cluster, clock: FakeClock) -> None:
    fake_cluster.deployment()
    fake_cluster.fake.faults = [Fault(0, matching="list pods")]
    with pytest.raises(BackendError) as error:
        fake_cluster.backend(clock).observe()
    assert error.value.retryable


def test_a_server_that_is_not_there_is_retryable(fake_cluster: Cluster, clock: FakeClock) -> None:
    backend = fake_cluster.backend(clock)
    fake_cluster.fake.__exit__()
    fake_cluster.backends.clear()
    with pytest.raises(BackendError) as error:
        backend.observe()
    assert error.value.retryable


def test_a_renewal_that_fails_writes_nothing(fake_cluster: Cluster, clock: FakeClock) -> None:
    fake_cluster.deployment(replicas=1)
    backend = fake_cluster.backend(clock)
    backend.set_target(2)
    fake_cluster.fake.faults = [Fault(500, matching="update leases")]
    assert refused(backend, 3).retryable
    assert asked_for(fake_cluster) == 2


def test_a_lease_that_runs_out_during_the_write_stops_it(fake_cluster: Cluster, clock: FakeClock) -> None:
    fake_cluster.deployment(replicas=1)
    backend = fake_cluster.backend(clock, timeout_s=40.0)  # longer than the lease lasts
    assert "runs out too soon" in str(refused(backend, 2))
    assert asked_for(fake_cluster) == 1


def test_owners_that_cannot_be_read_are_no_owners_that_are_absent(fake_cluster: Cluster, clock: FakeClock) -> None:
    fake_cluster.deployment(replicas=1)
    fake_cluster.fake.faults = [Fault(403, matching="list horizontalpodautoscalers")]
    assert not refused(fake_cluster.backend(clock), 2).retryable
    assert asked_for(fake_cluster) == 1


def test_a_page_that_expires_begins_the_list_anew(
    fake_cluster: Cluster, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl_autoscale.serving.backends.kubernetes_api.PAGE_SIZE", 2)
    fake_cluster.deployment(replicas=5)
    fake_cluster.fake.faults = [Fault(410, matching="list pods")]
    assert len(fake_cluster.backend(clock).observe().replicas) == 5
    lists = [request for request in fake_cluster.fake.requests if request.resource == "pods"]
    assert [bool(request.query.get("continue")) for request in lists] == [False, True, True]


def test_a_call_is_bounded_as_a_whole(fake_cluster: Cluster, clock: FakeClock) -> None:
    fake_cluster.deployment(replicas=1)
    backend = fake_cluster.backend(clock)
    clock.monotonic_s = iter(range(0, 1000, 6)).__next__  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="for the whole call are over") as error:
        backend.observe()
    assert error.value.retryable


def test_connects_as_a_kubeconfig_says_and_never_sleeps_on_a_retry(
    fake_cluster: Cluster, clock: FakeClock, tmp_path: Path
) -> None:
    fake_cluster.deployment(replicas=2)
    config = KubernetesConfig(
        namespace=fake_cluster.namespace, name="llm", kubeconfig=fake_cluster.fake.kubeconfig(tmp_path)
    )
    backend = KubernetesBackend.connect("chat", config, clock)
    assert backend.observe().asked_for == 2
    fake_cluster.fake.requests.clear()
    # urllib3 would sleep and ask again.
    fake_cluster.fake.faults = [Fault(503, matching="get deployments/scale", headers={"Retry-After": "1"})]
    with pytest.raises(BackendError, match="503"):
        backend.observe()
    clock.sleep(1)
    fake_cluster.fake.faults = [Fault(503, matching="get deployments/scale", headers={"Retry-After": "3600"})]
    with pytest.raises(BackendError, match="503"):
        backend.observe()
    clock.sleep(61)  # no header switches a controller off for an hour
    assert backend.observe().asked_for == 2
    backend.close()


def test_outside_a_cluster_it_says_what_to_set(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(BackendError, match="set 'kubeconfig'") as error:
        KubernetesBackend.connect("chat", KubernetesConfig(namespace="n", name="x"), clock)
    assert not error.value.retryable
