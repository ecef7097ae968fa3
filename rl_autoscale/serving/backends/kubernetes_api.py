"""The few calls we make to a Kubernetes API server, each bounded in time, each failing only with `BackendError`.

The client library does the talking. Three of its habits are turned off here: urllib3's own retries, which sleep for as
long as a ``Retry-After`` says; typed models, which refuse objects of newer servers; and waiting without limit.

One object serves one thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_autoscale.fleet.errors import MissingExtraError
from rl_autoscale.serving.backends.http_failure import HttpFailure, date_s, retry_after_s
from rl_autoscale.serving.protocols import BackendError, Clock

try:
    import urllib3
    from kubernetes import client as kube
    from kubernetes import config as kube_config
except ImportError:  # pragma: no cover - depends on what is installed
    raise MissingExtraError("the kubernetes back end", "serve") from None

Json = dict[str, Any]

PAGE_SIZE = 500
"""Objects per page of a list, the size kubectl uses."""

LONGEST_RETRY_AFTER_S = 60.0
"""A server that asks for more is asked again after this long: a header must not switch a controller off."""


@dataclass(frozen=True, slots=True)
class ResourceType:
    """A kind of object as it stands in a URL; the core group is empty."""

    group: str
    version: str
    plural: str


LEASES = ResourceType("coordination.k8s.io", "v1", "leases")
AUTOSCALERS = ResourceType("autoscaling", "v1", "horizontalpodautoscalers")
SCALED_OBJECTS = ResourceType("keda.sh", "v1alpha1", "scaledobjects")


@dataclass(frozen=True, slots=True)
class Listing:
    """All pages of a list, and the server's clock when it answered (None without a ``Date`` header)."""

    items: tuple[Json, ...]
    server_wall_s: float | None


def connect(kubeconfig: Path | None = None, context: str | None = None) -> kube.ApiClient:
    """Connect as the pod's service account, or as a kubeconfig file says.

    Args:
        kubeconfig: a kubeconfig file; None for the service account of the pod this runs in.
        context: a context of that file; None for its current one.

    Raises:
        BackendError: there is no service account, or the file cannot be used; not retryable.
    """
    settings = kube.Configuration()
    load: Any = kube_config  # its functions carry no types
    try:
        if kubeconfig is None:
            load.load_incluster_config(client_configuration=settings)
        else:
            load.load_kube_config(str(kubeconfig), context=context, client_configuration=settings)
    except (kube_config.ConfigException, OSError) as error:
        hint = "" if kubeconfig else "; outside a cluster set 'kubeconfig'"
        raise BackendError(f"no way into a Kubernetes cluster: {error}{hint}", retryable=False) from None
    settings.retries = False
    return kube.ApiClient(settings)


class KubernetesApi:
    """Reads and writes objects of one namespace.

    Args:
        client: a connected client; `close` closes it.
        namespace: where all objects live.
        clock: measures time-outs.
        timeout_s: longest a single request may take.
        call_timeout_s: longest everything inside one `call` may take.
    """

    def __init__(
        self, client: kube.ApiClient, namespace: str, clock: Clock, *, timeout_s: float, call_timeout_s: float
    ) -> None:
        self.namespace = namespace
        self._client: Any = client
        self._objects = kube.CustomObjectsApi(client)
        self._core: Any = kube.CoreV1Api(client)
        self._clock = clock
        self._timeout_s = timeout_s
        self._call_timeout_s = call_timeout_s
        self._deadline_s = float("inf")
        self._silent_until_s = float("-inf")

    @contextmanager
    def call(self) -> Iterator[None]:
        """Bound all requests made inside by ``call_timeout_s`` together."""
        self._deadline_s = self._clock.monotonic_s() + self._call_timeout_s
        try:
            yield
        finally:
            self._deadline_s = float("inf")

    def read_scale(self, kind: ResourceType, name: str) -> Json:
        """The scale subresource of any kind that has one, built-in or custom."""
        return self._object("read the scale of", kind, name, self._objects.get_namespaced_custom_object_scale, name)

    def replace_scale(self, kind: ResourceType, name: str, scale: Json, *, dry_run: bool = False) -> Json:
        """Write a scale; 409 when ``metadata.resourceVersion`` is no longer the newest."""
        options = {"dry_run": "All"} if dry_run else {}
        replace = self._objects.replace_namespaced_custom_object_scale
        return self._object("scale", kind, name, replace, name, scale, **options)

    def read(self, kind: ResourceType, name: str) -> Json:
        """One object; 404 when there is none."""
        return self._object("read", kind, name, self._objects.get_namespaced_custom_object, name)

    def create(self, kind: ResourceType, body: Json) -> Json:
        """Create an object; 409 when it exists."""
        name = body["metadata"]["name"]
        return self._object("create", kind, name, self._objects.create_namespaced_custom_object, body)

    def replace(self, kind: ResourceType, name: str, body: Json) -> Json:
        """Write an object; 409 when ``metadata.resourceVersion`` is no longer the newest."""
        return self._object("write", kind, name, self._objects.replace_namespaced_custom_object, name, body)

    def list_pods(self, selector: str) -> Listing:
        """All pods that carry the labels; begins anew when a page expires under its hands (410)."""
        try:
            return self._list_pods(selector)
        except HttpFailure as failure:
            if failure.status != 410:
                raise
            return self._list_pods(selector)

    def list_all(self, kind: ResourceType) -> tuple[Json, ...]:
        """All objects of a kind; 404 when the cluster does not know the kind."""
        items: list[Json] = []
        token = ""
        while True:
            options: dict[str, Any] = {"limit": PAGE_SIZE, **({"_continue": token} if token else {})}
            page = self._object("list", kind, "", self._objects.list_namespaced_custom_object, **options)
            items += page.get("items") or []
            token = (page.get("metadata") or {}).get("continue") or ""
            if not token:
                return tuple(items)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _list_pods(self, selector: str) -> Listing:
        items: list[Json] = []
        token, server_wall_s = "", None
        while True:
            options: dict[str, Any] = {"limit": PAGE_SIZE, **({"_continue": token} if token else {})}
            with self._failures("list pods"):
                response = self._core.list_namespaced_pod(
                    self.namespace,
                    label_selector=selector,
                    _preload_content=False,
                    _request_timeout=self._time_left_s("list pods"),
                    **options,
                )
                page = json.loads(response.data)
            items += page.get("items") or []
            server_wall_s = date_s(response.headers.get("Date"))
            token = page["metadata"].get("continue") or ""
            if not token:
                return Listing(tuple(items), server_wall_s)

    def _object(self, verb: str, kind: ResourceType, name: str, request: Any, *arguments: Any, **options: Any) -> Json:
        what = f"{verb} {kind.plural}{'/' + name if name else ''}"
        with self._failures(what):
            answer: Json = request(
                kind.group,
                kind.version,
                self.namespace,
                kind.plural,
                *arguments,
                _request_timeout=self._time_left_s(what),
                **options,
            )
        return answer

    def _time_left_s(self, what: str) -> float:
        now_s = self._clock.monotonic_s()
        if now_s < self._silent_until_s:
            wait_s = self._silent_until_s - now_s
            raise BackendError(f"cannot {what}: the API server asked us to wait {wait_s:.1f} s more", retryable=True)
        if now_s >= self._deadline_s:
            raise BackendError(f"cannot {what}: {self._call_timeout_s:g} s for the whole call are over", retryable=True)
        return min(self._timeout_s, self._deadline_s - now_s)

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        where = f"in namespace {self.namespace}"
        try:
            yield
        except kube.ApiException as error:
            wait_s = retry_after_s(error.headers)
            if error.status in (429, 503) and wait_s is not None:
                self._silent_until_s = self._clock.monotonic_s() + min(wait_s, LONGEST_RETRY_AFTER_S)
            message = f"cannot {what} {where}: {error.status} {_message(error)}"
            raise HttpFailure(message, status=error.status or None, retry_after_s=wait_s) from None
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            message = f"cannot {what} {where}: {type(error).__name__}: {error}"
            raise HttpFailure(message, status=None) from None


def _message(error: kube.ApiException) -> str:
    """What the server said, in its own words: the message of its Status object, else the HTTP reason."""
    try:
        return str(json.loads(str(error.body))["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
