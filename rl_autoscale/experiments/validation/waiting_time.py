"""How wrong QLM's waiting-time estimate is: against the simulated wait of the request at the end of a draining queue.

A burst of requests meets a fixed fleet. At every control step the estimator of the `qlm` policy, fed with telemetry
alone, predicts the wait of the last queued request until it is dispatched; the simulation then shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rl_autoscale.agents.chiron_batch import BatchLoop
from rl_autoscale.agents.tiers import tiers_of
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NEVER_REFUSE, FloatArray, ScalingDecision
from rl_autoscale.sim.fleet import SimFleet
from rl_autoscale.workload.length_spec import resolve_lengths
from rl_autoscale.workload.lengths import sample_lengths
from rl_autoscale.workload.trace import Workload


@dataclass(frozen=True, slots=True)
class WaitingTimes:
    """Predictions and truth, all of shape (num_predictions,).

    Attributes:
        queue_length: requests queued, the predicted one included.
        mean_s: predicted mean.
        std_s: predicted standard deviation.
        true_s: what it was.
    """

    queue_length: FloatArray
    mean_s: FloatArray
    std_s: FloatArray
    true_s: FloatArray

    def between(self, low: float, high: float) -> WaitingTimes:
        """Predictions at queue lengths of ``low`` and more, below ``high``."""
        chosen = (self.queue_length >= low) & (self.queue_length < high)
        return WaitingTimes(self.queue_length[chosen], self.mean_s[chosen], self.std_s[chosen], self.true_s[chosen])

    @property
    def relative_error(self) -> FloatArray:
        """Predicted mean over truth, less one."""
        return self.mean_s / self.true_s - 1.0

    @property
    def r_squared(self) -> float:
        """Share of the variance of true waits that the predicted means explain."""
        return float(
            1.0 - np.square(self.mean_s - self.true_s).sum() / np.square(self.true_s - self.true_s.mean()).sum()
        )

    def coverage(self, z: float) -> float:
        """Share of waits within the bound mean + z deviations."""
        return float((self.true_s <= self.mean_s + z * self.std_s).mean())


def measure_waiting_times(
    seed: int,
    *,
    num_requests: int = 3000,
    num_replicas: int = 2,
    batch_cap: int = 64,
    lengths: str = "azure_conv",
    profile: str = "llama-3.1-8b_a100_tp1",
    steps_s: float = 2.0,
) -> WaitingTimes:
    """Let one burst drain and compare every prediction with what happened.

    Args:
        seed: of the lengths.
        num_requests: of the burst.
        num_replicas: that serve it.
        batch_cap: requests in flight allowed per replica.
        lengths: named length model.
        profile: of the replicas.
        steps_s: time between predictions.
    """
    prompt_tokens, output_tokens = sample_lengths(np.random.default_rng(seed), resolve_lengths(lengths), num_requests)
    classes, arrival_s = np.zeros(num_requests, dtype=np.int16), np.zeros(num_requests)
    workload = Workload(arrival_s, prompt_tokens, output_tokens, classes, ("jobs",), 1.0)
    slo = {"name": "jobs", "kind": "batch", "ttft_slo_s": 1e5, "tpot_slo_s": 10.0, "queue_limit": num_requests}
    pool = {"name": "pool", "profile": profile, "min_replicas": num_replicas, "max_replicas": num_replicas}
    spec = FleetSpec.from_dict({"pools": [pool], "classes": [slo], "control_interval_s": steps_s})
    fleet, estimator = SimFleet(spec, workload), BatchLoop(spec, z=0.0, output_cv=1.0, tier=tiers_of(spec)[0])
    cap = np.array([batch_cap])
    fleet.apply(ScalingDecision(np.array([num_replicas]), cap, np.array([NEVER_REFUSE])))
    found = []
    while fleet.advance():
        state = fleet.observe()
        estimator.observe(state, cap.astype(np.float64), np.ones(1, dtype=np.bool_))
        if state.classes.queue_length[0] > 0:
            predicted = estimator.waiting_time_s(state, cap.astype(np.float64))
            found.append((float(state.time_s), float(state.classes.queue_length[0]), *predicted))
    last_s = float(fleet.batch.requests(0)["dispatched_s"].max())
    time_s, queue_length, mean_s, std_s = np.array(found).T
    seen_s = time_s - spec.telemetry_age_s
    waiting = last_s > seen_s
    return WaitingTimes(*(column[waiting] for column in (queue_length, mean_s, std_s, last_s - seen_s)))
