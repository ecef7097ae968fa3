"""From a policy's output in [-1, 1] to a `ScalingDecision`.

Relative to measured demand, so that 0 already scales sensibly.

| action | 0 means | range |
|---|---|---|
| pool.headroom | replicas = 1.4 x demand (30 s average), rounded up | 0.5 x to 4 x demand: 1.5 octaves each way |
| pool.floor | but no fewer than 0.5 x the peak of late (envs/observation.py) | 0 to 1 x the peak: (1 + a) / 2 |
| pool.batch_cap | half of the engine's max_num_seqs per replica | 1/4 to 1 of it, geometric: 4 ** ((a - 1) / 2) |
| class.admission | refuse what should miss its TTFT SLO | strictness 2 ** (2 a); above 0.95 nothing is refused |

A pool that is no class's first choice (see fleet/demand.py) has no demand of its own: it gets what the pools beside it
may not hold, and stays at its minimum otherwise. Without any demand measured yet, what is asked for now is held. The
floor is what a policy keeps ready for a burst that comes back sooner than a replica starts: no multiple of a demand
near zero does.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rl_autoscale.envs.schema import CLASS_ACTIONS, POOL_ACTIONS
from rl_autoscale.fleet.demand import overflow
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import NEVER_REFUSE, FleetState, FloatArray, ScalingDecision

NEUTRAL_HEADROOM = 1.4
HEADROOM_OCTAVES = 1.5
BATCH_CAP_FLOOR = 0.25
ADMISSION_OCTAVES = 2.0
OPEN_ADMISSION = 0.95


class ActionDecoder:
    """Decodes actions for one fleet or a batch of fleets.

    Args:
        spec: the fleet.
        refuse: whether early refusal is the policy's to use; without it admission is always open.
    """

    def __init__(self, spec: FleetSpec, *, refuse: bool = True) -> None:
        self.spec = spec
        self.refuse = refuse
        self.num_actions = len(spec.pools) * len(POOL_ACTIONS) + len(spec.classes) * len(CLASS_ACTIONS)

    def decode(
        self, action: npt.NDArray[np.floating], base_replicas: FloatArray, peak_replicas: FloatArray, state: FleetState
    ) -> ScalingDecision:
        """Turn actions into absolute targets.

        Args:
            action: shape (..., num_actions); values outside [-1, 1] are clipped.
            base_replicas: `ObservationEncoder.base_replicas`, shape (..., num_pools).
            peak_replicas: `ObservationEncoder.peak_replicas`, shape (..., num_pools).
            state: the observation, for what is asked for now.
        """
        spec = self.spec
        num_pools = len(spec.pools)
        action = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        num_pool_actions = num_pools * len(POOL_ACTIONS)
        per_pool = action[..., :num_pool_actions].reshape(*action.shape[:-1], num_pools, len(POOL_ACTIONS))
        headroom_action, floor_action, cap_action = np.moveaxis(per_pool, -1, 0)
        headroom = NEUTRAL_HEADROOM * 2.0 ** (HEADROOM_OCTAVES * headroom_action)
        base = np.where(base_replicas > 0, base_replicas, 0.0)
        floor = 0.5 * (1.0 + floor_action) * peak_replicas
        wanted = np.ceil(overflow(spec, np.maximum(headroom * base, floor)) - 1e-9)
        held = np.fmax(state.pools.asked_for, 0.0)
        unmeasured = base.sum(axis=-1, keepdims=True) <= 0
        target = np.where(unmeasured, held, wanted)
        cap = np.round(spec.batch_limits * BATCH_CAP_FLOOR ** ((1.0 - cap_action) / 2.0))
        refusal = action[..., num_pool_actions:]
        admission = np.where(refusal >= OPEN_ADMISSION, NEVER_REFUSE, 2.0 ** (ADMISSION_OCTAVES * refusal))
        if not self.refuse:
            admission = np.full_like(refusal, NEVER_REFUSE)
        return ScalingDecision(
            target_replicas=np.clip(target, spec.min_replicas, spec.max_replicas).astype(np.int64),
            max_batch_size=np.maximum(cap, 1).astype(np.int64),
            admission=admission,
        )
