"""Who may come in, and as what: API keys and service classes."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from rl_autoscale.serving.gateway.completion import BadRequestError
from rl_autoscale.serving.gateway.config import GatewayConfig, read_secret


def bearer_token(headers: Mapping[str, str]) -> str:
    """The key in ``Authorization: Bearer ...``; empty without one."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def same_secret(given: str, digest: bytes) -> bool:
    """Compare a secret with the SHA-256 digest of the right one, in time that does not depend on where they differ."""
    return hmac.compare_digest(hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest(), digest)


@dataclass(frozen=True, slots=True)
class Client:
    """Who sent a request.

    Attributes:
        name: of the key; empty where no keys are asked for.
        service_class: what its requests are, or None.
    """

    name: str = ""
    service_class: str | None = None


class Guard:
    """Keys and classes of a gateway.

    Args:
        config: the gateway.

    Raises:
        SpecError: a secret cannot be read.
    """

    def __init__(self, config: GatewayConfig) -> None:
        self._keys = [
            (_digest(read_secret(item.key)), Client(item.name, item.service_class)) for item in config.api_keys
        ]
        self._header = config.class_header
        self._routes = config.class_routes
        self._default = config.default_class or config.fleet.class_names[0]
        self._index = {name: c for c, name in enumerate(config.fleet.class_names)}

    def client(self, headers: Mapping[str, str]) -> Client | None:
        """Who sends these headers; None for a stranger. Every key is compared, whichever fits."""
        if not self._keys:
            return Client()
        given = bearer_token(headers)
        found = None
        for digest, client in self._keys:
            if same_secret(given, digest):
                found = client
        return found

    def class_index(self, client: Client, headers: Mapping[str, str], prefix: str) -> int:
        """A request's class: its key's, else its route's, else its header's, else the default.

        Raises:
            BadRequestError: the header names no class.
        """
        name = client.service_class or self._routes.get(prefix)
        if name is None and self._header is not None:
            name = headers.get(self._header)
            if name is not None and name not in self._index:
                raise BadRequestError(f"{self._header}: unknown class; known: {', '.join(self._index)}")
        return self._index[name or self._default]


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
