"""One replica that serves a recorded workload: on the compiled engine, or on the reference with measured times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.profile import LatencyProfile
from rl_autoscale.fleet.spec import FleetSpec, ServiceClass
from rl_autoscale.sim.fleet import FleetBatch
from rl_autoscale.sim.layout import FloatArray, IntArray, RecordArray
from rl_autoscale.sim.reference import ReferenceFleet
from rl_autoscale.sim.reference.books import PoolBooks
from rl_autoscale.sim.reference.scheduler import Scheduler
from rl_autoscale.workload.trace import Workload

IterationTime = Callable[[Sequence[tuple[int, int]], int, float], float]
"""Seconds of an iteration from its (new, computed) prompt chunks, its decode sequences and their total context."""

MakeScheduler = Callable[[PoolSpec, PoolBooks], Scheduler]
"""Another engine's scheduler from a pool and its books."""

_NO_PROMISE_S = 1e9
_CLASS = ServiceClass(name="all", ttft_slo_s=_NO_PROMISE_S, tpot_slo_s=_NO_PROMISE_S, queue_limit=10**9)


class MeasuredHardware(LatencyProfile):
    """A profile whose iteration times are looked up instead of fitted; only the reference can run it.

    The compiled engine needs the fitted form, because it leaps over iterations in closed form.
    """

    _iteration_time: IterationTime

    @classmethod
    def of(cls, profile: LatencyProfile, iteration_time: IterationTime) -> MeasuredHardware:
        """The hardware of a profile with other iteration times."""
        hardware = cls(**profile.model_dump())
        object.__setattr__(hardware, "_iteration_time", iteration_time)
        return hardware

    def iteration_s(
        self,
        *,
        num_decode: int = 0,
        decode_context_tokens: float = 0.0,
        num_drafts: int = 0,
        chunks: tuple[tuple[int, int], ...] = (),
    ) -> float:
        """Look one iteration up; arguments as in `LatencyProfile.iteration_s`."""
        assert num_drafts == 0, "drafts were not measured"
        return self._iteration_time(chunks, num_decode, decode_context_tokens)


def one_replica(
    hardware: LatencyProfile,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_blocks: int,
    prefix_caching: bool = False,
) -> FleetSpec:
    """A fleet of one replica of that hardware, with no promise that could drop a request."""
    pool = PoolSpec(
        name="replica",
        profile=_ANY_PROFILE,
        min_replicas=1,
        max_replicas=1,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_blocks=kv_blocks,
        prefix_caching=prefix_caching,
    )
    # A pool names its profile; one that is in no file takes the place of what the name resolves to.
    return FleetSpec(pools=(pool.model_copy(update={"hardware": hardware}),), classes=(_CLASS,))


_ANY_PROFILE = "llama-3.1-8b_a100_tp1"


def recorded_workload(arrival_s: FloatArray, prompt_tokens: IntArray, output_tokens: IntArray) -> Workload:
    """Requests of one class, as recorded; shapes (num_requests,), arrivals in order."""
    classes = np.zeros(len(arrival_s), dtype=np.int16)
    prompts, outputs = prompt_tokens.astype(np.int32), output_tokens.astype(np.int32)
    return Workload(arrival_s, prompts, outputs, classes, ("all",), float(arrival_s[-1]) + 1.0)


def run_compiled(spec: FleetSpec, workload: Workload) -> RecordArray:
    """REQUEST records of the compiled engine, run until every request has ended."""
    batch = FleetBatch(spec)
    batch.load(0, workload, seed=0)
    batch.run(0)
    return batch.requests()


def run_reference(spec: FleetSpec, workload: Workload, make_scheduler: MakeScheduler | None = None) -> RecordArray:
    """REQUEST records of the reference, run until every request has ended.

    Args:
        spec: one replica, see `one_replica`.
        workload: its traffic.
        make_scheduler: another engine's scheduler in the place of vLLM V1's.
    """
    fleet = ReferenceFleet(spec, workload, drain_limit_s=_NO_PROMISE_S)
    if make_scheduler is not None:
        for replica in fleet.pools[0].replicas():
            replica.scheduler = make_scheduler(spec.pools[0], fleet.pools[0].books)
    while fleet.advance():
        pass
    return fleet.request_records()
