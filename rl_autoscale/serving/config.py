"""What ``rl-autoscale control --config FILE`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rl_autoscale.fleet.config import Config, read_yaml
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import FleetSpec, ShieldSpec
from rl_autoscale.serving.backends.kubernetes import KubernetesConfig
from rl_autoscale.serving.backends.local import LocalConfig
from rl_autoscale.serving.backends.rayserve import RayServeConfig
from rl_autoscale.serving.gateway.config import Secret, read_with_fleet
from rl_autoscale.serving.metric_names import engine_names
from rl_autoscale.serving.modes import Mode, parse_mode
from rl_autoscale.serving.safety import SafetyConfig

_NAMED = ("local", "kubernetes", "rayserve", "keda", "prometheus")


class PolicyChoice(Config):
    """Who decides."""

    name: str = Field(
        default="headroom", description="a registered policy, pretrained/NAME, or an exported policy's folder"
    )
    knobs: dict[str, float | str | dict[str, float] | None] = Field(
        default_factory=dict, description="its keyword arguments; some take a value by class or pool"
    )

    @property
    def given(self) -> dict[str, Any]:
        """The knobs that have a value; the others are the policy's to choose."""
        return {name: value for name, value in self.knobs.items() if value is not None}


class TelemetryConfig(Config):
    """Where replica metrics come from, and when they are too old."""

    engine: str = Field(default="vllm", description="vllm, sglang or tensorrt-llm")
    prometheus_url: str | None = Field(default=None, description="ask this server; default each replica directly")
    selector: str = Field(default="", description='label matchers for Prometheus, for example job="vllm"')
    replica_label: str = Field(default="instance", description="instance (host:port) or a label with the replica's id")
    timeout_s: PositiveFloat = Field(default=2.0, description="for all scrapes of one look")
    stale_after_s: PositiveFloat = Field(default=30.0, description="older readings count as missing")
    min_coverage: float = Field(default=0.5, gt=0, le=1, description="share of a pool's replicas that must speak")

    @model_validator(mode="after")
    def _check(self) -> TelemetryConfig:
        try:
            engine_names(self.engine)
        except KeyError as error:
            raise ValueError(str(error)) from None
        return self


class GatewayConfig(Config):
    """The gateway in front of the replicas; without one the controller scales only."""

    url: str = Field(pattern="^https?://", description="of its control routes")
    key: Secret | None = Field(default=None, description="its control key: env:VARIABLE or file:PATH")
    timeout_s: PositiveFloat = 2.0
    publish_replicas: bool = Field(default=True, description="tell it where replicas are, in every mode")


class KedaChoice(Config):
    """KEDA asks us for the figure and owns the target."""

    observe: KubernetesConfig
    address: str = Field(description="host:port of the external scaler; the same for all pools that have one")


class PrometheusChoice(Config):
    """An existing HPA follows our figure, a metric of this controller, and owns the target."""

    observe: KubernetesConfig


class BackendChoice(Config):
    """Who starts and stops the replicas of one pool; exactly one (docs/backends.md)."""

    local: LocalConfig | None = None
    kubernetes: KubernetesConfig | None = None
    rayserve: RayServeConfig | None = None
    keda: KedaChoice | None = None
    prometheus: PrometheusChoice | None = None

    @model_validator(mode="after")
    def _check(self) -> BackendChoice:
        given = [name for name in _NAMED if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"name exactly one of {', '.join(_NAMED)}; got {', '.join(given) or 'none'}")
        return self

    @property
    def observed(self) -> KubernetesConfig | None:
        """Where a pool lives whose target somebody else writes; None when we write it."""
        handed_over = self.keda or self.prometheus
        return handed_over.observe if handed_over is not None else None


class StatusConfig(Config):
    """The controller's own pages."""

    host: str = Field(default="127.0.0.1", description="0.0.0.0 inside a cluster, behind a NetworkPolicy")
    port: int = Field(default=9400, ge=0, le=65535, description="/ page, /metrics, /healthz, POST /pause, POST /resume")
    history: PositiveInt = Field(default=720, description="steps the page shows")


class ControlConfig(Config):
    """Everything a live controller needs."""

    fleet: FleetSpec
    backends: dict[str, BackendChoice] = Field(description="pool name -> who runs it")
    mode: Mode = "shadow"
    policy: PolicyChoice = PolicyChoice()
    fallback: PolicyChoice = Field(
        default=PolicyChoice(name="headroom", knobs={"headroom": 1.5}),
        description="the rule in the policy's place; refuses early as the policy does, unless its knobs name admission",
    )
    shield: ShieldSpec = ShieldSpec()
    safety: SafetyConfig = SafetyConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    gateway: GatewayConfig | None = None
    status: StatusConfig | None = StatusConfig()
    decision_log: Path | None = Path("decisions.jsonl")
    kill_file: Path | None = Field(default=None, description="while this file exists, the controller is paused")

    @model_validator(mode="after")
    def _check(self) -> ControlConfig:
        differing = sorted(set(self.backends) ^ set(self.fleet.pool_names))
        if differing:
            raise ValueError(f"backends and fleet.pools must name the same pools; differing: {', '.join(differing)}")
        if self.gateway is None and len(self.fleet.classes) > 1:
            raise ValueError("several classes need a gateway: engines do not know classes")
        if self.telemetry.stale_after_s <= self.fleet.control_interval_s:
            raise ValueError(
                f"telemetry.stale_after_s={self.telemetry.stale_after_s:g} must exceed the control interval "
                f"of {self.fleet.control_interval_s:g} s: one late scrape is no outage"
            )
        addresses = {choice.keda.address for choice in self.backends.values() if choice.keda is not None}
        if len(addresses) > 1:
            raise ValueError(f"one external scaler serves all pools; got addresses {', '.join(sorted(addresses))}")
        folders = [choice.local.state_dir for choice in self.backends.values() if choice.local is not None]
        if len(folders) != len(set(folders)):
            raise ValueError("every local pool needs a state_dir of its own")
        return self

    @classmethod
    def from_file(cls, path: Path) -> ControlConfig:
        """Read a controller's YAML; ``fleet`` may name another file. Raises SpecError."""
        return cls.from_dict(read_with_fleet(path), where=str(path))


def read_choice(path: Path) -> PolicyChoice:
    """Only the policy of a configuration file, its knobs included; raises SpecError, also where it names none."""
    data: Any = read_yaml(path)
    if not isinstance(data, dict) or "policy" not in data:
        raise SpecError(f"{path}: the key 'policy' is missing; write it as it was when the controller started")
    return PolicyChoice.from_dict(data["policy"], where=f"{path}: policy")


def read_mode(path: Path) -> Mode | None:
    """Only the mode of a configuration file, None where it says none; raises SpecError."""
    data: Any = read_yaml(path)
    written = data.get("mode") if isinstance(data, dict) else None
    return None if written is None else parse_mode(str(written), str(path))
