"""The shield: limits that hold whatever a policy says, in training, in the benchmark and live.

In order, per control step:

1. min/max replicas, batch cap in [1, max_num_seqs], admission >= 0;
2. scale-down stabilisation: a lower target is raised to the *maximum* recommendation of the last
   ``down_stabilisation_s`` (Kubernetes HPA v2 semantics), never above what is asked for now;
3. largest step up and down, measured from what is asked for now;
4. pending-start guard: no growth that would leave more than ``max_pending_starts`` replicas of a pool starting at once;
5. GPU budget: growth is cut, interactive (prefill, decode) pools first served, then mixed, then batch; draining
   replicas still hold their GPUs;
6. shared GPUs: the same for the pools of each group, whose models take turns; a pool grows only into GPUs that are
   free now, so what this decision removes must drain first;
7. the last ready replica that can serve a class is never drained, even while others are starting, nor the last ready
   one that can decode what prefill replicas have begun; unless the class has no GPUs but shared ones.

All steps are pure array arithmetic with optional leading dimensions, so the same code clips one live fleet and a
batch of simulated ones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.spec import FleetSpec, IntArray, ShieldSpec
from rl_autoscale.fleet.state import NEVER_REFUSE, FleetState, FloatArray, ScalingDecision

_ROLE_ORDER = {"interactive": 0, "prefill": 0, "decode": 0, "mixed": 1, "batch": 2}


class Shield:
    """Clips decisions; remembers recommendations for the stabilisation window.

    Args:
        spec: the fleet; gives bounds, GPUs per replica and which pools serve which class.
        limits: what the operator allows.
        batch_shape: leading dimensions of states and decisions, () for one fleet.
    """

    def __init__(self, spec: FleetSpec, limits: ShieldSpec, batch_shape: tuple[int, ...] = ()) -> None:
        self.spec = spec
        self.limits = limits
        window_steps = 1 + int(np.floor(limits.down_stabilisation_s / spec.control_interval_s))
        shape = (window_steps, *batch_shape, len(spec.pools))
        self._recommended: IntArray = np.zeros(shape, dtype=np.int64)
        self._last: IntArray = np.broadcast_to(spec.initial_replicas, shape[1:]).copy()
        self._pool_order = sorted(range(len(spec.pools)), key=lambda p: _ROLE_ORDER[spec.pools[p].role])
        shared = {p for pools, _ in spec.gpu_groups for p in pools}
        serving = [list(spec.pools_serving(c)) for c in range(len(spec.classes))]
        self._pools_serving = [pools for pools in serving if not shared.issuperset(pools)]
        if spec.decode_pools:
            self._pools_serving.append(list(spec.decode_pools))

    def reset(self, which: npt.NDArray[np.bool_] | None = None, standing: IntArray | None = None) -> None:
        """Forget recommendations.

        Args:
            which: fleets, a boolean array of shape ``batch_shape``; None for all.
            standing: replicas that they begin with, shape (..., num_pools); None for the spec's.
        """
        chosen = ... if which is None else which
        self._recommended[:, chosen] = 0
        self._last[chosen] = self.spec.initial_replicas if standing is None else standing

    def prime(self, standing: IntArray) -> None:
        """Behave as if ``standing`` had been recommended for the whole stabilisation window.

        For a controller that starts beside a running fleet: it does not know what was asked for before, so it must
        not scale down sooner than if it had just scaled up.

        Args:
            standing: replicas asked for now, shape (..., num_pools).
        """
        self._recommended[:] = standing
        self._last[...] = standing

    def clip(self, decision: ScalingDecision, state: FleetState) -> ScalingDecision:
        """Return the decision that is safe to apply now.

        Args:
            decision: what the policy wants; shapes (..., num_pools) and (..., num_classes).
            state: the observation it was taken on. Where ``asked_for`` is missing the last clipped target stands in;
                where ``ready`` is missing, nothing of that pool is removed.
        """
        spec, limits = self.spec, self.limits
        blind = np.isnan(state.pools.ready)
        current = np.where(np.isnan(state.pools.asked_for), self._last, state.pools.asked_for).astype(np.int64)
        ready = _whole(state.pools.ready)
        draining = _whole(state.pools.draining)

        wanted = np.clip(decision.target_replicas, spec.min_replicas, spec.max_replicas)
        self._recommended[1:] = self._recommended[:-1]
        self._recommended[0] = wanted
        target = np.where(wanted < current, np.minimum(current, self._recommended.max(axis=0)), wanted)
        if limits.max_step_up is not None:
            target = np.minimum(target, current + limits.max_step_up)
        if limits.max_step_down is not None:
            target = np.maximum(target, current - limits.max_step_down)
        target = np.where(blind, np.maximum(target, current), target)
        target = np.clip(target, spec.min_replicas, spec.max_replicas)
        if limits.max_pending_starts is not None:
            target = np.minimum(target, np.maximum(current, ready + limits.max_pending_starts))
        target = self.within_budget(target, current, np.minimum(target, current) + draining)
        for pools, gpus in spec.gpu_groups:
            order = [p for p in self._pool_order if p in pools]
            unknown = np.isnan(state.pools.draining[..., order]).any(axis=-1)
            free_for_all = np.where(unknown, 0, gpus)  # whoever cannot be seen may hold them
            target = self._within(free_for_all, order, target, current, current + draining)
        target = self._keep_last_ready(target, ready)
        self._last[...] = target
        admission = np.where(np.isnan(decision.admission), state.classes.admission, decision.admission)
        admission = np.where(np.isnan(admission), NEVER_REFUSE, admission)
        return ScalingDecision(
            target_replicas=target,
            max_batch_size=np.clip(decision.max_batch_size, 1, spec.batch_limits),
            admission=np.maximum(admission, 0.0),
            max_in_flight=decision.max_in_flight,
            selectivity=decision.selectivity,
        )

    def within_budget(self, target: IntArray, current: IntArray, held: IntArray) -> IntArray:
        """Cut growth to what ``held`` replicas leave of the GPU budget, if there is one; nothing shrinks.

        Args:
            target: shape (..., num_pools).
            current: replicas asked for now, same shape.
            held: replicas that have their GPUs whatever becomes of the growth, same shape.
        """
        if self.spec.gpu_budget is None:
            return target
        return self._within(self.spec.gpu_budget, self._pool_order, target, current, held)

    def affordable(self, replicas: IntArray) -> IntArray:
        """So many replicas, or what the GPUs hold of them: growth above the pools' minima is cut as in `clip`.

        Args:
            replicas: shape (..., num_pools), within the pools' bounds.
        """
        least = np.broadcast_to(self.spec.min_replicas, replicas.shape)
        held = self.within_budget(replicas, least, least)
        for pools, gpus in self.spec.gpu_groups:
            held = self._within(gpus, [p for p in self._pool_order if p in pools], held, least, least)
        return held

    def _within(
        self, num_gpus: int | IntArray, order: list[int], target: IntArray, current: IntArray, held: IntArray
    ) -> IntArray:
        """Cut the growth of some pools, the first served first, to the GPUs that ``held`` replicas leave of so many."""
        gpus = self.spec.gpus_per_replica
        target = target.copy()
        left = num_gpus - (gpus * held)[..., order].sum(axis=-1)
        for p in order:
            kept = np.minimum(target[..., p], current[..., p])
            grown = np.minimum(target[..., p] - kept, np.maximum(left, 0) // gpus[p])
            target[..., p] = kept + grown
            left = left - grown * gpus[p]
        return target

    def _keep_last_ready(self, target: IntArray, ready: IntArray) -> IntArray:
        target = target.copy()
        for pools in self._pools_serving:
            ready_here = ready[..., pools]
            kept = np.minimum(target[..., pools], ready_here).sum(axis=-1)
            endangered = (ready_here.sum(axis=-1) > 0) & (kept < 1)
            keeper = np.asarray(pools)[ready_here.argmax(axis=-1)]
            for p in pools:
                rescue = endangered & (keeper == p)
                target[..., p] = np.where(rescue, np.maximum(target[..., p], 1), target[..., p])
        return target


def _whole(replicas: FloatArray) -> IntArray:
    """Replicas as integers; 0 where they are missing."""
    return np.where(np.isnan(replicas), 0.0, replicas).astype(np.int64)
