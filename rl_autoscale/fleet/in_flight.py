"""How many requests a replica may have in flight while their tokens keep to the SLO: what a batch cap should be.

With n requests in flight an iteration decodes one token of each and computes chunks of the prompts of those that take
the place of the finished: n times prompt tokens over output tokens, at most what the token budget leaves. So it takes

    iteration_s(n) = token_time(n + chunks) + n x (what a sequence costs + what its context costs)

in the terms of `LatencyProfile`, and n is the largest (to about 1 %) whose iteration takes `SLO_SHARE` of the TPOT SLO.
Beyond a full token budget prompts wait instead, so where a full iteration is shorter than the SLO chunks never stall
decoding (Sarathi-Serve, arXiv 2403.02310, section 4), and n may be what is decoded beside one.

On an A100 with a budget of 2,048 tokens, 256 sequences and a TPOT SLO of 0.1 s n is 16 for prompts of 2,000 tokens with
answers of 28, and 143 for prompts of 1,200 with answers of 210. Waiting for the first token is not counted: what waits
does so at the gateway, from where it may still go to a replica that is starting.
"""

from __future__ import annotations

import numpy as np

from rl_autoscale.fleet.pool import PoolSpec
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.fleet.state import FloatArray

SLO_SHARE = 0.75
"""Of an SLO that is planned to be taken up: traffic is uneven. Caps of 0.8 to 1.3 times what follows are about as good
on the mean of twenty scenarios' training traffic (docs/learner.md)."""
_HALVINGS = 9
"""Of the range in which n lies, by ratio: 1 % of it is left where it goes to 256."""


class InFlight:
    """Requests in flight per replica of each pool.

    Args:
        spec: the fleet.
    """

    def __init__(self, spec: FleetSpec) -> None:
        pools, classes = spec.pools, range(len(spec.classes))
        self._limits = spec.batch_limits
        self._decodes = np.array([pool.role != "prefill" for pool in pools])
        self._computes_prompts = np.array([pool.role != "decode" for pool in pools])
        self._prefill_s = np.array([pool.hardware.prefill_s_per_token() for pool in pools])
        interactive = [item.kind == "interactive" for item in spec.classes]
        passes = [[p in spec.pools_passed(c) for c in classes] for p in range(len(pools))]
        self._passes = (np.array(passes) & interactive).astype(np.float64)
        self._ttft_slo_s = np.array([item.ttft_slo_s for item in spec.classes])
        self._tpot_slo_s = np.array([item.tpot_slo_s for item in spec.classes])
        self._budget = np.array([pool.token_budget for pool in pools])
        tables = [pool.hardware.token_time_table_s(int(self._budget.max())) for pool in pools]
        self._token_time_s, self._pool = np.array(tables), np.arange(len(pools))
        self._seq_s, self._context_s = np.array([_decode_s(pool) for pool in pools]).T
        self._verified = np.array([float(pool.verified_tokens) for pool in pools])
        self._kept = np.array([float(pool.tokens_per_iteration) for pool in pools])

    def per_replica(
        self, arrivals_per_s: FloatArray, prompt_tokens_per_s: FloatArray, output_tokens: FloatArray
    ) -> FloatArray:
        """The largest n of each pool, for the mean request of the interactive classes that pass it.

        Args:
            arrivals_per_s: shape (..., num_classes), >= 0.
            prompt_tokens_per_s: that arrive, of that shape.
            output_tokens: of a request, of that shape.

        Returns:
            Shape (..., num_pools), at least 1 and at most the engine's limit; that limit where no interactive request
            arrives. In a prefill pool what it computes in `SLO_SHARE` of the TTFT SLO.
        """
        per_s = arrivals_per_s @ self._passes.T
        known = per_s > 0

        def mean(of_class: FloatArray) -> FloatArray:
            return np.asarray(of_class @ self._passes.T / np.where(known, per_s, 1.0))

        prompt, output = mean(prompt_tokens_per_s), np.maximum(mean(arrivals_per_s * output_tokens), 1.0)
        tpot_s = mean(arrivals_per_s * self._tpot_slo_s) * self._kept
        context = prompt + output / 2.0
        seq_s = np.maximum(self._seq_s + self._context_s * context, 1e-9)  # a profile may have neither
        new_tokens = self._verified + self._computes_prompts * prompt * self._kept / output
        full_s = self._token_time_s[self._pool, self._budget] * self._computes_prompts

        def too_long(number: FloatArray) -> FloatArray:
            tokens = np.minimum(number * new_tokens, self._budget).astype(np.int64)
            return np.asarray(self._token_time_s[self._pool, tokens] + number * seq_s > SLO_SHARE * tpot_s)

        low, high = np.ones_like(prompt), np.broadcast_to(self._limits, prompt.shape).astype(np.float64)
        for _ in range(_HALVINGS):
            middle = np.sqrt(low * high)
            long = too_long(middle)
            low, high = np.where(long, low, middle), np.where(long, middle, high)
        beside_chunks = np.where(self._computes_prompts, (tpot_s - full_s) / seq_s, 0.0)
        decoded = np.maximum(high, beside_chunks)
        first_tokens = SLO_SHARE * mean(arrivals_per_s * self._ttft_slo_s) / np.maximum(prompt * self._prefill_s, 1e-9)
        number = np.where(self._decodes, decoded, first_tokens)
        return np.where(known, np.clip(number, 1.0, self._limits), self._limits)


def _decode_s(pool: PoolSpec) -> tuple[float, float]:
    """Seconds of an iteration per sequence decoded, and per token of its context; a decode pool has no chunks."""
    gpu = pool.hardware
    return (gpu.decode_seq_s, gpu.decode_context_s) if pool.role == "decode" else gpu.decode_beside_chunks_s
