"""Kinds and objects of the API server in `fake_kubernetes`: what is valid, what a scale shows, who is selected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serving.fake_kubernetes_http import Json, Refused


@dataclass(frozen=True)
class Kind:
    """What the server must know of a kind."""

    name: str
    group: str
    version: str
    plural: str
    namespaced: bool = True
    scale: bool = False
    selector_path: str = ""  # where a custom kind keeps its pods' labels, as text
    needs_version: bool = False  # an update must name the version it replaces
    custom: bool = False


BUILT_IN = [
    Kind("Namespace", "", "v1", "namespaces", namespaced=False),
    Kind("Pod", "", "v1", "pods"),
    Kind("Deployment", "apps", "v1", "deployments", scale=True),
    Kind("StatefulSet", "apps", "v1", "statefulsets", scale=True),
    Kind("Lease", "coordination.k8s.io", "v1", "leases", needs_version=True),
    Kind("HorizontalPodAutoscaler", "autoscaling", "v1", "horizontalpodautoscalers"),
    Kind("CustomResourceDefinition", "apiextensions.k8s.io", "v1", "customresourcedefinitions", namespaced=False),
]


def validate(kind: Kind, obj: Json) -> None:
    spec = obj.get("spec") or {}
    problem = ""
    if kind.name in ("Deployment", "StatefulSet"):
        labels = ((spec.get("template") or {}).get("metadata") or {}).get("labels") or {}
        wanted = (spec.get("selector") or {}).get("matchLabels") or {}
        if not wanted or any(labels.get(key) != value for key, value in wanted.items()):
            problem = "spec.template.metadata.labels: Invalid value: `selector` does not match template `labels`"
        if spec.get("replicas", 1) < 0:
            problem = "spec.replicas: Invalid value: must be greater than or equal to 0"
    if kind.name == "Lease" and spec.get("leaseDurationSeconds", 1) <= 0:
        problem = "spec.leaseDurationSeconds: Invalid value: must be greater than 0"
    if problem:
        raise Refused(422, "Invalid", f"{kind.name} is invalid: {problem}")


def scale_of(kind: Kind, obj: Json) -> Json:
    meta = {key: obj["metadata"][key] for key in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")}
    if kind.custom:
        value: Any = obj
        for part in kind.selector_path.strip(".").split("."):
            value = (value or {}).get(part)
        selector = value
    else:
        selector = ",".join(f"{key}={value}" for key, value in sorted(obj["spec"]["selector"]["matchLabels"].items()))
    scale: Json = {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": meta}
    scale["spec"] = {"replicas": replicas(obj)} if replicas(obj) else {}
    scale["status"] = {
        "replicas": (obj.get("status") or {}).get("replicas", 0),
        **({"selector": selector} if selector else {}),
    }
    return scale


def replicas(obj: Json) -> int:
    return int((obj.get("spec") or {}).get("replicas") or 0)


def is_ready(pod: Json) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def selected(obj: Json, selector: str) -> bool:
    labels = obj["metadata"].get("labels") or {}
    pairs = (part.split("=", 1) for part in selector.replace("==", "=").split(",") if part)
    return all(labels.get(key) == value for key, value in pairs)


def merge(old: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict) or not isinstance(old, dict):
        return patch
    for key, value in patch.items():
        if value is None:
            old.pop(key, None)
        else:
            old[key] = merge(old.get(key, {}), value) if isinstance(value, dict) else value
    return old
