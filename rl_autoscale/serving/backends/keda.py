"""KEDA: an external scaler over gRPC that says how many replicas each pool should have.

KEDA polls it and feeds a HorizontalPodAutoscaler with target 1 per replica, so that the figure *is* the replica count.
The interface is that of KEDA's documentation, "External scalers" (``externalscaler.proto``, KEDA 2); its descriptor is
built below, so no generated code is needed.

A stale figure is answered with UNAVAILABLE, on which the HPA keeps its replicas. Activity never turns false by silence
either: KEDA reads an error there as "not active" in some versions, and that would scale to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

from rl_autoscale.fleet.errors import MissingExtraError, did_you_mean
from rl_autoscale.serving.backends.desired import Desired, DesiredReplicas

try:
    import grpc
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
except ImportError:  # pragma: no cover - depends on what is installed
    raise MissingExtraError("the KEDA back end", "serve") from None

METRIC_NAME = "desired_replicas"
SERVICE = "externalscaler.ExternalScaler"
STREAM_POLL_S = 1.0
"""How often an idle stream looks whether its client is still there."""

_Field = descriptor_pb2.FieldDescriptorProto
_MESSAGES: dict[str, list[tuple[str, int, Any]]] = {
    "ScaledObjectRef": [("name", 1, _Field.TYPE_STRING), ("namespace", 2, _Field.TYPE_STRING)],
    "IsActiveResponse": [("result", 1, _Field.TYPE_BOOL)],
    "MetricSpec": [
        ("metricName", 1, _Field.TYPE_STRING),
        ("targetSize", 2, _Field.TYPE_INT64),
        ("targetSizeFloat", 3, _Field.TYPE_DOUBLE),
    ],
    "GetMetricSpecResponse": [("metricSpecs", 1, "repeated MetricSpec")],
    "GetMetricsRequest": [("scaledObjectRef", 1, "ScaledObjectRef"), ("metricName", 2, _Field.TYPE_STRING)],
    "MetricValue": [
        ("metricName", 1, _Field.TYPE_STRING),
        ("metricValue", 2, _Field.TYPE_INT64),
        ("metricValueFloat", 3, _Field.TYPE_DOUBLE),
    ],
    "GetMetricsResponse": [("metricValues", 1, "repeated MetricValue")],
}
"""Message -> (field, number, type), as the interface numbers them."""


def _build_messages() -> dict[str, Any]:
    """Message classes by name, from a descriptor pool of our own (KEDA's package name may be taken in the default)."""
    file = descriptor_pb2.FileDescriptorProto(name="externalscaler.proto", package="externalscaler", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            _add_field(message, field_name, number, kind)
        if name == "ScaledObjectRef":
            entry = message.nested_type.add(name="ScalerMetadataEntry")
            entry.options.map_entry = True
            _add_field(entry, "key", 1, _Field.TYPE_STRING)
            _add_field(entry, "value", 2, _Field.TYPE_STRING)
            _add_field(message, "scalerMetadata", 3, "repeated ScaledObjectRef.ScalerMetadataEntry")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"externalscaler.{name}"))
        for name in _MESSAGES
    }


def _add_field(message: Any, name: str, number: int, kind: Any) -> None:
    """Add a field; a kind in words is a message's name, "repeated" before it for a list."""
    field = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if not isinstance(kind, str):
        field.type = kind
        return
    *repeated, type_name = kind.split()
    field.type, field.type_name = _Field.TYPE_MESSAGE, f".externalscaler.{type_name}"
    if repeated:
        field.label = _Field.LABEL_REPEATED


MESSAGES: dict[str, Any] = _build_messages()
"""The interface's message classes, by name."""


class KedaScaler:
    """The gRPC server; one for all pools.

    A ScaledObject names its pool in its trigger's metadata (``pool: chat``); with a single pool it need not.

    Args:
        pools: the published figures by pool name.
    """

    def __init__(self, pools: Mapping[str, DesiredReplicas]) -> None:
        self._pools = dict(pools)
        self._server: Any = None

    def start(self, address: str, *, credentials: Any = None) -> int:
        """Serve in threads of its own.

        Args:
            address: ``host:port``; port 0 takes a free one.
            credentials: `grpc.ServerCredentials` for TLS; None for plain text.

        Returns:
            The port.
        """
        # Every open StreamIsActive holds a thread, and a client that reconnects holds two for a while.
        threads = futures.ThreadPoolExecutor(8 + 4 * len(self._pools), "keda")
        self._server = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self._handlers()),))
        port: int = (
            self._server.add_secure_port(address, credentials)
            if credentials
            else self._server.add_insecure_port(address)
        )
        self._server.start()
        return port

    def stop(self, grace_s: float = 1.0) -> None:
        """Stop serving; open calls get ``grace_s`` to end."""
        if self._server is not None:
            self._server.stop(grace_s).wait()

    def is_active(self, request: Any, context: Any) -> Any:
        """Whether the pool may have replicas at all; false only when zero was asked for."""
        return MESSAGES["IsActiveResponse"](result=_active(self._pool(request, context).read()))

    def stream_is_active(self, request: Any, context: Any) -> Iterator[Any]:
        """Activity now, and again whenever it changes, until the client goes away."""
        pool = self._pool(request, context)
        desired, told = pool.read(), None
        while context.is_active():
            if (active := _active(desired)) != told:
                told = active
                yield MESSAGES["IsActiveResponse"](result=active)
            desired = pool.wait_for_change(desired.serial, STREAM_POLL_S)

    def get_metric_spec(self, request: Any, context: Any) -> Any:
        """One metric, of which every replica carries 1."""
        self._pool(request, context)
        spec = MESSAGES["MetricSpec"](metricName=METRIC_NAME, targetSize=1, targetSizeFloat=1.0)
        return MESSAGES["GetMetricSpecResponse"](metricSpecs=[spec])

    def get_metrics(self, request: Any, context: Any) -> Any:
        """The replicas wanted; UNAVAILABLE when nobody said so lately."""
        pool = self._pool(request.scaledObjectRef, context)
        desired = pool.read()
        if desired.num_replicas is None or not desired.fresh:
            context.abort(grpc.StatusCode.UNAVAILABLE, _stale(pool, desired))
        count = desired.num_replicas
        value = MESSAGES["MetricValue"](metricName=METRIC_NAME, metricValue=count, metricValueFloat=float(count or 0))
        return MESSAGES["GetMetricsResponse"](metricValues=[value])

    def _pool(self, reference: Any, context: Any) -> DesiredReplicas:
        name = reference.scalerMetadata.get("pool", "")
        if not name and len(self._pools) == 1:
            return next(iter(self._pools.values()))
        if name not in self._pools:
            known = f"{did_you_mean(name, self._pools)}; known: {', '.join(sorted(self._pools))}"
            what = f"unknown pool '{name}'" if name else "the trigger's metadata must name its pool"
            context.abort(grpc.StatusCode.NOT_FOUND, what + known)
        return self._pools[name]

    def _handlers(self) -> dict[str, Any]:
        def unary(act: Callable[[Any, Any], Any], request: str) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                act, MESSAGES[request].FromString, lambda answer: answer.SerializeToString()
            )

        return {
            "IsActive": unary(self.is_active, "ScaledObjectRef"),
            "GetMetricSpec": unary(self.get_metric_spec, "ScaledObjectRef"),
            "GetMetrics": unary(self.get_metrics, "GetMetricsRequest"),
            "StreamIsActive": grpc.unary_stream_rpc_method_handler(
                self.stream_is_active,
                MESSAGES["ScaledObjectRef"].FromString,
                lambda answer: answer.SerializeToString(),
            ),
        }


def _active(desired: Desired) -> bool:
    return desired.num_replicas is None or desired.num_replicas > 0


def _stale(pool: DesiredReplicas, desired: Desired) -> str:
    if desired.num_replicas is None:
        return f"pool {pool.pool}: nothing decided yet; keep the replicas there are"
    return (
        f"pool {pool.pool}: last decision ({desired.num_replicas}) is {desired.age_s:.0f} s old and no longer holds "
        f"(limit {pool.hold_s:g} s); keep the replicas there are"
    )
