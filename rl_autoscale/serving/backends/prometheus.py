"""Prometheus: the replicas each pool should have, as a gauge that an existing HorizontalPodAutoscaler follows.

    rl_autoscale_desired_replicas{pool="chat"} 7
    rl_autoscale_desired_replicas_age_seconds{pool="chat"} 3.2

A stale figure is left out of the exposition. Prometheus then ends the series at its next scrape, the metrics adapter
has nothing to give, and the HPA keeps its replicas and says so in its condition ScalingActive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rl_autoscale.fleet.errors import MissingExtraError
from rl_autoscale.serving.backends.desired import DesiredReplicas

try:
    from prometheus_client.core import GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError:  # pragma: no cover - depends on what is installed
    raise MissingExtraError("the Prometheus back end", "serve") from None

DESIRED = "rl_autoscale_desired_replicas"
AGE = "rl_autoscale_desired_replicas_age_seconds"


class DesiredReplicasCollector(Collector):
    """Shows published figures on the controller's ``/metrics``; register it there.

    Args:
        pools: one per pool.
    """

    def __init__(self, pools: Iterable[DesiredReplicas]) -> None:
        self._pools = tuple(pools)

    def collect(self) -> Iterator[Metric]:
        """Read at every scrape, so that a figure grows stale without anybody's doing."""
        desired = GaugeMetricFamily(DESIRED, "Replicas that the policy wants; absent when stale.", labels=["pool"])
        age = GaugeMetricFamily(AGE, "Age of the newest decision; absent before the first.", labels=["pool"])
        for pool in self._pools:
            read = pool.read()
            if read.num_replicas is None:
                continue
            if read.fresh:
                desired.add_metric([pool.pool], read.num_replicas)
            age.add_metric([pool.pool], read.age_s)
        yield desired
        yield age
