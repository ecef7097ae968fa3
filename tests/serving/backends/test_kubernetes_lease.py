"""The lease by itself: how long it lasts, and what ends it."""

from __future__ import annotations

import pytest
from serving.fake_kubernetes import Fault

from rl_autoscale.serving.backends.kubernetes_api import LEASES, KubernetesApi
from rl_autoscale.serving.backends.kubernetes_lease import WriterLease
from rl_autoscale.serving.protocols import BackendError

from .conftest import Cluster, FakeClock


@pytest.fixture
def api(fake_cluster: Cluster, clock: FakeClock) -> KubernetesApi:
    return KubernetesApi(fake_cluster.client, fake_cluster.namespace, clock, timeout_s=3.0, call_timeout_s=10.0)


@pytest.fixture
def lease(api: KubernetesApi, clock: FakeClock) -> WriterLease:
    return WriterLease(api, "writer", "us", 30, clock)


def test_lasts_from_before_the_request_that_renewed_it(lease: WriterLease, clock: FakeClock) -> None:
    assert lease.valid_for_s() <= 0
    lease.hold()
    assert lease.valid_for_s() == 30
    clock.sleep(12)
    assert lease.valid_for_s() == 18
    lease.hold()
    assert lease.valid_for_s() == 30


def test_the_record_tells_people_who_since_when_and_how_often(
    lease: WriterLease, api: KubernetesApi, clock: FakeClock
) -> None:
    lease.hold()
    first = api.read(LEASES, "writer")["spec"]
    clock.sleep(10)
    lease.hold()
    renewed = api.read(LEASES, "writer")["spec"]
    assert (renewed["holderIdentity"], renewed["leaseDurationSeconds"]) == ("us", 30)
    assert renewed["acquireTime"] == first["acquireTime"] < renewed["renewTime"]
    assert renewed["leaseTransitions"] == 0
    clock.sleep(1)
    heir = WriterLease(api, "writer", "heir", 30, clock)
    lease.release()
    heir.hold()
    assert api.read(LEASES, "writer")["spec"]["leaseTransitions"] == 1


def test_seeing_another_holder_ends_ours_at_once(lease: WriterLease, api: KubernetesApi) -> None:
    lease.hold()
    taken = api.read(LEASES, "writer")
    taken["spec"]["holderIdentity"] = "usurper"
    api.replace(LEASES, "writer", taken)
    with pytest.raises(BackendError, match="is held by usurper"):
        lease.hold()
    assert lease.valid_for_s() <= 0


def test_a_lost_race_is_no_right(lease: WriterLease, fake_cluster: Cluster) -> None:
    for verb in ("create", "update"):
        fake_cluster.fake.faults = [Fault(409, matching=f"{verb} leases")]
        with pytest.raises(BackendError) as error:
            lease.hold()
        assert error.value.retryable
        assert lease.valid_for_s() <= 0
        if verb == "create":
            fake_cluster.create("coordination.k8s.io", "v1", "leases", {"metadata": {"name": "writer"}, "spec": {}})


def test_a_failed_renewal_does_not_prolong(lease: WriterLease, fake_cluster: Cluster, clock: FakeClock) -> None:
    lease.hold()
    clock.sleep(20)
    fake_cluster.fake.faults = [Fault(500, matching="leases")]
    with pytest.raises(BackendError):
        lease.hold()
    assert lease.valid_for_s() == 10


def test_giving_back_what_is_not_ours_does_nothing(lease: WriterLease, api: KubernetesApi, clock: FakeClock) -> None:
    lease.hold()
    clock.sleep(31)
    lease.release()
    assert api.read(LEASES, "writer")["spec"]["holderIdentity"] == "us"
