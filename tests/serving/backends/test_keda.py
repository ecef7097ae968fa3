"""The external scaler over a real channel, called as KEDA calls it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from rl_autoscale.serving.backends.desired import DesiredReplicas
from rl_autoscale.serving.backends.keda import MESSAGES, METRIC_NAME, SERVICE, KedaScaler

from .conftest import FakeClock


class Keda:
    """A client that knows the interface by its method names and message classes only."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel

    def reference(self, **metadata: str) -> Any:
        return MESSAGES["ScaledObjectRef"](name="llm", namespace="serving", scalerMetadata=metadata)

    def unary(self, method: str, answer: str, request: Any) -> Any:
        call = self.channel.unary_unary(
            f"/{SERVICE}/{method}", lambda message: message.SerializeToString(), MESSAGES[answer].FromString
        )
        return call(request, timeout=10)

    def is_active(self, **metadata: str) -> bool:
        return self.unary("IsActive", "IsActiveResponse", self.reference(**metadata)).result

    def metric(self, **metadata: str) -> tuple[str, float]:
        request = MESSAGES["GetMetricsRequest"](scaledObjectRef=self.reference(**metadata), metricName=METRIC_NAME)
        (value,) = self.unary("GetMetrics", "GetMetricsResponse", request).metricValues
        # KEDA takes the float when it is positive, else the integer.
        return value.metricName, value.metricValueFloat if value.metricValueFloat > 0 else value.metricValue

    def stream(self, **metadata: str) -> Any:
        call = self.channel.unary_stream(
            f"/{SERVICE}/StreamIsActive",
            lambda message: message.SerializeToString(),
            MESSAGES["IsActiveResponse"].FromString,
        )
        return call(self.reference(**metadata), timeout=20)


@pytest.fixture
def chat(clock: FakeClock) -> DesiredReplicas:
    return DesiredReplicas("chat", clock, hold_s=60.0)


@pytest.fixture
def jobs(clock: FakeClock) -> DesiredReplicas:
    return DesiredReplicas("jobs", clock, hold_s=60.0)


@pytest.fixture
def keda(chat: DesiredReplicas, jobs: DesiredReplicas) -> Iterator[Keda]:
    scaler = KedaScaler({"chat": chat, "jobs": jobs})
    port = scaler.start("127.0.0.1:0")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Keda(channel)
    scaler.stop(0.0)


def test_the_metric_is_the_replica_count(keda: Keda, chat: DesiredReplicas, jobs: DesiredReplicas) -> None:
    chat.publish(7)
    jobs.publish(0)
    assert keda.metric(pool="chat") == (METRIC_NAME, 7)
    assert keda.metric(pool="jobs") == (METRIC_NAME, 0)
    (spec,) = keda.unary("GetMetricSpec", "GetMetricSpecResponse", keda.reference(pool="chat")).metricSpecs
    assert (spec.metricName, spec.targetSize, spec.targetSizeFloat) == (METRIC_NAME, 1, 1.0)


def test_a_stale_decision_is_an_error_and_not_zero(keda: Keda, chat: DesiredReplicas, clock: FakeClock) -> None:
    chat.publish(7)
    clock.sleep(61)
    with pytest.raises(grpc.RpcError) as error:
        keda.metric(pool="chat")
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "last decision (7) is 61 s old" in error.value.details()
    assert keda.is_active(pool="chat")


def test_before_the_first_decision_nothing_is_reported_and_nothing_goes_to_zero(keda: Keda) -> None:
    with pytest.raises(grpc.RpcError) as error:
        keda.metric(pool="chat")
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert keda.is_active(pool="chat")


def test_only_a_decision_for_zero_is_inactive(keda: Keda, chat: DesiredReplicas, clock: FakeClock) -> None:
    chat.publish(0)
    assert not keda.is_active(pool="chat")
    clock.sleep(61)
    assert not keda.is_active(pool="chat")  # it was zero: holding is zero
    chat.publish(1)
    assert keda.is_active(pool="chat")


def test_the_stream_tells_at_once_and_then_only_changes(keda: Keda, chat: DesiredReplicas) -> None:
    stream = keda.stream(pool="chat")
    assert next(stream).result is True
    chat.publish(5)  # no change of activity: nothing is sent
    chat.publish(0)
    assert next(stream).result is False
    chat.publish(2)
    assert next(stream).result is True
    stream.cancel()


def test_an_idle_stream_says_nothing_twice(chat: DesiredReplicas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl_autoscale.serving.backends.keda.STREAM_POLL_S", 0.0)
    looks = iter([True] * 5 + [False])
    context = SimpleNamespace(is_active=lambda: next(looks))
    chat.publish(3)
    answers = KedaScaler({"chat": chat}).stream_is_active(MESSAGES["ScaledObjectRef"](), context)
    assert [answer.result for answer in answers] == [True]


def test_a_pool_must_be_named_when_there_are_several(keda: Keda) -> None:
    for metadata, message in (({}, "must name its pool"), ({"pool": "chta"}, "did you mean 'chat'")):
        with pytest.raises(grpc.RpcError, match=message) as error:
            keda.is_active(**metadata)
        assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_single_pool_needs_no_name(chat: DesiredReplicas) -> None:
    chat.publish(3)
    scaler = KedaScaler({"chat": chat})
    port = scaler.start("127.0.0.1:0")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert Keda(channel).metric() == (METRIC_NAME, 3)
    scaler.stop(0.0)


def test_the_wire_format_is_the_interfaces() -> None:
    """Bytes by hand: field numbers and types of externalscaler.proto, map entries included."""
    reference = MESSAGES["ScaledObjectRef"](name="a", namespace="b", scalerMetadata={"k": "v"})
    assert reference.SerializeToString() == b"\x0a\x01a\x12\x01b\x1a\x06\x0a\x01k\x12\x01v"
    value = MESSAGES["MetricValue"](metricName="m", metricValue=3, metricValueFloat=3.0)
    assert value.SerializeToString() == b"\x0a\x01m\x10\x03\x19\x00\x00\x00\x00\x00\x00\x08\x40"
    request = MESSAGES["GetMetricsRequest"](scaledObjectRef=reference, metricName="m")
    assert request.SerializeToString() == b"\x0a\x0e" + reference.SerializeToString() + b"\x12\x01m"
    spec = MESSAGES["MetricSpec"](metricName="m", targetSize=1, targetSizeFloat=1.0)
    specs = MESSAGES["GetMetricSpecResponse"](metricSpecs=[spec])
    assert specs.SerializeToString() == b"\x0a\x0e\x0a\x01m\x10\x01\x19\x00\x00\x00\x00\x00\x00\xf0\x3f"
    assert MESSAGES["IsActiveResponse"](result=True).SerializeToString() == b"\x08\x01"
