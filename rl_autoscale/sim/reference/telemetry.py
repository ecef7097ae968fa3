"""What a decision reads: the fleet's present and the books' change over the window since the last look."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np

from rl_autoscale.fleet.state import ClassTelemetry, PoolTelemetry, StageTelemetry
from rl_autoscale.sim.layout import TPOT_EDGES_S, TTFT_EDGES_S, FloatArray
from rl_autoscale.sim.reference.books import ClassBooks, PoolBooks
from rl_autoscale.sim.reference.gateway import Gateway
from rl_autoscale.sim.reference.pool import Pool
from rl_autoscale.sim.reference.replica import State


def histogram_quantile(values: Sequence[float], edges: FloatArray, share: float) -> float:
    """A quantile as Prometheus gives it: linear inside its bucket, the last edge beyond it, NaN without values."""
    if not values:
        return math.nan
    rank = share * len(values)
    low, below = 0.0, 0
    for edge in edges:
        up_to = sum(value <= edge for value in values)
        if up_to >= rank:
            return float(low + (edge - low) * (rank - below) / (up_to - below))
        low, below = float(edge), up_to
    return float(edges[-1])


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan


class Telemetry:
    """Looks at pools and gateway; remembers the books as of the last look.

    Args:
        gateway: with its pools.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._last_look_s = 0.0
        self._last_pool_books = [copy.deepcopy(pool.books) for pool in gateway.pools]
        self._last_class_books = [copy.deepcopy(books) for books in gateway.books]
        self.look(age_s=0.0)

    def look(self, *, age_s: float) -> None:
        """Take a new look now, for a decision that will be taken ``age_s`` later."""
        gateway = self._gateway
        now_s = gateway.clock.now
        window_s = now_s - self._last_look_s
        per_s = 1.0 / window_s if window_s > 0.0 else math.nan
        gateway.drop_all_impatient()
        self.pools = PoolTelemetry(
            **_columns(
                [
                    _pool_row(pool, last, now_s, per_s) | {"age_s": age_s}
                    for pool, last in zip(gateway.pools, self._last_pool_books, strict=True)
                ]
            )
        )
        self.classes = ClassTelemetry(
            **_columns(
                [
                    _class_row(gateway, c, last, now_s, per_s) | {"age_s": age_s}
                    for c, last in enumerate(self._last_class_books)
                ]
            )
        )
        self.stages = _stages(gateway, age_s)
        self._last_look_s = now_s
        self._last_pool_books = [copy.deepcopy(pool.books) for pool in gateway.pools]
        self._last_class_books = [copy.deepcopy(books) for books in gateway.books]


def _columns(rows: list[dict[str, float]]) -> dict[str, FloatArray]:
    """One array per field, shape (num_rows,)."""
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}


def _pool_row(pool: Pool, last: PoolBooks, now_s: float, per_s: float) -> dict[str, float]:
    starts = [now_s - replica.asked_s for replica in pool.replicas(State.STARTING)]
    serving = pool.replicas(State.READY, State.DRAINING)
    ready_blocks = pool.spec.num_kv_blocks * len(pool.ready)
    books = pool.books
    return {
        "ready": len(pool.ready),
        "starting": len(starts),
        "draining": len(pool.replicas(State.DRAINING)),
        "asked_for": pool.target,
        "oldest_start_age_s": max(starts, default=0.0),
        "newest_start_age_s": min(starts, default=0.0),
        "running": sum(len(replica.scheduler.running + replica.scheduler.parked) for replica in serving),
        "waiting": sum(len(replica.scheduler.waiting) for replica in serving),
        "in_flight": len(pool.in_flight),
        "in_flight_interactive": sum(request.interactive for request in pool.in_flight),
        "busy_interactive": sum(replica.num_interactive > 0 for replica in serving),
        "pending_prompt_tokens": sum(request.prompt_tokens for replica in serving for request in replica.pending),
        "kv_usage": sum(r.scheduler.used_blocks for r in pool.ready) / ready_blocks if ready_blocks else 0.0,
        "batch_cap": pool.cap,
        "itl_s": _mean(books.itl_sum_s - last.itl_sum_s, books.itl_count - last.itl_count),
        "preemptions": books.preemptions - last.preemptions,
        "evictions": books.evictions - last.evictions,
        "prompt_tokens_per_s": (books.prompt_tokens - last.prompt_tokens) * per_s,
        "generation_tokens_per_s": (books.generation_tokens - last.generation_tokens) * per_s,
    }


def _class_row(gateway: Gateway, c: int, last: ClassBooks, now_s: float, per_s: float) -> dict[str, float]:
    queue, books = gateway.queues[c], gateway.books[c]
    ttft_s = books.ttft_s[len(last.ttft_s) :]
    tpot_s = books.tpot_s[len(last.tpot_s) :]
    finished = books.finished - last.finished
    stage = gateway.postprocessor
    under_way = gateway.bridge.queue + (stage.requests if stage is not None else [])
    under_way += [request for pool in gateway.pools for request in pool.in_flight]
    in_flight = sum(request.class_index == c for request in under_way)
    return {
        "arrivals_per_s": (books.arrived - last.arrived) * per_s,
        "arrived_prompt_tokens_per_s": (books.arrived_tokens - last.arrived_tokens) * per_s,
        "queue_length": len(queue),
        "queued_prompt_tokens": sum(request.prompt_tokens for request in queue),
        "oldest_wait_s": now_s - queue[0].arrival_s if queue else 0.0,
        "in_flight": in_flight,
        "first_tokens_per_s": len(ttft_s) * per_s,
        "late_first_tokens_per_s": (books.late_first_tokens - last.late_first_tokens) * per_s,
        "ttft_mean_s": _mean(sum(ttft_s), len(ttft_s)),
        "ttft_p95_s": histogram_quantile(ttft_s, TTFT_EDGES_S, 0.95),
        "tpot_mean_s": _mean(sum(tpot_s), len(tpot_s)),
        "tpot_p95_s": histogram_quantile(tpot_s, TPOT_EDGES_S, 0.95),
        "finished_per_s": finished * per_s,
        "met_per_s": (books.met - last.met) * per_s,
        "slow_answers_per_s": (books.slow_answers - last.slow_answers) * per_s,
        "mean_output_tokens": _mean(books.output_tokens - last.output_tokens, finished),
        "refused_per_s": (books.refused - last.refused) * per_s,
        "dropped_per_s": (books.dropped - last.dropped) * per_s,
        "admission": gateway.admission[c],
    }


def _stages(gateway: Gateway, age_s: float) -> StageTelemetry | None:
    if not gateway.spec.has_stages:
        return None
    bridge, stage = gateway.bridge, gateway.postprocessor
    return StageTelemetry(
        held_prompts=np.array(float(sum(len(replica.held) for pool in gateway.pools for replica in pool.replicas()))),
        transfers=np.array(float(len(bridge.sending))),
        bridge_queue=np.array(float(len(bridge.queue))),
        bridge_used=np.array(float(bridge.num_used)),
        postprocess_running=np.array(float(0 if stage is None else len(stage.running))),
        postprocess_queue=np.array(float(0 if stage is None else len(stage.queue))),
        held_streams=np.array(float(0 if stage is None else len(stage.parked))),
        age_s=np.array(age_s),
    )
