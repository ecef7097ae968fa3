"""From pods to replicas: phase, since when, and the reason in Kubernetes' own words. Pure.

| pod                                                                         | phase    |
|-----------------------------------------------------------------------------|----------|
| deletion asked for                                                          | draining |
| condition Ready                                                             | ready    |
| phase Failed or Succeeded; container crashed, or cannot be pulled or made   | failed   |
| anything else, for less than the deadline                                   | starting |
| anything else, for longer                                                   | failed   |
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rl_autoscale.serving.backends.replica_view import ReplicaView
from rl_autoscale.serving.protocols import Phase

Json = dict[str, Any]

BROKEN_REASONS = frozenset(
    {
        "CrashLoopBackOff",
        "CreateContainerConfigError",
        "CreateContainerError",
        "ErrImageNeverPull",
        "ErrImagePull",
        "ImageInspectError",
        "ImagePullBackOff",
        "InvalidImageName",
        "RunContainerError",
    }
)
"""Why a container waits when waiting alone will not make it serve (kubelet's own names)."""


def read_pod(pod: Json, container: str | None = None) -> ReplicaView:
    """Say what a pod is to a fleet.

    Its id is the pod's name, the start of its uid (a StatefulSet reuses names) and the restarts of the serving
    container: a restarted server has new counters, so it is a new replica.

    Args:
        pod: the object as the API server sends it.
        container: the container that serves; None for the first.
    """
    meta, status = pod["metadata"], pod.get("status") or {}
    server = _server_status(pod, container)
    restarts = int(server.get("restartCount") or 0)
    phase, since, reason = _phase(meta, status, server)
    return ReplicaView(
        replica_id=f"{meta['name']}-{meta['uid'][:8]}-{restarts}",
        address=status.get("podIP") or None,
        phase=phase,
        since_wall_s=since,
        reason=reason,
    )


def _phase(meta: Json, status: Json, server: Json) -> tuple[Phase, float | None, str]:
    ready = _condition(status, "Ready")
    changed = _seconds(ready.get("lastTransitionTime"))
    if meta.get("deletionTimestamp"):
        # The time stamp is when the pod will be killed, not when it was asked to leave.
        kill = _seconds(meta["deletionTimestamp"])
        grace_s = float(meta.get("deletionGracePeriodSeconds") or 0)
        return "draining", None if kill is None else kill - grace_s, "Terminating"
    if status.get("phase") in ("Failed", "Succeeded"):
        return "failed", changed, _join(status.get("reason") or status["phase"], status.get("message"))
    if ready.get("status") == "True":
        return "ready", changed, ""
    if broken := _broken(status, server):
        return "failed", changed, broken
    return "starting", _starting_since(meta, server, changed), _waiting_for(status, server, ready)


def _broken(status: Json, server: Json) -> str:
    """Why the pod will not serve by waiting; empty when it may."""
    state = server.get("state") or {}
    if (ended := state.get("terminated")) is not None:
        return _join(ended.get("reason") or "Terminated", f"exit code {ended.get('exitCode')}")
    for each in (server, *(status.get("initContainerStatuses") or ())):
        waiting = (each.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in BROKEN_REASONS:
            return _join(waiting["reason"], waiting.get("message"))
    return ""


def _starting_since(meta: Json, server: Json, changed: float | None) -> float | None:
    """Creation, unless the server ran before: then since it stopped being ready."""
    running = _seconds(((server.get("state") or {}).get("running") or {}).get("startedAt"))
    served = changed is not None and running is not None and changed > running
    if changed is not None and (served or server.get("restartCount")):
        return changed
    return _seconds(meta.get("creationTimestamp"))


def _waiting_for(status: Json, server: Json, ready: Json) -> str:
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return _join(scheduled.get("reason") or "Unschedulable", scheduled.get("message"))
    for each in (*(status.get("initContainerStatuses") or ()), server):
        waiting = (each.get("state") or {}).get("waiting") or {}
        if waiting.get("reason"):
            return _join(waiting["reason"], waiting.get("message"))
    return _join(ready.get("reason") or status.get("phase") or "Pending", ready.get("message"))


def _server_status(pod: Json, container: str | None) -> Json:
    """The status of the serving container; empty before the kubelet has written one."""
    specs = (pod.get("spec") or {}).get("containers") or [{}]
    name = container or specs[0].get("name")
    statuses: list[Json] = (pod.get("status") or {}).get("containerStatuses") or []
    return next((status for status in statuses if status.get("name") == name), {})


def _condition(status: Json, kind: str) -> Json:
    conditions: list[Json] = status.get("conditions") or []
    return next((condition for condition in conditions if condition.get("type") == kind), {})


def _join(reason: str, detail: str | None) -> str:
    return f"{reason}: {detail}" if detail else reason


def _seconds(stamp: str | None) -> float | None:
    return None if not stamp else datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
