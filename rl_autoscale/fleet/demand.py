"""How many replicas of work arriving traffic asks for.

The statistical estimate that rules and the learned policy share.

A request costs a replica ``prompt_tokens * prefill_s_per_token + output_tokens * decode_s_per_token`` seconds when
batches are full. Multiplied by the arrival rate this is the *demand* in replicas at full utilisation; a headroom
factor on top is what rules tune by hand and the learned policy decides anew each step. The final output length of a
request in flight is unknown, so a mean stands in (`rl_autoscale.fleet.answer_lengths`).

A class's demand is planned on one pool, its first choice: of the pools of its preferred role the one whose work is
cheapest (`FleetSpec.first_choice`). What that pool may not hold goes to the next cheapest beside it (`overflow`).

Prefill pools are asked for the first term, decode pools for the second; every other pool for both.

What batch pools need is another question, since their work may wait: how much is queued, and until when
(`DemandEstimator.backlog_replicas`).
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.answer_lengths import AnswerLengths
from rl_autoscale.fleet.in_flight import InFlight
from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.profile import TYPICAL_OUTPUT_TOKENS, TYPICAL_PROMPT_TOKENS
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, FloatArray

DEFAULT_TIME_CONSTANTS_S = (30.0, 120.0, 600.0)
PLANNED_SHARE = 0.5
"""Of the time left, in which a queue is planned to be started: what requests take is an estimate."""
LEAST_PLANNED = 0.1
"""Of the wait that is allowed: what is nearly late, or late, is worked off in that, not at once."""


def overflow(
    spec: FleetSpec, replicas: npt.NDArray[np.floating], most: npt.NDArray[np.floating] | None = None
) -> FloatArray:
    """Hand what exceeds a pool's largest size on to the next cheapest pool of its role, as work for that hardware.

    Args:
        spec: the fleet.
        replicas: wanted in each pool, shape (..., num_pools), >= 0.
        most: what each pool may hold, shape (num_pools,); default ``max_replicas``.

    Returns:
        Shape (..., num_pools). The last pool of a role keeps what nobody may hold; one alone in its role is unchanged.
    """
    limits = spec.max_replicas if most is None else most
    placed = np.array(replicas, dtype=np.float64)
    for pools in spec.cheapest_first:
        for full, following in pairwise(pools):
            excess = np.maximum(placed[..., full] - limits[full], 0.0)
            placed[..., full] -= excess
            placed[..., following] += excess * (
                spec.pools[following].typical_request_s / spec.pools[full].typical_request_s
            )
    return placed


class StandIns:
    """Pools of a role or model that is nobody's first choice: they serve until others are as large as wanted.

    Given up at once, what a fleet begins with in such a pool would be gone a start-up before its work is taken over.
    Batch pools need nobody: their work may wait.

    Args:
        spec: the fleet.

    Attributes:
        pools: the stand-ins, as indices.
    """

    def __init__(self, spec: FleetSpec) -> None:
        preferred = {spec.pools[p].tier for p in DemandEstimator(spec).work_pool}
        self.pools = np.array([p for p, pool in enumerate(spec.pools) if pool.tier not in preferred], dtype=np.int64)
        self._least, self._most = spec.min_replicas, spec.max_replicas
        self._per_replica = np.zeros((len(spec.pools), len(spec.pools)))  # that the second needs for one of the first
        for c, first in enumerate(spec.first_choice):
            for spare in set(spec.pools_serving(c)) & set(self.pools.tolist()):
                if spec.pools[first].role != "batch":
                    ratio = spec.pools[spare].typical_request_s / spec.pools[first].typical_request_s
                    self._per_replica[first, spare] = ratio

    def keep(self, target: npt.NDArray[np.number], state: FleetState) -> FloatArray:
        """Targets within the pools' bounds, of stand-ins no less than they have while others lack as much.

        Args:
            target: replicas wanted, shape (..., num_pools).
            state: what is ready and asked for. A pool that cannot be read may lack everything; a stand-in whose target
                cannot be read has what is ready.
        """
        target = np.clip(target, self._least, self._most)
        ready, asked_for = state.pools.ready, state.pools.asked_for
        lacking = np.maximum(target - np.nan_to_num(ready), 0.0)
        has = np.nan_to_num(np.where(np.isnan(asked_for), ready, asked_for))
        return np.asarray(np.maximum(target, np.minimum(has, np.ceil(lacking @ self._per_replica))))

    def release(self, target: npt.NDArray[np.number], state: FleetState) -> FloatArray:
        """The same for a rule that never resizes stand-ins: once all classes are measured it wants none of them.

        Args:
            target: replicas wanted, shape (num_pools,); as they are, of stand-ins.
            state: of one fleet.
        """
        if np.isnan(state.classes.arrivals_per_s).any():
            return np.asarray(target)
        freed = np.array(target)
        freed[self.pools] = 0
        return self.keep(freed, state)


def due_now(spec: FleetSpec, state: FleetState) -> npt.NDArray[np.bool_]:
    """Which batch pools must have a replica now for the head of a queue to start in time, shape (..., num_pools).

    It has no longer to wait than two start-ups. A queue too short to be worth a replica would otherwise wait for ever
    where nothing but a batch pool serves it.
    """
    ttft_s = np.array([item.ttft_slo_s for item in spec.classes])
    startup_s = np.array([pool.startup_mean_s for pool in spec.pools])[spec.first_choice]
    waits = (state.classes.queue_length > 0) & (state.classes.oldest_wait_s >= ttft_s - 2.0 * startup_s)
    planned = (spec.first_choice[:, None] == np.arange(len(spec.pools))) & [pool.role == "batch" for pool in spec.pools]
    return np.asarray((waits.astype(np.int64) @ planned.astype(np.int64)) > 0)


def allowed_wait_s(spec: FleetSpec, output_tokens: FloatArray) -> FloatArray:
    """How long requests may wait for their first token: the TTFT SLO, or less where a deadline says so.

    With a deadline it must come early enough that the rest, at the TPOT SLO, ends in time.

    Args:
        spec: the fleet.
        output_tokens: of a request of each class, shape (..., num_classes).

    Returns:
        Shape (..., num_classes), >= 0.
    """
    ttft_s, tpot_s = (np.array([getattr(item, key) for item in spec.classes]) for key in ("ttft_slo_s", "tpot_slo_s"))
    deadline_s = np.array([np.inf if item.deadline_s is None else item.deadline_s for item in spec.classes])
    return np.asarray(np.maximum(np.minimum(ttft_s, deadline_s - output_tokens * tpot_s), 0.0))


class DemandEstimator:
    """Exponentially weighted arrival rates at several time scales, turned into replicas of work.

    Args:
        spec: the fleet; its profiles give seconds per token.
        time_constants_s: one EWMA per entry; an entry of 0 is the last window itself.
        batch_shape: leading dimensions of the states, () for one fleet.

    Attributes:
        work_class: shape (num_works,): a class asks its first-choice pool, and of a prefill pool a decode pool beside.
        work_pool: shape (num_works,), the pool that is asked.
        batch_pools: those whose work may wait, as indices.
    """

    def __init__(
        self,
        spec: FleetSpec,
        time_constants_s: tuple[float, ...] = DEFAULT_TIME_CONSTANTS_S,
        batch_shape: tuple[int, ...] = (),
    ) -> None:
        self.spec = spec
        self.time_constants_s = time_constants_s
        self._batch_shape = batch_shape
        first_decode = [pools[0] for pools in spec.cheapest_first if pools[0] in spec.decode_pools]
        self.work_pool = np.array([*spec.first_choice, *first_decode * len(spec.classes)])
        self.work_class = np.arange(len(self.work_pool)) % len(spec.classes)
        self.batch_pools = np.flatnonzero([pool.role == "batch" for pool in spec.pools])
        self._is_asked: FloatArray = (self.work_pool[:, None] == np.arange(len(spec.pools))).astype(np.float64)
        self._asks = np.zeros((len(spec.pools), len(spec.classes)), dtype=np.bool_)
        self._asks[self.work_pool, self.work_class] = True
        # A time constant of 0 becomes one so short that the last window replaces everything before it.
        self._scale_s = np.maximum(time_constants_s, 1e-9).reshape(-1, *(1 for _ in batch_shape), 1)
        prices_s = np.array([_prices_s(spec.pools[p]) for p in self.work_pool])
        self._prefill_s, self._decode_s = prices_s[:, 0], prices_s[:, 1]
        self.reset()

    def reset(self, which: npt.NDArray[np.bool_] | None = None) -> None:
        """Forget all rates, for all fleets or those selected by a boolean array of shape ``batch_shape``."""
        shape = (*self._batch_shape, len(self.spec.classes))
        if which is None:
            self._arrivals_per_s = np.full((len(self.time_constants_s), *shape), np.nan)
            self._prompt_tokens_per_s = np.full((len(self.time_constants_s), *shape), np.nan)
            self._lengths = AnswerLengths(shape)
            return
        self._arrivals_per_s[:, which] = np.nan
        self._prompt_tokens_per_s[:, which] = np.nan
        self._lengths.reset(which)

    def adopt(self, other: DemandEstimator, which: npt.NDArray[np.bool_]) -> None:
        """Take over the rates of an estimator of fewer fleets for the selected ones."""
        self._arrivals_per_s[:, which] = other._arrivals_per_s
        self._prompt_tokens_per_s[:, which] = other._prompt_tokens_per_s
        self._lengths.adopt(other._lengths, which)

    @property
    def mean_output_tokens(self) -> FloatArray:
        """Of a request of each class, shape (..., num_classes)."""
        return self._lengths.mean_tokens

    def update(self, state: FleetState) -> None:
        """Take in one observation; missing (NaN) rates leave the estimate as it is."""
        window_s = np.asarray(state.window_s)[..., None]
        weight = 1.0 - np.exp(-window_s / self._scale_s)
        for ewma, rate in (
            (self._arrivals_per_s, state.classes.arrivals_per_s),
            (self._prompt_tokens_per_s, state.classes.arrived_prompt_tokens_per_s),
        ):
            moved = np.where(np.isnan(ewma), rate, ewma + weight * (rate - ewma))
            ewma[...] = np.where(np.isnan(rate) | ~(window_s > 0), ewma, moved)
        self._lengths.update(state)

    def work_replicas(self, scale_index: int) -> FloatArray:
        """Replicas of work that ``work_class`` asks of ``work_pool``, shape (..., num_works); 0 before any data."""
        return self._work(self._prompt_tokens_per_s[scale_index], self._arrivals_per_s[scale_index])

    def replicas(self, scale_index: int) -> FloatArray:
        """Replicas of work asked of each pool, shape (..., num_pools); a class counts for its first-choice pool."""
        return np.asarray(self.work_replicas(scale_index) @ self._is_asked)

    def replicas_by_scale(self) -> FloatArray:
        """`replicas` of every time constant, shape (num_scales, ..., num_pools)."""
        return np.asarray(self._work(self._prompt_tokens_per_s, self._arrivals_per_s) @ self._is_asked)

    def backlog_replicas(self, state: FleetState) -> FloatArray:
        """Replicas that start everything queued for batch pools in half of the time left, the earliest deadline first.

        Of each deadline the work that is due by then over that time, less a start-up; the largest counts. All of a
        class's queue is taken to be as old as its head. Call after `update`.

        Args:
            state: of which the queues are read.

        Returns:
            Shape (..., num_pools); NaN where a queue is unknown, 0 for other pools.
        """
        classes = state.classes
        slowest = int(np.argmax(self.time_constants_s))
        arrivals, prompts = self._arrivals_per_s[slowest], self._prompt_tokens_per_s[slowest]
        known = arrivals > 0
        prompt_tokens = np.where(known, prompts / np.where(known, arrivals, 1.0), TYPICAL_PROMPT_TOKENS)
        every = np.arange(len(self.spec.classes))
        work_s = classes.queue_length * self.request_work_s(prompt_tokens, self.mean_output_tokens, every)
        allowed_s = allowed_wait_s(self.spec, self.mean_output_tokens)
        waited_s = np.where(classes.queue_length > 0, classes.oldest_wait_s, 0.0)
        needed = np.zeros((*work_s.shape[:-1], len(self.spec.pools)))
        for p in self.batch_pools:
            mine = self.classes_asking(int(p))
            left_s = PLANNED_SHARE * (allowed_s - waited_s)[..., mine] - self.spec.pools[p].startup_mean_s
            left_s = np.maximum(left_s, np.maximum(LEAST_PLANNED * allowed_s[..., mine], self.spec.control_interval_s))
            order = np.argsort(left_s, axis=-1)
            due_s = np.cumsum(np.take_along_axis(work_s[..., mine], order, axis=-1), axis=-1)
            needed[..., p] = (due_s / np.take_along_axis(left_s, order, axis=-1)).max(axis=-1, initial=0.0)
        return needed

    @cached_property
    def _law(self) -> InFlight:
        return InFlight(self.spec)

    def in_flight(self, scale_index: int) -> FloatArray:
        """Requests that a replica of each pool may have in flight within the SLOs, shape (..., num_pools)."""
        arrivals, prompts = self._arrivals_per_s[scale_index], self._prompt_tokens_per_s[scale_index]
        return self._law.per_replica(np.nan_to_num(arrivals), np.nan_to_num(prompts), self.mean_output_tokens)

    def classes_asking(self, pool_index: int) -> npt.NDArray[np.bool_]:
        """Which classes count for a pool, shape (num_classes,)."""
        return np.asarray(self._asks[pool_index])

    def _work(self, prompt_tokens_per_s: FloatArray, arrivals_per_s: FloatArray) -> FloatArray:
        prompts = np.where(np.isnan(prompt_tokens_per_s), 0.0, prompt_tokens_per_s)[..., self.work_class]
        arrivals = np.where(np.isnan(arrivals_per_s), 0.0, arrivals_per_s)
        output = (arrivals * self.mean_output_tokens)[..., self.work_class]
        return np.asarray(prompts * self._prefill_s + output * self._decode_s)

    def request_work_s(
        self, prompt_tokens: FloatArray, output_tokens: FloatArray, class_index: npt.NDArray[np.integer]
    ) -> FloatArray:
        """Replica-seconds of given requests at full utilisation, over all pools, shape (num_requests,)."""
        num_classes = len(self.spec.classes)
        prefill_s, decode_s = (
            price_s.reshape(-1, num_classes).sum(axis=0) for price_s in (self._prefill_s, self._decode_s)
        )
        return np.asarray(prompt_tokens * prefill_s[class_index] + output_tokens * decode_s[class_index])

    def pool_work_s(
        self, prompt_tokens: FloatArray, output_tokens: FloatArray, class_index: npt.NDArray[np.integer], pool: int
    ) -> FloatArray:
        """What of `request_work_s` is asked of one pool, shape (num_requests,)."""
        asked = np.flatnonzero(self.work_pool == pool)
        prefill_s, decode_s = (
            np.bincount(self.work_class[asked], price_s[asked], len(self.spec.classes))
            for price_s in (self._prefill_s, self._decode_s)
        )
        return np.asarray(prompt_tokens * prefill_s[class_index] + output_tokens * decode_s[class_index])


def _prices_s(pool: PoolSpec) -> tuple[float, float]:
    """Replica-seconds per prompt token and per output token; 0 for what other pools do."""
    prefill_s = pool.hardware.prefill_s_per_token(TYPICAL_PROMPT_TOKENS)
    decode_s = pool.full_batch_decode_s(TYPICAL_PROMPT_TOKENS, TYPICAL_OUTPUT_TOKENS)
    return prefill_s * (pool.role != "decode"), decode_s * (pool.role != "prefill")
