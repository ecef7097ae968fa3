"""The gauge as Prometheus scrapes it."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rl_autoscale.serving.backends.desired import DesiredReplicas
from rl_autoscale.serving.backends.prometheus import AGE, DESIRED, DesiredReplicasCollector

from .conftest import FakeClock


def scrape(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(sample.name, sample.labels["pool"]): sample.value for family in families for sample in family.samples}


@pytest.fixture
def pools(clock: FakeClock) -> dict[str, DesiredReplicas]:
    return {name: DesiredReplicas(name, clock, hold_s=60.0) for name in ("chat", "jobs")}


@pytest.fixture
def registry(pools: dict[str, DesiredReplicas]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(DesiredReplicasCollector(pools.values()))
    return registry


def test_shows_what_was_decided(registry: CollectorRegistry, pools: dict[str, DesiredReplicas]) -> None:
    pools["chat"].publish(7)
    pools["jobs"].publish(0)
    assert scrape(registry) == {(DESIRED, "chat"): 7, (AGE, "chat"): 0, (DESIRED, "jobs"): 0, (AGE, "jobs"): 0}


def test_a_stale_figure_disappears_and_is_not_zero(
    registry: CollectorRegistry, pools: dict[str, DesiredReplicas], clock: FakeClock
) -> None:
    pools["chat"].publish(7)
    clock.sleep(30)
    pools["jobs"].publish(2)
    clock.sleep(31)
    assert scrape(registry) == {(AGE, "chat"): 61, (DESIRED, "jobs"): 2, (AGE, "jobs"): 31}
    pools["jobs"].withdraw()
    assert scrape(registry) == {(AGE, "chat"): 61, (AGE, "jobs"): 31}


def test_before_the_first_decision_there_is_nothing(registry: CollectorRegistry) -> None:
    assert scrape(registry) == {}
