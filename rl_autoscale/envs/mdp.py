"""The decision process itself.

Many simulated fleets, one observation, action and reward. Gymnasium and SB3 are shells around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rl_autoscale.envs.action import ActionDecoder
from rl_autoscale.envs.constants import Constants
from rl_autoscale.envs.faults import TelemetryFaults
from rl_autoscale.envs.foresight import Foresight
from rl_autoscale.envs.observation import ObservationEncoder
from rl_autoscale.envs.reward import Reward, step_reward
from rl_autoscale.fleet.demand import DemandEstimator, overflow
from rl_autoscale.fleet.rng import stream
from rl_autoscale.fleet.shield import Shield
from rl_autoscale.fleet.spec import FleetSpec, ShieldSpec
from rl_autoscale.fleet.state import ClassTelemetry, FleetState, FloatArray, PoolTelemetry, ScalingDecision
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.workload.trace import Workload

_ENDS = ("finished", "refused", "queue_full", "timed_out", "failed")


@dataclass(frozen=True, slots=True)
class EpisodeSetup:
    """What one episode is made of; drawn anew for each.

    Attributes:
        workload: its traffic; the episode lasts ``workload.span_s``, rounded down to whole control steps.
        miss_price: see envs/reward.py.
        miss_weight: of each class, see there; None for 1.
        speed: true iteration time over the profile's (capacity error).
        startup_scale: true start-up time over the spec's.
        initial_headroom: replicas ready at time 0 over the episode's mean demand; None for the spec's initial replicas.
    """

    workload: Workload
    miss_price: float
    miss_weight: tuple[float, ...] | None = None
    speed: float = 1.0
    startup_scale: float = 1.0
    initial_headroom: float | None = None


EpisodeSampler = Callable[[int], EpisodeSetup]
"""Makes the episode of a seed; must depend on the seed alone."""


@dataclass(frozen=True, slots=True)
class MdpStep:
    """What a step of all fleets gave; arrays have shape (num_fleets, ...)."""

    observation: npt.NDArray[np.float32]
    reward: Reward
    truncated: npt.NDArray[np.bool_]
    state: FleetState
    decision: ScalingDecision


class FleetMdp:
    """A batch of fleets as a Markov decision process with horizon (reaching it is truncation, never termination).

    Episode k of fleet e has seed ``SeedSequence([seed, e, k])``: the same for any number of fleets or threads, and
    independent of the actions. Telemetry faults are the episode's, too. Given a seed for each fleet it is
    ``SeedSequence([seed[e], 0, k])``, that of one fleet alone with that seed.

    Args:
        spec: the fleet.
        shield: limits in force in training as in production.
        sampler: makes episodes.
        num_fleets: fleets advanced together.
        num_threads: threads that share them.
        refuse: whether early refusal is part of the action.
        faults: telemetry faults to train under.
        constants: of the policy that acts, see envs/constants.py.
    """

    def __init__(
        self,
        spec: FleetSpec,
        shield: ShieldSpec,
        sampler: EpisodeSampler,
        *,
        num_fleets: int = 1,
        num_threads: int = 1,
        refuse: bool = True,
        faults: TelemetryFaults | None = None,
        constants: Constants | None = None,
    ) -> None:
        self.spec = spec
        self.num_fleets = num_fleets
        self._sampler = sampler
        self._batch = FleetBatch(spec, num_fleets, num_threads=num_threads)
        self._shield = Shield(spec, shield, (num_fleets,))
        self.encoder = ObservationEncoder(spec, (num_fleets,))
        self.decoder = ActionDecoder(spec, refuse=refuse)
        self.constants = Constants() if constants is None else constants
        self._demand = DemandEstimator(spec)
        self._foresight = Foresight(spec, num_fleets)
        self._faults = faults
        self._fault_rngs = [stream(0, "faults")] * num_fleets
        self._initial = np.tile(spec.initial_replicas, (num_fleets, 1))
        self.miss_price = np.ones(num_fleets)
        self.miss_weight = np.ones((num_fleets, len(spec.classes)))
        self.state: FleetState | None = None
        self._horizon_s = np.zeros(num_fleets)
        self._ideal_gpu_s = np.ones(num_fleets)
        self._mean_arrivals = np.ones(num_fleets)
        self._batch_request_gpu_s = np.zeros((num_fleets, len(spec.classes)))  # of a batch class's mean request
        self._roots = [(0, e) for e in range(num_fleets)]
        self._missed = np.zeros((num_fleets, len(spec.classes)), dtype=np.int64)  # in this episode so far
        self._episode = np.zeros(num_fleets, dtype=np.int64)

    @property
    def batch(self) -> FleetBatch:
        """The fleets."""
        return self._batch

    @property
    def ideal_gpus(self) -> FloatArray:
        """GPUs that the work of each episode takes at full load, on average, shape (num_fleets,)."""
        return self._ideal_gpu_s / self.spec.control_interval_s

    def reset(self, seed: int | Sequence[int]) -> npt.NDArray[np.float32]:
        """Begin a run: a first episode in every fleet. Returns observations, shape (num_fleets, num_features).

        Args:
            seed: of the run, or one for each fleet.
        """
        if isinstance(seed, Sequence):
            self._roots = [(int(item), 0) for item in seed]
        else:
            self._roots = [(int(seed), e) for e in range(self.num_fleets)]
        self._episode[:] = 0
        for e in range(self.num_fleets):
            self._begin(e)
        self._shield.reset(standing=self._initial)
        self.encoder.reset()
        return self._encode()

    def reset_fleets(self, which: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        """Begin the next episode in the selected fleets.

        Returns their first observations, shape (count, num_features).
        """
        for e in np.flatnonzero(which):
            self._episode[e] += 1
            self._begin(int(e))
        self._shield.reset(which, self._initial[which])
        first = self._batch.observe()
        if self.state is not None:
            self.state = _replace(self.state, first, which)
        fresh = ObservationEncoder(self.spec, (int(which.sum()),))
        observation = fresh.encode(first[which], self.miss_price[which], self.miss_weight[which])
        self.encoder.adopt(fresh, which)
        return observation

    def _begin(self, e: int) -> None:
        episode_seed = int(np.random.SeedSequence([*self._roots[e], int(self._episode[e])]).generate_state(1)[0])
        self._fault_rngs[e] = stream(episode_seed, "faults")
        setup = self._sampler(episode_seed)
        workload, spec = setup.workload, self.spec
        work_s = self._work_s(workload)
        initial = spec.initial_replicas
        if setup.initial_headroom is not None:
            wanted = setup.initial_headroom * setup.speed * work_s.sum(axis=1) / workload.span_s
            initial = np.clip(np.ceil(overflow(spec, wanted)), spec.min_replicas, spec.max_replicas).astype(np.int64)
            initial = self._shield.affordable(initial)
        self._initial[e] = initial
        self._batch.load(
            e,
            workload,
            seed=episode_seed,
            speed=setup.speed,
            startup_scale=setup.startup_scale,
            initial_replicas=initial,
        )
        num_steps = max(int(workload.span_s / spec.control_interval_s + 1e-9), 1)
        self._horizon_s[e] = num_steps * spec.control_interval_s
        gpu_s = spec.gpus_per_replica @ work_s
        self._ideal_gpu_s[e] = max(float(gpu_s.sum()) / num_steps, 1e-6)
        requests = np.maximum(np.bincount(workload.class_index, minlength=len(spec.classes)), 1)
        is_batch = np.array([item.kind == "batch" for item in spec.classes])
        self._batch_request_gpu_s[e] = np.where(is_batch, gpu_s / requests, 0.0)
        self._mean_arrivals[e] = max(workload.num_requests / num_steps, 1e-6)
        self._missed[e] = 0
        self.miss_price[e] = setup.miss_price
        self.miss_weight[e] = 1.0 if setup.miss_weight is None else setup.miss_weight
        self._foresight.load(e, workload, setup.speed, setup.startup_scale)

    def _work_s(self, workload: Workload) -> FloatArray:
        """Replica-seconds of all requests by the pool that they count for and class, (num_pools, num_classes)."""
        num_classes = len(self.spec.classes)
        classes = workload.class_index
        prompt = np.bincount(classes, workload.prompt_tokens, num_classes).astype(np.float64)
        output = np.bincount(classes, workload.output_tokens, num_classes).astype(np.float64)
        every, pools = np.arange(num_classes), range(len(self.spec.pools))
        return np.array([self._demand.pool_work_s(prompt, output, every, p) for p in pools])

    def _put_off_gpu_s(self) -> FloatArray:
        """GPU-seconds of the batch requests that have arrived and not ended, shape (num_fleets,)."""
        unresolved = self._batch.ledger("arrived") - sum(self._batch.ledger(end) for end in _ENDS)
        return np.asarray((unresolved * self._batch_request_gpu_s).sum(axis=-1))

    def _encode(self) -> npt.NDArray[np.float32]:
        state = self._batch.observe()
        if self._faults is not None:
            draws = np.array([rng.random() for rng in self._fault_rngs])
            state = self._faults.corrupt(state, self.state, draws)
        self.state = state
        return self.encoder.encode(state, self.miss_price, self.miss_weight)

    def step(self, action: npt.NDArray[np.floating]) -> MdpStep:
        """One control step in every fleet.

        Args:
            action: shape (num_fleets, num_actions), in [-1, 1].
        """
        if self.state is None:
            raise RuntimeError("step() before reset()")
        constants = self.constants.at(self.miss_price)
        wanted = self.decoder.decode(action, self.encoder.anchors(), self.state, constants)
        decision = self._shield.clip(wanted, self.state)
        gpu_s_before = self._batch.gpu_s().sum(axis=-1)
        missed_before, put_off_before = self._missed, self._put_off_gpu_s()
        self._batch.step(decision)
        self._missed = self._batch.missed()
        reward = step_reward(
            self._batch.gpu_s().sum(axis=-1) - gpu_s_before,
            self._put_off_gpu_s() - put_off_before,
            (self._missed - missed_before).astype(np.float64),
            self._ideal_gpu_s,
            self._mean_arrivals,
            self.miss_price,
            self.miss_weight,
        )
        observation = self._encode()
        return MdpStep(observation, reward, self._batch.now_s >= self._horizon_s, self.state, decision)

    @property
    def num_foresight_features(self) -> int:
        """Length of `foresight` of one fleet."""
        return self._foresight.num_features

    def foresight(self) -> npt.NDArray[np.float32]:
        """What hindsight knows, for a critic: shape (num_fleets, num_foresight_features); see envs/foresight.py."""
        return self._foresight.features(self._batch.now_s, self.encoder.demand_replicas())

    def books(self, e: int) -> dict[str, float]:
        """Cost and attainment of fleet ``e`` so far; attainments of classes by their names in the schema.

        ``cost_over_ideal`` is GPU time spent, ``put_off_over_ideal`` batch work left undone: the reward has both.
        """
        by_class = self._batch.ledger("arrived")[e]
        arrived = float(by_class.sum())
        missed = self._missed[e]
        gpu_s = float(self._batch.gpu_s()[e].sum())
        steps = max(float(self._batch.now_s[e]) / self.spec.control_interval_s, 1.0)
        return {
            "gpu_hours": gpu_s / 3600.0,
            "cost_over_ideal": gpu_s / (self._ideal_gpu_s[e] * steps),
            "put_off_over_ideal": float(self._put_off_gpu_s()[e]) / (self._ideal_gpu_s[e] * steps),
            "slo_attainment": 1.0 - float(missed.sum()) / arrived if arrived else float("nan"),
            "weighted_misses": float(missed @ self.miss_weight[e]) / arrived if arrived else float("nan"),
            "miss_price": float(self.miss_price[e]),
            **{
                f"slo_attainment/{name}": 1.0 - float(missed[c] / by_class[c]) if by_class[c] else float("nan")
                for c, name in enumerate(self.encoder.schema.layout[len(self.spec.pools) :])
                if len(by_class) > 1
            },
        }


def _replace(state: FleetState, new: FleetState, which: npt.NDArray[np.bool_]) -> FleetState:
    """``state`` with the rows of the selected fleets taken from ``new``."""
    chosen = which[:, None, None]
    return FleetState(
        np.where(which, new.time_s, state.time_s),
        np.where(which, new.window_s, state.window_s),
        PoolTelemetry.from_matrix(np.where(chosen, new.pools.to_matrix(), state.pools.to_matrix())),
        ClassTelemetry.from_matrix(np.where(chosen, new.classes.to_matrix(), state.classes.to_matrix())),
    )
