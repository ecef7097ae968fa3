"""What the gateway expects a request's time to first token to be; the formulas are those of fleet/admission.py."""

from __future__ import annotations

from collections.abc import Sequence

from rl_autoscale.fleet.admission import (
    corrected_clearing_s,
    estimate_queue_wait_s,
    known_residence_s,
    prefill_time_s,
    residual_iteration_s,
    selective_ttft_s,
    wait_ahead_s,
)
from rl_autoscale.sim.reference.books import ClassBooks
from rl_autoscale.sim.reference.pool import Pool
from rl_autoscale.sim.reference.replica import Replica
from rl_autoscale.sim.reference.request import Request


def refusal_ttft_s(
    request: Request,
    replica: Replica | None,
    pools: list[Pool],
    requests_ahead: int,
    books: ClassBooks,
    selectivity: float,
    now_s: float,
) -> float:
    """Predict the time to first token of a request that arrives now, as refusal counts it.

    Args:
        request: the newcomer.
        replica: where it would be sent now; None when it would be held.
        pools: those that may serve it, preferred first.
        requests_ahead: requests in the gateway's queues that are served before it.
        books: of its class.
        selectivity: of its class.
        now_s: the time.
    """
    alone_s = _prefill_time_s(pools[0] if replica is None else replica.pool, [request], [])
    if replica is None:
        expected_s = _queue_wait_s(pools, requests_ahead, now_s) + alone_s
    else:
        expected_s = expected_first_token_s(request, replica, now_s) - now_s
    tokens, answer = request.prompt_tokens, books.mean_answer_tokens * pools[0].spec.answer_token_work
    return float(selective_ttft_s(expected_s, alone_s, tokens, books.mean_prompt_tokens, answer, selectivity))


def expected_first_token_s(request: Request, replica: Replica, now_s: float) -> float:
    """When a request sent to the replica now should have its first token."""
    pool, streams = replica.pool, replica.streams
    residual_s = residual_iteration_s(
        len(streams),
        sum(stream.prompt_tokens for stream in streams),
        pool.spec.token_budget,
        pool.token_time_table_s,
        pool.spec.hardware.attention_coefficients_s,
    )
    ahead_s = _prefill_time_s(pool, replica.pending, streams)
    own_s = _prefill_time_s(pool, [*replica.pending, request], streams) - ahead_s
    return float(now_s + wait_ahead_s(now_s, replica.clearing_s, ahead_s, residual_s) + own_s)


def correct_clearing(replica: Replica, now_s: float) -> None:
    """A pending request has its first token, or has left: correct the replica's clearing time."""
    left_s = _prefill_time_s(replica.pool, replica.pending, replica.streams)
    replica.clearing_s = float(corrected_clearing_s(now_s, replica.clearing_s, left_s))


def _queue_wait_s(pools: list[Pool], requests_ahead: int, now_s: float) -> float:
    """Wait for a place: by Little's law while replicas are ready, else the start-up time that the spec promises."""
    ready = [pool for pool in pools if pool.ready]
    if not ready:
        return pools[0].mean_start_s
    in_flight = sum(len(pool.in_flight) for pool in pools)
    residence_s = max(
        known_residence_s(pool.mean_residence_s, pool.num_residences, len(pool.in_flight), pool.busy_since_s, now_s)
        for pool in ready
    )
    return float(estimate_queue_wait_s(requests_ahead, in_flight, residence_s))


def _prefill_time_s(pool: Pool, prompts: Sequence[Request], streams: Sequence[Request]) -> float:
    """Time in which an engine of the pool computes these prompts beside these streams."""
    return float(
        prefill_time_s(
            sum(request.prompt_tokens for request in prompts),
            sum(request.prompt_tokens**2 for request in prompts),
            len(streams),
            sum(stream.prompt_tokens for stream in streams),
            pool.spec.token_budget,
            pool.token_time_table_s,
            pool.spec.hardware.attention_coefficients_s,
        )
    )
