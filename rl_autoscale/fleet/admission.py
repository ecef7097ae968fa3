"""How long a new request will wait for its first token: the estimate behind early refusal, in simulation and live.

The gateway knows what it sent where and which streams have begun, so it knows the tokens ahead of a request on the
replica the router would choose, and the requests ahead of it in its own queue. From these and the latency profile:

    time to first token ~ wait in the gateway's queue                  (requests ahead) x residence / (requests in flight)
                        + half an iteration in progress
                        + the iterations that prefill the tokens ahead and its own prompt beside the running decodes

A request is refused at arrival when this exceeds ``admission * ttft_slo_s`` (fleet/state.py: ScalingDecision.admission).
It is worth more than any scaling rule (docs/results.md). One compiled copy serves the simulator and the gateway.
"""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import njit
from rl_autoscale.fleet.state import FloatArray


@njit
def estimate_queue_wait_s(requests_ahead: int, in_flight: int, mean_residence_s: float) -> float:
    """Wait in the gateway's queue when every replica is at its batch cap.

    By Little's law the fleet finishes ``in_flight / mean_residence_s`` requests per second while full.

    Args:
        requests_ahead: requests of equal or higher priority in the queue.
        in_flight: requests dispatched and unfinished on the replicas that may serve it.
        mean_residence_s: recent mean of dispatch to last token.
    """
    return (requests_ahead + 1) * mean_residence_s / max(in_flight, 1)


@njit
def estimate_prefill_wait_s(
    prompt_tokens: int,
    pending_tokens: int,
    num_decoding: int,
    decoding_tokens: int,
    token_budget: int,
    token_time_table_s: FloatArray,
    attention_coefficients_s: FloatArray,
) -> float:
    """Time from dispatch to first token on one replica.

    Args:
        prompt_tokens: the request's own prompt.
        pending_tokens: prompt tokens dispatched to the replica whose first token has not been seen.
        num_decoding: its streams that have begun.
        decoding_tokens: their prompt tokens (what they generated since is neglected).
        token_budget: ``max_num_batched_tokens``.
        token_time_table_s: shape (token_budget + 1,), seconds of the linear part by new tokens.
        attention_coefficients_s: shape (5,), see LatencyProfile.attention_coefficients_s.
    """
    room = max(token_budget - num_decoding, 1)
    ahead = pending_tokens + prompt_tokens
    num_iterations = math.ceil(ahead / room)
    last_tokens = min(num_decoding + ahead - (num_iterations - 1) * room, token_budget)
    per_iteration_s = attention_coefficients_s[0] * decoding_tokens + attention_coefficients_s[1] * num_decoding
    in_progress_s = token_time_table_s[min(num_decoding + min(pending_tokens, room), token_budget)] + per_iteration_s
    busy = num_decoding > 0 or pending_tokens > 0
    return (
        (0.5 * in_progress_s if busy else 0.0)
        + (num_iterations - 1) * token_time_table_s[token_budget]
        + token_time_table_s[last_tokens]
        + num_iterations * (per_iteration_s + attention_coefficients_s[4])
        + attention_coefficients_s[2] * 0.5 * prompt_tokens * ahead
    )
