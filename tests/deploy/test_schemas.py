"""Every manifest against Kubernetes' own schema, offline: the models of the official Python client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

models = pytest.importorskip("kubernetes.client.models", reason="needs the serve extra")

NOT_KUBERNETES = {"Kustomization", "ScaledObject"}
"""Kinds of tools, whose schemas the client does not have."""


def refused(obj: dict[str, Any]) -> list[str]:
    """What the API server would refuse: unknown fields, wrong types, missing and impossible values."""
    version = obj["apiVersion"].rpartition("/")[2]
    model = getattr(models, version[0].upper() + version[1:] + obj["kind"])
    if not hasattr(model, "model_validate"):
        pytest.skip("models of this client check nothing; needs kubernetes 37")
    try:
        model.model_validate(_with_text_quantities(obj))
    except ValidationError as error:
        return [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    return []


def _with_text_quantities(value: Any, key: str = "") -> Any:
    """The client knows quantities as text only; the server takes numbers too."""
    if isinstance(value, dict):
        if key in ("limits", "requests"):
            return {name: str(quantity) for name, quantity in value.items()}
        return {name: _with_text_quantities(item, name) for name, item in value.items()}
    return [_with_text_quantities(item) for item in value] if isinstance(value, list) else value


def objects(repository: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every Kubernetes object under deploy/, with where it is."""
    files = sorted((repository / "deploy").rglob("*.yaml"))
    loaded = [(path, document) for path in files for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    return [
        (f"{path.name}: {document['kind']}", document)
        for path, document in loaded
        if isinstance(document, dict) and "kind" in document and document["kind"] not in NOT_KUBERNETES
    ]


def test_every_object_is_what_the_api_server_takes(repository: Path) -> None:
    found = objects(repository)
    assert len(found) >= 13
    assert {where: refused(obj) for where, obj in found if refused(obj)} == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda container: container.update(readinessProbes=[]), "readinessProbes: Extra inputs"),
        (lambda container: container["ports"][0].update(containerPort="http"), "containerPort: Input should be"),
        (lambda container: container["ports"][0].pop("containerPort"), "containerPort: Field required"),
        (lambda container: container.update(args="serve"), "args: Input should be a valid list"),
    ],
    ids=["unknown", "wrong type", "missing", "no list"],
)
def test_what_it_would_refuse_is_found(repository: Path, change, message: str) -> None:
    (deployment,) = [obj for where, obj in objects(repository) if where == "vllm.yaml: Deployment"]
    change(deployment["spec"]["template"]["spec"]["containers"][0])
    assert message in " ".join(refused(deployment))
