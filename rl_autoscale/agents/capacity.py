"""How many requests per second one replica can serve within its SLOs, from the latency profile alone.

At a steady rate and a batch of B decoding requests with mean prompt p and mean output o, an iteration that generates B
tokens also has to compute the prompts of the B / o requests that replace those that finish:

    T(B)    = iteration time with B decodes at mean context p + o / 2 and B p / o prompt tokens
    rate(B) = B / (o T(B)) requests per second
    ITL     = T(B)
    TTFT    = T(B) x (1/2 + iterations that the prompt needs beside the decodes)

The answer is the largest rate over batches that fit the token budget and the KV cache and keep both latencies. Queueing
is not in it: that is what a planner's margin is for. A prefill pool computes full chunks of prompts whatever
the SLOs; a decode pool computes none, and only ITL is asked of it.

Source: the aggregated mode of NVIDIA Dynamo's planner (``find_best_engine_agg_rps``: best engine rate under a TTFT and
an ITL SLA at the mean lengths); the steady-state balance above stands in for its regression.
"""

from __future__ import annotations

import numpy as np

from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS


def replica_requests_per_s(
    pool: PoolSpec,
    *,
    prompt_tokens: float,
    output_tokens: float,
    ttft_slo_s: float,
    itl_slo_s: float,
    strict: bool = False,
) -> float:
    """The largest steady rate of one replica within both SLOs.

    Args:
        pool: profile, token budget, KV blocks and batch limit.
        prompt_tokens: mean, > 0.
        output_tokens: mean, >= 1.
        ttft_slo_s: of the mean request without queueing.
        itl_slo_s: of the iteration.
        strict: 0 where no batch keeps the SLOs.

    Returns:
        Requests per second; where no batch keeps the SLOs, the rate of the batch that exceeds them least, or 0.
    """
    hardware, budget = pool.hardware, pool.token_budget
    if pool.role == "prefill":
        return 1.0 / (prompt_tokens * hardware.prefill_s_per_token(max(round(prompt_tokens), 1)))
    batch = np.arange(1, pool.batch_limit + 1, dtype=np.float64)
    new_prompts = batch / output_tokens * (pool.role != "decode")
    fresh = new_prompts * prompt_tokens
    beside_prompts = np.minimum(new_prompts, 1.0)  # share of the iterations
    decode_context = hardware.decode_context_s + hardware.mixed_context_s * beside_prompts
    decode_seq = hardware.decode_seq_s + hardware.mixed_seq_s * beside_prompts
    iteration_s = (
        hardware.token_time_s(batch + fresh)
        + hardware.host_s
        + decode_context * batch * (prompt_tokens + output_tokens / 2.0)
        + decode_seq * batch
        + hardware.prefill_pair_s * new_prompts * prompt_tokens**2 / 2.0
        + hardware.prefill_seq_s * new_prompts
    )
    ttft_s = iteration_s * (0.5 + np.ceil(prompt_tokens / np.maximum(budget - batch, 1.0)))
    fits = (batch + fresh <= budget) & (
        batch * (prompt_tokens + output_tokens) <= pool.num_kv_blocks * BLOCK_SIZE_TOKENS
    )
    fits[0] = True  # one request at a time is always possible, if slowly
    late = ttft_s / ttft_slo_s if pool.role != "decode" else np.zeros(len(batch))
    excess = np.maximum(np.maximum(iteration_s / itl_slo_s, late), 1.0)
    excess = np.where(fits, excess, np.inf)
    if strict and excess.min() > 1.0:
        return 0.0
    best = excess <= excess.min() * (1.0 + 1e-12)
    return float((batch / (output_tokens * iteration_s))[best].max())
