"""From a policy's output in [-1, 1] to a `ScalingDecision`.

Relative to measured demand, so that 0 already scales sensibly.

| action | 0 means | range |
|---|---|---|
| pool.headroom | replicas = 1.4 x demand (30 s average), rounded up | 0.5 x to 4 x demand: 1.5 octaves each way |
| pool.floor | but no fewer than the peak of late (envs/observation.py) | 0 to 2 x the peak: 1 + a |
| pool.batch_cap | as many as take 3/4 of their TPOT SLO | 1/4 x to 4 x: 4 ** a; at most max_num_seqs |
| class.admission | refuse what should miss its TTFT SLO | strictness 2 ** (2 a); above 0.95 nothing is refused |
| class.in_flight | at once 1/8 of what ready replicas take | 1/64 to 1: 64 ** ((a - 1) / 2); above 0.95 no limit |

A batch pool's work may wait, so its headroom multiplies what its queue needs to start in half of the time left
(fleet/demand.py: `backlog_replicas`), and its floor what arrives (30 s average): a floor of -1 leaves all until
its deadline asks for it. Its replicas are rounded to the nearest: a queue that is not worth a replica yet waits, the
nearer its deadline the more it needs, and when a replica could only just start in time it gets one.

A pool that is no class's first choice (see fleet/demand.py) has no demand of its own: it gets what the pools beside it
may not hold, keeps what it has while those wait for replicas to start, and stays at its minimum otherwise. Without any
demand measured yet, what is asked for now is held. The floor is what a policy keeps ready for a burst that comes back
sooner than a replica starts: no multiple of a demand near zero does.

The batch cap is relative to how many requests a replica may have in flight within their SLOs (fleet/in_flight.py), not
to the engine's max_num_seqs: of 256 that is 16 where prompts of 2,000 tokens have answers of 28, 143 where prompts of
1,200 have answers of 210, and 256 where chunks of prompts never stall decoding. Where one pool serves one class it is
that and no action: the law says all there is to say there, and a policy with a say in it did worse (docs/learner.md).

Where one pool serves one class strictness is relative, too, to what refusal was found to be off by of late, and the cap
is less by what that was found to be off by (fleet/corrections.py).

``class.in_flight`` is there for batch classes beside others: what of them is beyond it waits at the gateway.

Five more are no actions but constants of a policy (envs/constants.py). With *hysteresis* h a pool keeps what it has
while that is between the replicas wanted and ceil((1 + h) x them): it is asked for no less before the demand has fallen
by more than noise does. Refusal weighs requests by their work to the power of *selectivity* (fleet/admission.py). The
*cap share* multiplies the batch cap. The *found share* is of the fleet that a policy finds when it begins: it asks for
no less than that, which is forgotten as peaks are, since whoever sized it may have seen bursts that the policy has not.
Nor does it ever ask for less than *least replicas*: what the bursts of one fleet come to, which its record tells and
the last quarter of an hour does not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rl_autoscale.envs.constants import Constants, ConstantsInForce
from rl_autoscale.envs.observation import Anchors
from rl_autoscale.envs.schema import Schema, held_classes, pool_actions
from rl_autoscale.fleet.demand import StandIns, due_now, overflow
from rl_autoscale.fleet.spec import FleetSpec, IntArray
from rl_autoscale.fleet.state import NEVER_REFUSE, NO_LIMIT, FleetState, FloatArray, ScalingDecision

NEUTRAL_HEADROOM = 1.4
HEADROOM_OCTAVES = 1.5
BATCH_CAP_OCTAVES = 2.0
ADMISSION_OCTAVES = 2.0
OPEN_ADMISSION = 0.95
IN_FLIGHT_FLOOR = 1 / 64
OPEN_IN_FLIGHT = 0.95
_NEUTRAL = Constants().at(1.0)


class ActionDecoder:
    """Decodes actions for one fleet or a batch of fleets.

    Args:
        spec: the fleet.
        refuse: whether early refusal is the policy's to use; without it admission is always open.
    """

    def __init__(self, spec: FleetSpec, *, refuse: bool = True) -> None:
        self.spec = spec
        self.refuse = refuse
        self.num_actions = len(Schema.of(spec).actions)
        self._pool_actions = pool_actions(spec)
        self._held = held_classes(spec)
        self._stand_ins = StandIns(spec)
        self._unrounded = np.where([pool.role == "batch" for pool in spec.pools], 0.5, 1e-9)
        serving = [spec.pools_passed(c) for c in self._held]
        self._serves = np.array([[p in pools for p in range(len(spec.pools))] for pools in serving], dtype=np.float64)

    def decode(
        self,
        action: npt.NDArray[np.floating],
        anchors: Anchors,
        state: FleetState,
        constants: ConstantsInForce = _NEUTRAL,
    ) -> ScalingDecision:
        """Turn actions into absolute targets.

        Args:
            action: shape (..., num_actions); values outside [-1, 1] are clipped.
            anchors: `ObservationEncoder.anchors`.
            state: the observation, for what is asked for now.
            constants: of the policy, shape (...) or ().
        """
        spec = self.spec
        hysteresis, selectivity, cap_share, found_share, least_replicas = (
            constant[..., None] for constant in constants
        )
        num_pools = len(spec.pools)
        action = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        num_pool_actions = num_pools * len(self._pool_actions)
        per_pool = action[..., :num_pool_actions].reshape(*action.shape[:-1], num_pools, len(self._pool_actions))
        of_pools = dict(zip(self._pool_actions, np.moveaxis(per_pool, -1, 0), strict=True))
        headroom = NEUTRAL_HEADROOM * 2.0 ** (HEADROOM_OCTAVES * of_pools["headroom"])
        base = np.where(anchors.replicas > 0, anchors.replicas, 0.0)
        floor = (1.0 + of_pools["floor"]) * anchors.peak
        kept = np.maximum(found_share * anchors.found, least_replicas)
        asked = np.maximum(overflow(spec, np.maximum(headroom * base, floor)), kept)
        held = np.fmax(state.pools.asked_for, 0.0)
        least, most = (np.ceil(share * asked - self._unrounded) for share in (1.0, 1.0 + hysteresis))
        wanted = np.clip(held, least, most)
        unmeasured = np.isnan(anchors.replicas).all(axis=-1, keepdims=True)
        target = np.maximum(np.where(unmeasured, held, wanted), due_now(spec, state))
        target = self._stand_ins.keep(target, state)
        cap = np.round(cap_share * anchors.in_flight * 2.0 ** (BATCH_CAP_OCTAVES * of_pools.get("batch_cap", 0.0)))
        refusal, in_flight = np.split(action[..., num_pool_actions:], [len(spec.classes)], axis=-1)
        strictness = anchors.admission * 2.0 ** (ADMISSION_OCTAVES * refusal)
        admission = np.where(refusal >= OPEN_ADMISSION, NEVER_REFUSE, strictness)
        if not self.refuse:
            admission = np.full_like(refusal, NEVER_REFUSE)
        return ScalingDecision(
            target_replicas=np.clip(target, spec.min_replicas, spec.max_replicas).astype(np.int64),
            max_batch_size=np.clip(cap, 1, spec.batch_limits).astype(np.int64),
            admission=admission,
            max_in_flight=self._limits(in_flight, state) if self._held else None,
            selectivity=np.broadcast_to(selectivity, refusal.shape).copy(),
        )

    def _limits(self, action: FloatArray, state: FleetState) -> IntArray:
        """Requests in flight by class, from the actions of those that are held, shape (..., len(held)).

        What replicas take is their engines' limits, whatever the batch cap is at the moment.
        """
        places = (np.fmax(state.pools.ready, 1.0) * self.spec.batch_limits) @ self._serves.T
        share = np.round(IN_FLIGHT_FLOOR ** ((1.0 - action) / 2.0) * places).astype(np.int64)
        limits = np.full((*action.shape[:-1], len(self.spec.classes)), NO_LIMIT, dtype=np.int64)
        limits[..., self._held] = np.where(action >= OPEN_IN_FLIGHT, NO_LIMIT, np.maximum(share, 1))
        return limits
