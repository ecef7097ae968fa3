"""What the gateway expects a request's time to first token to be; the formulas are those of fleet/admission.py."""

from __future__ import annotations

from rl_autoscale.fleet.admission import estimate_prefill_wait_s, estimate_queue_wait_s
from rl_autoscale.sim.reference.pool import Pool
from rl_autoscale.sim.reference.replica import Replica
from rl_autoscale.sim.reference.request import Request


def estimate_ttft_s(request: Request, replica: Replica | None, pools: list[Pool], requests_ahead: int) -> float:
    """Predict the time to first token of a request that arrives now.

    Args:
        request: the newcomer.
        replica: where it would be sent now; None when it would be held.
        pools: those that may serve it, preferred first.
        requests_ahead: requests in the gateway's queues that are served before it.
    """
    if replica is not None:
        return _prefill_wait_s(request, replica.pool, replica.pending_prompt_tokens, replica.streams)
    return _queue_wait_s(pools, requests_ahead) + _prefill_wait_s(request, pools[0], 0, [])


def _queue_wait_s(pools: list[Pool], requests_ahead: int) -> float:
    """Wait for a place: by Little's law while replicas are ready, else the start-up time that the spec promises."""
    ready = [pool for pool in pools if pool.ready]
    if not ready:
        return pools[0].spec.startup_mean_s
    in_flight = sum(len(pool.in_flight) for pool in pools)
    return estimate_queue_wait_s(requests_ahead, in_flight, max(pool.mean_residence_s for pool in ready))


def _prefill_wait_s(request: Request, pool: Pool, pending_prompt_tokens: int, streams: list[Request]) -> float:
    return estimate_prefill_wait_s(
        request.prompt_tokens,
        pending_prompt_tokens,
        len(streams),
        sum(stream.prompt_tokens for stream in streams),
        pool.spec.token_budget,
        pool.token_time_table_s,
        pool.spec.hardware.attention_coefficients_s,
    )
