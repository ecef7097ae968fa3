"""Pods as the API server sends them, and what they are to a fleet."""

from __future__ import annotations

from typing import Any

import pytest

from rl_autoscale.serving.backends.kubernetes_pods import read_pod
from rl_autoscale.serving.backends.replica_view import PhaseAges, to_replicas

CREATED, STARTED, CHANGED = "2026-11-21T10:00:00Z", "2026-11-21T10:01:00Z", "2026-11-21T10:02:00Z"


def seconds_after_ten(since: float | None) -> float:
    assert since is not None
    return since % 3600


def pod(*, meta: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    base = {"name": "llm-0", "uid": "0123456789abcdef", "creationTimestamp": CREATED}
    return {"metadata": {**base, **(meta or {})}, "spec": {"containers": [{"name": "vllm"}]}, "status": status}


def ready(value: str, **more: Any) -> list[dict[str, Any]]:
    return [{"type": "Ready", "status": value, "lastTransitionTime": CHANGED, **more}]


def server(state: dict[str, Any], restarts: int = 0, name: str = "vllm") -> dict[str, Any]:
    return {"name": name, "restartCount": restarts, "state": state}


RUNNING = {"running": {"startedAt": STARTED}}


def test_an_empty_pod_is_starting_since_its_creation() -> None:
    view = read_pod(pod())
    assert (view.phase, view.reason, view.address) == ("starting", "Pending", None)
    assert seconds_after_ten(view.since_wall_s) == 0


def test_the_drain_began_when_it_was_asked_for_not_when_it_will_end() -> None:
    meta = {"deletionTimestamp": "2026-11-21T10:05:00Z", "deletionGracePeriodSeconds": 240}
    view = read_pod(pod(meta=meta, conditions=ready("True")))
    assert view.phase == "draining"
    assert seconds_after_ten(view.since_wall_s) == 60


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}, "Evicted: low on memory"),
        ({"phase": "Succeeded"}, "Succeeded"),
        (
            {"containerStatuses": [server({"terminated": {"reason": "OOMKilled", "exitCode": 137}})]},
            "OOMKilled: exit code 137",
        ),
        ({"containerStatuses": [server({"waiting": {"reason": "ImagePullBackOff"}})]}, "ImagePullBackOff"),
        (
            {"initContainerStatuses": [server({"waiting": {"reason": "CrashLoopBackOff"}}, name="fetch")]},
            "CrashLoopBackOff",
        ),
    ],
)
def test_what_waiting_does_not_heal_has_failed(status: dict[str, Any], reason: str) -> None:
    view = read_pod(pod(**status))
    assert (view.phase, view.reason) == ("failed", reason)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"}
                ]
            },
            "Unschedulable: no GPU",
        ),
        ({"containerStatuses": [server({"waiting": {"reason": "ContainerCreating"}})]}, "ContainerCreating"),
        (
            {"conditions": ready("False", reason="ContainersNotReady"), "containerStatuses": [server(RUNNING)]},
            "ContainersNotReady",
        ),
    ],
)
def test_what_may_still_come_is_starting(status: dict[str, Any], reason: str) -> None:
    view = read_pod(pod(**status))
    assert (view.phase, view.reason) == ("starting", reason)


def test_a_server_that_lost_its_readiness_starts_since_then() -> None:
    view = read_pod(pod(conditions=ready("False"), containerStatuses=[server(RUNNING)]))
    assert seconds_after_ten(view.since_wall_s) == 120


def test_a_first_start_counts_from_creation() -> None:
    conditions = [{"type": "Ready", "status": "False", "lastTransitionTime": "2026-11-21T10:00:30Z"}]
    view = read_pod(pod(conditions=conditions, containerStatuses=[server(RUNNING)]))
    assert seconds_after_ten(view.since_wall_s) == 0


def test_a_restart_of_the_server_is_a_new_replica_and_of_a_sidecar_is_not() -> None:
    def identity(**restarts: int) -> str:
        statuses = [server(RUNNING, count, name) for name, count in restarts.items()]
        return read_pod(pod(conditions=ready("True"), containerStatuses=statuses)).replica_id

    assert identity(vllm=0, proxy=0) == identity(vllm=0, proxy=3) == "llm-0-01234567-0"
    assert identity(vllm=1, proxy=0) != identity(vllm=0, proxy=0)


def test_the_serving_container_can_be_named() -> None:
    crashed = server({"waiting": {"reason": "CrashLoopBackOff"}}, name="vllm")
    statuses = [crashed, server(RUNNING, restarts=5, name="engine")]
    assert read_pod(pod(containerStatuses=statuses), container="engine").phase == "starting"
    assert read_pod(pod(containerStatuses=statuses), container="engine").replica_id.endswith("-5")
    assert read_pod(pod(containerStatuses=statuses)).phase == "failed"


def test_ages_begin_with_the_clusters_clock_and_go_on_with_ours() -> None:
    ages = PhaseAges()
    view = read_pod(pod(conditions=ready("True")))
    assert view.since_wall_s is not None
    assert ages.update([view], now_s=50.0, server_wall_s=view.since_wall_s + 30.0) == [30.0]
    assert ages.update([view], now_s=57.0, server_wall_s=view.since_wall_s + 9999.0) == [37.0]
    drained = read_pod(pod(meta={"deletionTimestamp": CHANGED}, conditions=ready("True")))
    assert ages.update([drained], now_s=60.0, server_wall_s=None) == [0.0]
    assert ages.update([view], now_s=61.0, server_wall_s=None) == [0.0]


def test_a_time_stamp_of_the_future_is_no_negative_age() -> None:
    view = read_pod(pod(conditions=ready("True")))
    assert view.since_wall_s is not None
    assert PhaseAges().update([view], now_s=0.0, server_wall_s=view.since_wall_s - 10.0) == [0.0]


def test_an_ipv6_address_is_bracketed() -> None:
    view = read_pod(pod(podIP="fd00::7", conditions=ready("True")))
    (replica,) = to_replicas([view], [1.0], pool="p", scheme="https", port=8443, ready_deadline_s=60.0)
    assert replica.url == "https://[fd00::7]:8443"
