"""The manifests parse, name only what exists, and say what our own configuration and commands understand."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from rl_autoscale.cli import root
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.serving.config import ControlConfig
from rl_autoscale.serving.gateway.config import GatewayConfig

Json = dict[str, Any]

GIVEN_SECRETS = {"rl-autoscale-control-key", "huggingface"}
"""Made by the operator; docs/backends.md says how."""


@pytest.fixture
def deploy(repository: Path) -> Path:
    return repository / "deploy"


def documents(path: Path) -> list[Json]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


@pytest.fixture
def base(deploy: Path) -> list[Json]:
    """Every object of the base, as its kustomization lists the files."""
    (kustomization,) = documents(deploy / "kubernetes" / "kustomization.yaml")
    return [obj for name in kustomization["resources"] for obj in documents(deploy / "kubernetes" / name)]


def named(objects: list[Json], kind: str, name: str) -> Json:
    (found,) = [obj for obj in objects if (obj["kind"], obj["metadata"]["name"]) == (kind, name)]
    return found


def pod_specs(objects: list[Json]) -> Iterator[tuple[str, Json]]:
    for obj in objects:
        if obj["kind"] == "Deployment":
            yield obj["metadata"]["name"], obj["spec"]["template"]["spec"]


def test_every_yaml_parses_and_every_named_file_exists(deploy: Path) -> None:
    files = sorted(deploy.rglob("*.yaml"))
    assert len(files) > 10
    for path in files:
        assert documents(path), path
    for path in deploy.rglob("kustomization.yaml"):
        (kustomization,) = documents(path)
        generated = [name for each in kustomization["configMapGenerator"] for name in each["files"]]
        patches = [patch["path"] for patch in kustomization.get("patches", ())]
        for name in (*kustomization["resources"], *(name.split("=")[-1] for name in generated), *patches):
            assert (path.parent / name).exists(), f"{path}: {name}"


def test_what_pods_refer_to_exists(deploy: Path, base: list[Json]) -> None:
    (kustomization,) = documents(deploy / "kubernetes" / "kustomization.yaml")
    config_maps = {each["name"] for each in kustomization["configMapGenerator"]}
    accounts = {obj["metadata"]["name"] for obj in base if obj["kind"] == "ServiceAccount"}
    used: set[str] = set()
    for name, spec in pod_specs(base):
        volumes = {volume["name"] for volume in spec["volumes"]}
        for volume in spec["volumes"]:
            if "configMap" in volume:
                used.add(volume["configMap"]["name"])
        assert spec.get("serviceAccountName") in {None, *accounts}
        assert "serviceAccountName" in spec or spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
            ports = {port["name"] for port in container.get("ports", ())}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                action = container.get(probe, {})
                port = (action.get("httpGet") or action.get("tcpSocket") or {}).get("port")
                assert port is None or port in ports
            for variable in container.get("env", ()):
                assert variable["valueFrom"]["secretKeyRef"]["name"] in GIVEN_SECRETS
    assert used == config_maps


def test_selectors_choose_the_pods_they_mean(base: list[Json]) -> None:
    labels = [obj["spec"]["template"]["metadata"]["labels"] for obj in base if obj["kind"] == "Deployment"]
    for obj in base:
        spec = obj.get("spec") or {}
        if obj["kind"] == "Service":
            assert spec["selector"] in labels
        if obj["kind"] in ("NetworkPolicy", "PodDisruptionBudget", "Deployment"):
            assert (spec.get("podSelector") or spec["selector"])["matchLabels"] in labels


def test_every_pods_ports_are_behind_a_policy_that_names_them(deploy: Path, base: list[Json]) -> None:
    policies = [obj["spec"] for obj in base if obj["kind"] == "NetworkPolicy"]
    for obj in base:
        if obj["kind"] != "Deployment":
            continue
        template = obj["spec"]["template"]
        guarding = [spec for spec in policies if spec["podSelector"]["matchLabels"] == template["metadata"]["labels"]]
        allowed = {port["port"] for spec in guarding for rule in spec["ingress"] for port in rule["ports"]}
        listening = {port["containerPort"] for item in template["spec"]["containers"] for port in item["ports"]}
        assert listening == allowed, obj["metadata"]["name"]
    (config,) = documents(deploy / "keda" / "controller.yaml")
    (policy,) = documents(deploy / "keda" / "network-policy.yaml")
    (port,) = policy["spec"]["ingress"][0]["ports"]
    assert config["backends"]["chat"]["keda"]["address"].endswith(f":{port['port']}")


def test_the_role_is_bound_to_the_controllers_account(base: list[Json]) -> None:
    binding = named(base, "RoleBinding", "rl-autoscale-controller")
    named(base, "Role", binding["roleRef"]["name"])
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "rl-autoscale-controller"}]
    (controller,) = [spec for name, spec in pod_specs(base) if name == "rl-autoscale-controller"]
    assert controller["serviceAccountName"] == "rl-autoscale-controller"


def test_the_pools_manifest_does_not_own_replicas(base: list[Json]) -> None:
    assert "replicas" not in named(base, "Deployment", "vllm")["spec"]


def test_grace_is_longer_than_the_drain(deploy: Path, base: list[Json]) -> None:
    vllm = named(base, "Deployment", "vllm")["spec"]["template"]["spec"]
    script = (deploy / "kubernetes" / "drain.py").read_text(encoding="utf-8")
    assert '"DRAIN_LONGEST_S", "300"' in script
    assert vllm["terminationGracePeriodSeconds"] > 300
    gateway = named(base, "Deployment", "rl-autoscale-gateway")["spec"]["template"]["spec"]
    (config,) = documents(deploy / "kubernetes" / "config" / "gateway.yaml")
    assert gateway["terminationGracePeriodSeconds"] > config["limits"]["drain_s"]


def test_our_own_pods_run_without_privileges(base: list[Json]) -> None:
    for name, spec in pod_specs(base):
        if name.startswith("rl-autoscale"):
            assert spec["securityContext"]["runAsNonRoot"] is True
            for container in spec["containers"]:
                security = container["securityContext"]
                assert security["allowPrivilegeEscalation"] is False
                assert security["readOnlyRootFilesystem"] is True
                assert security["capabilities"] == {"drop": ["ALL"]}


def test_the_fleet_is_one(deploy: Path) -> None:
    spec = FleetSpec.from_yaml(deploy / "kubernetes" / "config" / "fleet.yaml")
    assert spec.pool_names == ("chat",)


@pytest.mark.parametrize("overlay", ["kubernetes/config", "keda", "prometheus"])
def test_the_controllers_configuration_is_what_it_reads(
    deploy: Path, base: list[Json], overlay: str, tmp_path: Path
) -> None:
    for source in (deploy / "kubernetes" / "config" / "fleet.yaml", deploy / overlay / "controller.yaml"):
        shutil.copy(source, tmp_path)  # side by side, as the ConfigMap mounts them
    config = ControlConfig.from_file(tmp_path / "controller.yaml")
    assert config.mode == "shadow"
    choice = config.backends["chat"]
    others = choice.keda or choice.prometheus
    target = others.observe if others else choice.kubernetes
    assert target is not None
    assert getattr(choice, overlay.partition("/")[0]) is not None
    (kustomization,) = documents(deploy / "kubernetes" / "kustomization.yaml")
    assert target.namespace == kustomization["namespace"]
    pods = named(base, target.kind, target.name)["spec"]["template"]["spec"]
    (port,) = pods["containers"][0]["ports"]
    assert port["containerPort"] == target.port
    assert config.gateway is not None
    service = named(base, "Service", "rl-autoscale-gateway")
    control = next(port for port in service["spec"]["ports"] if port["name"] == "control")
    assert config.gateway.url == f"http://{service['metadata']['name']}:{control['port']}"


@pytest.mark.parametrize(("pod", "command"), [("controller", "control"), ("gateway", "gateway")])
def test_pods_start_commands_that_exist(deploy: Path, base: list[Json], pod: str, command: str) -> None:
    (spec,) = [spec for name, spec in pod_specs(base) if name == f"rl-autoscale-{pod}"]
    (container,) = spec["containers"]
    name, *arguments = container["args"]
    assert name == command
    assert arguments[-1] == f"{container['volumeMounts'][0]['mountPath']}/{pod}.yaml"
    group = get_command(root.app)
    _, parser, rest = group.resolve_command(group.make_context("rl-autoscale", [name]), [name, *arguments])
    parser.make_context(name, rest)  # refuses options that it does not know


def test_the_gateways_configuration_is_what_it_reads(deploy: Path, base: list[Json]) -> None:
    config = GatewayConfig.from_file(deploy / "kubernetes" / "config" / "gateway.yaml")
    gateway = named(base, "Deployment", "rl-autoscale-gateway")["spec"]["template"]["spec"]["containers"][0]
    assert {port["name"]: port["containerPort"] for port in gateway["ports"]} == {
        "http": config.port,
        "control": config.control_port,
    }
    assert config.control_key in {f"env:{variable['name']}" for variable in gateway["env"]}


def test_one_owner_of_replicas(deploy: Path) -> None:
    """Where KEDA or an HPA owns the target, the controller may not write it."""
    for overlay in ("keda", "prometheus"):
        (patch,) = documents(deploy / overlay / "role-patch.yaml")
        verbs = {verb for rule in patch[0]["value"] for verb in rule["verbs"]}
        assert verbs == {"get", "list"}


def test_the_hpa_follows_the_gauge(deploy: Path, base: list[Json]) -> None:
    gauge = pytest.importorskip("rl_autoscale.serving.backends.prometheus", exc_type=ImportError).DESIRED
    (hpa,) = documents(deploy / "prometheus" / "hpa.yaml")
    reference = hpa["spec"]["scaleTargetRef"]
    named(base, reference["kind"], reference["name"])
    (metric,) = hpa["spec"]["metrics"]
    assert metric["external"]["metric"] == {"name": gauge, "selector": {"matchLabels": {"pool": "chat"}}}
    assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "1"}
    (rules,) = documents(deploy / "prometheus" / "adapter-rules.yaml")
    assert rules["externalRules"][0]["seriesQuery"].startswith(gauge + "{")


def test_keda_asks_the_controller_for_a_pool_that_exists(deploy: Path, base: list[Json]) -> None:
    scaled, service = documents(deploy / "keda" / "scaledobject.yaml")
    named(base, "Deployment", scaled["spec"]["scaleTargetRef"]["name"])
    assert scaled["spec"]["minReplicaCount"] >= 1
    (trigger,) = scaled["spec"]["triggers"]
    host, port = trigger["metadata"]["scalerAddress"].split(":")
    (kustomization,) = documents(deploy / "keda" / "kustomization.yaml")
    assert host == f"{service['metadata']['name']}.{kustomization['namespace']}"
    assert int(port) == service["spec"]["ports"][0]["port"]
    (config,) = documents(deploy / "keda" / "controller.yaml")
    assert config["backends"][trigger["metadata"]["pool"]]["keda"]["address"] == f"0.0.0.0:{port}"


def test_the_policy_inside_serve_is_ours(deploy: Path) -> None:
    from rl_autoscale.serving.backends import rayserve_policy

    (config,) = documents(deploy / "rayserve" / "policy-inside.yaml")
    policy = config["applications"][0]["deployments"][0]["autoscaling_config"]["policy"]
    module, _, name = policy["policy_function"].partition(":")
    assert (module, name) == (rayserve_policy.__name__, rayserve_policy.FleetPolicy.__name__)
    (external,) = documents(deploy / "rayserve" / "external-scaler.yaml")
    assert external["applications"][0]["external_scaler_enabled"] is True
    assert "autoscaling_config" not in external["applications"][0]["deployments"][0]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, for its kustomize")
@pytest.mark.parametrize("overlay", ["kubernetes", "keda", "prometheus"])
def test_kustomize_builds_it(deploy: Path, overlay: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(deploy / overlay)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    objects = [obj for obj in yaml.safe_load_all(done.stdout) if obj]
    assert all(obj["metadata"].get("namespace") == "llm" for obj in objects if obj["kind"] != "Namespace")
    maps = [obj for obj in objects if obj["kind"] == "ConfigMap"]
    (controller,) = [obj for obj in maps if obj["metadata"]["name"].startswith("rl-autoscale-controller-")]
    assert set(controller["data"]) == {"fleet.yaml", "controller.yaml"}
    backend = yaml.safe_load(controller["data"]["controller.yaml"])["backends"]["chat"]
    assert set(backend) == {overlay}
    verbs = {verb for rule in named(objects, "Role", "rl-autoscale-controller")["rules"] for verb in rule["verbs"]}
    assert ("update" in verbs) == (overlay == "kubernetes")
