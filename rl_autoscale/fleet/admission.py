"""How long a new request will wait for its first token: the estimate behind early refusal, in simulation and live.

The gateway knows what it sent where and which streams have begun, so it knows the prompt tokens ahead of a request on
the replica the router would choose, and the requests ahead of it in its own queue. From these and the latency
profile:

    time to first token ~ wait in the gateway's queue            (requests ahead) x residence / (requests in flight)
                        + wait for the prompts ahead             a clock per replica, see below
                        + its own prefill beside the running decodes

How far the prompts ahead have come inside an iteration is not visible, so each replica has a *clearing time*: when
the prompts sent to it should have their first tokens. Sending a prompt moves it on by that prompt's prefill time; a
first token that appears corrects it; once it has passed without a token, the replica is stalled, and the stall so far
is taken for the stall to come. Counting whole prompts until their token shows, without the clock, refuses four
requests wrongly for one rightly.

A request is refused at arrival when the estimate exceeds ``admission * ttft_slo_s`` (fleet/state.py:
ScalingDecision.admission). With a *selectivity* the wait in it, all but the prefill alone on a replica, counts for more
the more work the request is:

    own prefill + (work / mean work) ** selectivity x wait  >  admission x TTFT SLO
    work = prompt tokens + what the class's mean answer costs, in prompt tokens

Each request that meets its SLOs is worth the same, and what it costs is its work: where not all can be served in time,
refusing one that is four times the mean makes room for four. While there is nothing to wait for nobody is refused for
being long. How long an answer will be nobody knows, so where answers are most of the work all requests are about alike.

One compiled copy of all this serves the simulators and the gateway.
"""

from __future__ import annotations

import math

from rl_autoscale.fleet.jit import shared_njit
from rl_autoscale.fleet.state import FloatArray

SELECTIVITY = 0.5
"""Of policies that are trained here, unless told otherwise (docs/design/early-refusal.md)."""
UNKNOWN_ANSWER_TOKENS = 1000.0
"""Before answers have ended their mean is taken for this: long, so that nobody is refused for a prompt that may be the
lesser part. It counts as `MEAN_OVER` answers."""
MEAN_OVER = 256
"""Requests over which a class's mean prompt and mean answer forget."""


@shared_njit
def moved_mean(mean: float, number: int, value: int) -> float:
    """A mean of late after one more value.

    Args:
        mean: before.
        number: values so far, this one included, >= 1.
        value: this one.
    """
    return mean + (value - mean) / min(number, MEAN_OVER)


@shared_njit
def selective_ttft_s(
    expected_s: float,
    alone_s: float,
    prompt_tokens: int,
    mean_prompt_tokens: float,
    answer_work_tokens: float,
    selectivity: float,
) -> float:
    """The expected time to first token as refusal counts it.

    Args:
        expected_s: the estimate.
        alone_s: what of it is prefill of this prompt alone on a replica; all of it where that is less.
        prompt_tokens: of the request, >= 1.
        mean_prompt_tokens: of its class, of late.
        answer_work_tokens: prompt tokens that are as much work as the class's mean answer, >= 0.
        selectivity: >= 0; 0 leaves the estimate as it is.
    """
    if selectivity == 0.0:
        return expected_s
    alone_s = min(alone_s, expected_s)
    work = (prompt_tokens + answer_work_tokens) / (mean_prompt_tokens + answer_work_tokens)
    return float(alone_s + (expected_s - alone_s) * work**selectivity)


@shared_njit
def estimate_queue_wait_s(requests_ahead: int, in_flight: int, mean_residence_s: float) -> float:
    """Wait in the gateway's queue when every replica is at its batch cap.

    By Little's law the fleet finishes ``in_flight / mean_residence_s`` requests per second while full.

    Args:
        requests_ahead: requests of equal or higher priority in the queue.
        in_flight: requests dispatched and unfinished on the replicas that may serve it.
        mean_residence_s: see `known_residence_s`.
    """
    return (requests_ahead + 1) * mean_residence_s / max(in_flight, 1)


@shared_njit
def known_residence_s(
    mean_residence_s: float, num_residences: int, in_flight: int, busy_since_s: float, now_s: float
) -> float:
    """How long requests are taken to stay: their recent mean; before any has ended, as long as one has stayed by now.

    Args:
        mean_residence_s: recent mean of dispatch to last token.
        num_residences: requests that it has seen.
        in_flight: requests on the pool's replicas.
        busy_since_s: since when there has been any.
        now_s: the time.
    """
    if num_residences > 0:
        return mean_residence_s
    return now_s - busy_since_s if in_flight > 0 else 0.0


@shared_njit
def prefill_time_s(
    tokens: int,
    squared_tokens: int,
    num_decoding: int,
    decoding_tokens: int,
    token_budget: int,
    token_time_table_s: FloatArray,
    attention_coefficients_s: FloatArray,
) -> float:
    """Time in which a replica computes prompts beside its running decodes.

    Args:
        tokens: prompt tokens in total; 0 takes no time.
        squared_tokens: sum of the squares of the prompts' lengths, for attention.
        num_decoding: streams that have begun.
        decoding_tokens: their prompt tokens (what they generated since is neglected).
        token_budget: ``max_num_batched_tokens``.
        token_time_table_s: shape (token_budget + 1,), seconds of the linear part by new tokens.
        attention_coefficients_s: shape (7,), see LatencyProfile.attention_coefficients_s.
    """
    if tokens <= 0:
        return 0.0
    room = max(token_budget - num_decoding, 1)
    num_iterations = math.ceil(tokens / room)
    last_tokens = min(num_decoding + tokens - (num_iterations - 1) * room, token_budget)
    per_iteration_s = (
        (attention_coefficients_s[0] + attention_coefficients_s[5]) * decoding_tokens
        + (attention_coefficients_s[1] + attention_coefficients_s[6]) * num_decoding
        + attention_coefficients_s[4]
    )
    return float(
        (num_iterations - 1) * token_time_table_s[token_budget]
        + token_time_table_s[last_tokens]
        + num_iterations * per_iteration_s
        + attention_coefficients_s[2] * 0.5 * squared_tokens
    )


@shared_njit
def residual_iteration_s(
    num_decoding: int,
    decoding_tokens: int,
    token_budget: int,
    token_time_table_s: FloatArray,
    attention_coefficients_s: FloatArray,
) -> float:
    """What is left, on average, of the decode iteration in progress: half of it; 0 on an idle replica."""
    if num_decoding <= 0:
        return 0.0
    return 0.5 * float(
        token_time_table_s[min(num_decoding, token_budget)]
        + attention_coefficients_s[0] * decoding_tokens
        + attention_coefficients_s[1] * num_decoding
    )


@shared_njit
def wait_ahead_s(now_s: float, clearing_s: float, pending_time_s: float, residual_s: float) -> float:
    """Wait for the prompts that were sent to the replica before.

    Args:
        now_s: the time.
        clearing_s: when they should have their first tokens.
        pending_time_s: how long all of them take from their beginning; 0 when there are none.
        residual_s: see `residual_iteration_s`; what there is to wait for when no prompt is ahead.
    """
    if pending_time_s <= 0.0:
        return residual_s
    left_s = clearing_s - now_s
    return left_s if left_s >= 0.0 else min(-left_s, pending_time_s)


@shared_njit
def corrected_clearing_s(now_s: float, clearing_s: float, pending_time_s: float) -> float:
    """The clearing time after a prompt's first token has shown, or after it was taken away.

    Args:
        now_s: the time.
        clearing_s: what was expected.
        pending_time_s: how long the prompts that are left take from their beginning.
    """
    fresh_s = now_s + pending_time_s
    return fresh_s if clearing_s <= now_s else min(clearing_s, fresh_s)
