"""Chiron's local loop: the batch cap of a pool from latency and throughput backpressure.

Our rebuild of Chiron (Patke et al., arXiv 2501.08090v1, section 4.1, Algorithm 1); its code is not public. What is the
paper's and what is ours:

    LBP = ITL / ITL SLO                                             two rebuilds of the paper agree
    TBP = throughput of the last tick / throughput of this tick     two rebuilds agree
    BP  = max(LBP, TBP)                                             two rebuilds agree
    BP <  1:  B <- alpha * B / BP + (1 - alpha) * B, alpha = 0.5    one rebuild; another has B + alpha / BP
    BP >= 1:  B <- B / 2                                            two rebuilds agree

Ours: one B per *pool*, from the pool's mean ITL and its generated tokens per second and ready replica (the paper: one
per instance); B starts at 64 and stays in [1, max_num_seqs]; it is enforced where requests are dispatched, because
vLLM cannot change max_num_seqs at run time; a tick without tokens keeps B, and one after a change of ready replicas
has no TBP, because a new replica starts empty. The robust form adds

- a gate: TBP counts only if it can show what B did to throughput. B must bind in both ticks (else a drop in arrivals
  reads as lost throughput) and must not have been cut in between (a smaller batch gives less throughput: cut follows
  cut, down to B = 1);
- smoothing of both signals, begun anew after a cut;
- a band around TBP = 1, without which a saturated pool halves its batch on every other tick from noise alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FleetState, FloatArray

BoolArray = npt.NDArray[np.bool_]

ALPHA = 0.5
"""Smoothing of growth; the paper's by both rebuilds."""
CUT = 0.5
"""Multiplicative decrease; both rebuilds."""
LEAST_BACKPRESSURE = 0.05
"""Guard of the division; ours. One tick grows B by at most alpha / 0.05 + (1 - alpha) = 10.5 times."""
BINDING_FRACTION = 0.9
"""B binds when the pool's requests in flight reach this share of ready * B; ours."""


@dataclass(frozen=True, slots=True)
class LocalForm:
    """How literally Algorithm 1 is taken.

    Attributes:
        gated: leave TBP out unless B was binding in the previous tick and still is, and was not cut.
        itl_weight: of the newest ITL in its average; 1 is the plain mean over the tick.
        throughput_weight: of the newest throughput in its average; 1 compares single ticks, 0.5 about three of them.
        tbp_band: TBP in [1, 1 + band) holds B instead of halving it.
    """

    gated: bool
    itl_weight: float
    throughput_weight: float
    tbp_band: float


LITERAL_FORM = LocalForm(gated=False, itl_weight=1.0, throughput_weight=1.0, tbp_band=0.0)
ROBUST_FORM = LocalForm(gated=True, itl_weight=0.5, throughput_weight=0.5, tbp_band=0.05)


def next_batch_cap(batch_cap: float, lbp: float, tbp: float, *, tbp_band: float = 0.0) -> float:
    """One step of Algorithm 1, before the clamp.

    Args:
        batch_cap: B now.
        lbp: latency backpressure; NaN leaves it out.
        tbp: throughput backpressure; NaN leaves it out (1 would stop all growth).
        tbp_band: see `LocalForm`.
    """
    if np.isnan(lbp) and np.isnan(tbp):
        return batch_cap
    if lbp >= 1.0 or tbp >= 1.0 + tbp_band:
        return batch_cap * CUT
    backpressure = max(float(np.nanmax([lbp, tbp])), LEAST_BACKPRESSURE)
    if backpressure >= 1.0:
        return batch_cap
    return ALPHA * (batch_cap / backpressure) + (1.0 - ALPHA) * batch_cap


def pool_itl_slo_s(spec: FleetSpec, state: FleetState) -> FloatArray:
    """The tightest ITL promised to the work now in each pool, shape (num_pools,); inf for a pool that serves no class.

    A pool that runs both kinds keeps the smaller SLO; a kind or class known to be absent does not count. When nothing
    is in flight, or nothing is known, every class the pool may serve counts.
    """
    slo = np.full(len(spec.pools), np.inf)
    for pool in range(len(spec.pools)):
        served = [c for c in range(len(spec.classes)) if pool in spec.pools_serving(c)]
        interactive = state.pools.in_flight_interactive[pool]
        batch = state.pools.in_flight[pool] - interactive
        kind_count = {"interactive": interactive, "batch": batch}
        present = [c for c in served if kind_count[spec.classes[c].kind] != 0 and state.classes.in_flight[c] != 0]
        slo[pool] = min((spec.classes[c].tpot_slo_s for c in present or served), default=np.inf)
    return slo


def full_pools(state: FleetState, batch_cap: FloatArray) -> BoolArray:
    """Where (nearly) as many requests are in flight as B allows; False where that is missing."""
    room = state.pools.ready * batch_cap
    return np.asarray((state.pools.in_flight >= BINDING_FRACTION * room) & (room > 0))


def binding_pools(spec: FleetSpec, state: FleetState, batch_cap: FloatArray) -> BoolArray:
    """Where B limits what runs: the pool is full, or the gateway holds a queue it could serve."""
    binding = full_pools(state, batch_cap)
    for class_index, queued in enumerate(state.classes.queue_length):
        if queued > 0:
            binding[list(spec.pools_serving(class_index))] = True
    return binding


class LocalLoop:
    """The local loop of every pool, with its memory.

    Args:
        form: literal or robust.
        batch_max: shape (num_pools,), the largest B.
        initial_batch: B before the first tick.
    """

    def __init__(self, form: LocalForm, batch_max: FloatArray, initial_batch: float) -> None:
        self._form = form
        self._batch_max = batch_max
        self.batch_cap: FloatArray = np.clip(np.full(len(batch_max), float(initial_batch)), 1.0, batch_max)
        self._itl_s = np.full(len(batch_max), np.nan)
        self._throughput = np.full(len(batch_max), np.nan)
        self._ready = np.full(len(batch_max), np.nan)
        self._was_binding = np.zeros(len(batch_max), dtype=np.bool_)
        self._was_cut = np.zeros(len(batch_max), dtype=np.bool_)

    def step(self, spec: FleetSpec, state: FleetState, readable: BoolArray) -> FloatArray:
        """Take in one tick and return B, shape (num_pools,), not rounded. An unreadable pool keeps its B."""
        form, slo_s = self._form, pool_itl_slo_s(spec, state)
        with np.errstate(divide="ignore", invalid="ignore"):
            throughput = state.pools.generation_tokens_per_s / state.pools.ready
        throughput = np.where(np.isfinite(throughput) & (throughput > 0), throughput, np.nan)
        itl_s = _smooth(self._itl_s, state.pools.itl_s, form.itl_weight)
        binding = binding_pools(spec, state, self.batch_cap)
        comparable = state.pools.ready == self._ready
        if form.gated:
            comparable &= binding & self._was_binding & ~self._was_cut
        before = np.where(comparable, self._throughput, np.nan)
        smooth = _smooth(before, throughput, form.throughput_weight)
        tbp = before / smooth
        old_cap = self.batch_cap.copy()
        for pool in np.flatnonzero(readable):
            grown = next_batch_cap(self.batch_cap[pool], itl_s[pool] / slo_s[pool], tbp[pool], tbp_band=form.tbp_band)
            self.batch_cap[pool] = np.clip(grown, 1.0, self._batch_max[pool])
        self._was_binding = binding & readable
        self._was_cut = self.batch_cap < old_cap
        self._ready = np.where(readable, state.pools.ready, np.nan)
        self._throughput = np.where(readable, smooth, np.nan)
        self._itl_s = np.where(readable, itl_s, self._itl_s)
        return self.batch_cap.copy()


def _smooth(average: FloatArray, newest: FloatArray, weight: float) -> FloatArray:
    """An exponential average that starts at its first value and is NaN in a tick without one."""
    return np.asarray(np.where(np.isnan(average), newest, average + weight * (newest - average)))
