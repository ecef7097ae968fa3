"""The token budget of an iteration, chosen from the time that may pass between two tokens (Sarathi-Serve)."""

from __future__ import annotations

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import LatencyProfile

TILE_TOKENS = 128
"""Budgets are multiples of this: matrix kernels compute whole tiles."""

BUSY_DECODES, BUSY_CONTEXT_TOKENS = 32, 4096
"""The decode batch beside which a prompt is computed: the one that Sarathi-Serve's SLOs are stated for."""


def token_budget_for(profile: LatencyProfile, tbt_slo_s: float) -> int:
    """The largest token budget with which an iteration stays within the time between tokens that is promised.

    The iteration has a busy decode batch (32 sequences of 4096 tokens), and the rest of its budget is the chunk of a
    prompt of which as much is computed already.

    Args:
        profile: model and hardware.
        tbt_slo_s: longest time between two tokens of a request.

    Returns:
        Tokens, a multiple of 128.

    Raises:
        SpecError: not even the smallest budget keeps the promise.

    Reference: Agrawal et al., OSDI 2024, section 4.3 (one-off profiling of mixed batches; tile alignment).
    """
    if _iteration_s(profile, TILE_TOKENS) > tbt_slo_s:
        raise SpecError(
            f"tbt_slo_s={tbt_slo_s} is out of reach on {profile.name}: {TILE_TOKENS} tokens beside a busy decode batch "
            f"take {_iteration_s(profile, TILE_TOKENS):.4f} s; relax the SLO or use faster hardware"
        )
    fits, too_many = 1, 2
    while _iteration_s(profile, too_many * TILE_TOKENS) <= tbt_slo_s and too_many < 1 << 20:
        fits, too_many = too_many, 2 * too_many
    while fits + 1 < too_many:
        middle = (fits + too_many) // 2
        if _iteration_s(profile, middle * TILE_TOKENS) <= tbt_slo_s:
            fits = middle
        else:
            too_many = middle
    return fits * TILE_TOKENS


def _iteration_s(profile: LatencyProfile, budget_tokens: int) -> float:
    return profile.iteration_s(
        num_decode=BUSY_DECODES,
        decode_context_tokens=BUSY_DECODES * BUSY_CONTEXT_TOKENS,
        chunks=((budget_tokens - BUSY_DECODES, BUSY_CONTEXT_TOKENS),),
    )
