"""What a user writes to run a gateway (YAML)."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rl_autoscale.fleet.config import Config, read_yaml
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.serving.gateway_api import ReplicaAddress


def _names_a_place(value: str) -> str:
    if not value.startswith(("env:", "file:")):
        raise ValueError("a secret is named, not written: give env:VARIABLE or file:PATH")
    return value


Secret = Annotated[str, AfterValidator(_names_a_place)]


def read_secret(place: str) -> str:
    """Read a secret from ``env:VARIABLE`` or ``file:PATH``.

    Raises:
        SpecError: there is none, or it is shorter than 16 characters.
    """
    kind, _, name = place.partition(":")
    try:
        value = (os.environ[name] if kind == "env" else Path(name).read_text(encoding="utf-8")).strip()
    except (KeyError, OSError) as error:
        raise SpecError(f"no secret at {place} ({type(error).__name__})") from None
    if len(value) < 16:
        raise SpecError(f"the secret at {place} has {len(value)} characters; use at least 16")
    return value


def read_with_fleet(path: Path) -> Any:
    """Parse a YAML file whose ``fleet`` may name another YAML that has a fleet, a scenario for example.

    Raises:
        SpecError: one of them is missing or not YAML.
    """
    data = read_yaml(path)
    if isinstance(data, dict) and isinstance(data.get("fleet"), str):
        found = read_yaml(path.parent / data["fleet"])
        inner = found.get("fleet", found) if isinstance(found, dict) else found
        data = {**data, "fleet": inner}
    return data


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on that host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ApiKey(Config):
    """One client's key."""

    name: str = Field(min_length=1, description="for logs; the key itself is never logged")
    key: Secret
    service_class: str | None = Field(default=None, description="its requests are of this class, whatever they say")


class Tls(Config):
    """Certificate and key of the public listener, PEM."""

    certificate: Path
    private_key: Path


class Limits(Config):
    """What one client or one replica may cost."""

    body_bytes: PositiveInt = 4 << 20
    body_s: PositiveFloat = Field(default=30.0, description="for a client to send its body")
    header_bytes: PositiveInt = Field(default=8190, description="of one header line")
    idle_connection_s: PositiveFloat = Field(default=75.0, description="without a complete request; slow headers too")
    client_stall_s: PositiveFloat = Field(default=60.0, description="of a client that does not read its stream")
    replica_connect_s: PositiveFloat = 2.0
    replica_silence_s: PositiveFloat = Field(
        default=120.0, description="of a stream; counts before its first token too"
    )
    answer_s: PositiveFloat = Field(default=1800.0, description="for an answer in one piece")
    tries: PositiveInt = Field(default=3, description="replicas that a request is sent to before it counts as failed")
    evictions: NonNegativeInt = Field(
        default=3, description="times that a batch request gives its place to an interactive one; fleet.evict_batch too"
    )
    drain_s: NonNegativeFloat = Field(default=60.0, description="for streams to end after SIGTERM")


class GatewayConfig(Config):
    """A gateway."""

    fleet: FleetSpec
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    tls: Tls | None = None
    api_keys: tuple[ApiKey, ...] = Field(default=(), description="empty: anyone who can connect is served")
    class_header: str | None = Field(default="x-service-class", description="header that names a request's class")
    class_routes: dict[str, str] = Field(
        default_factory=dict, description="path prefix -> class: /batch serves /batch/v1"
    )
    default_class: str | None = Field(default=None, description="default: the fleet's first")
    priority: Literal["class", "client"] = Field(
        default="class", description="whose priority engines with the priority scheduler get"
    )
    control_host: str = "127.0.0.1"
    control_port: int = Field(default=8081, ge=0, le=65535)
    control_key: Secret | None = None
    replica_key: Secret | None = Field(default=None, description="sent to replicas as their API key")
    replicas: tuple[ReplicaAddress, ...] = Field(default=(), description="those known before a controller says more")
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _check(self) -> GatewayConfig:
        if self.control_key is None and not is_loopback(self.control_host):
            raise ValueError(
                f"control_host={self.control_host} is reachable from outside and has no control_key; "
                "give one, or listen on 127.0.0.1"
            )
        named = {"default_class": self.default_class} | {f"api_keys.{k.name}": k.service_class for k in self.api_keys}
        for where, name in (named | {f"class_routes.{p}": c for p, c in self.class_routes.items()}).items():
            if name is not None and name not in self.fleet.class_names:
                raise ValueError(f"{where}={name} is no class of the fleet; known: {', '.join(self.fleet.class_names)}")
        for prefix in self.class_routes:
            if not prefix.startswith("/") or prefix.endswith("/"):
                raise ValueError(f"class_routes: '{prefix}' must begin with / and not end with it")
        return self

    @classmethod
    def from_file(cls, path: Path) -> GatewayConfig:
        """Read a gateway's YAML; ``fleet`` may name another YAML that has a fleet, a scenario for example.

        Raises:
            SpecError: missing, not YAML or not valid.
        """
        return cls.from_dict(read_with_fleet(path), where=str(path))
