"""A latency profile without a measurement: every operation at the roofline of its GPU.

An operation that computes F operations on B bytes takes max(F / compute, B / bandwidth) (Williams, Waterman and
Patterson, CACM 2009; operator by operator for LLMs: Yuan et al., arXiv 2402.16363). With n new tokens in an iteration,
TP GPUs, s = 2 bytes per number, and per GPU throughout:

    linear      each weight matrix (in x out): F = 2 n in out, B = s (in out + n (in + out)); the output layer counts
                its weights only, since few tokens of an iteration need it; ``weight_bits`` below 16 move fewer bytes,
                F stays
    elementwise norms with residuals (8 hidden), rotary embedding, gate (3 intermediate): bytes alone, per token
    all-reduce  two per layer, 2 (TP - 1) / TP of n hidden s bytes over the link (a ring; Patarasuk and Yuan 2009)
    attention   F = 4 layers heads head_size per (query, key) pair; B = KV bytes of every context read

Options of attention:

    flash       the score matrix stays on the chip; keys and values come from memory once per sequence and iteration
                (Dao et al., FlashAttention, arXiv 2205.14135, section 3.1; blocks of queries share them through the L2)
    standard    scores S and probabilities P are written and read back, as in the same paper's Algorithm 0: per pair and
                head max(2 d operations, s bytes) for S, 2 s bytes for the softmax, and for P V the same as for S;
                masked pairs are skipped, which favours it; S and P of one layer take memory from the KV cache
    shared      a prefix that all prompts begin with (a system prompt) is kept once. Without ``relay`` every sequence
                reads it; with it, it is read once per iteration and multiplied with all queries together: max(bytes of
                the prefix, operations of all) (RelayAttention, arXiv 2402.14808; Hydragen, arXiv 2402.05099). Lengths
                of the traffic then leave the prefix out.
    window      attention sinks and a sliding window (StreamingLLM, arXiv 2309.17453): no query reads, and no sequence
                keeps, more than so many tokens

`Roofline.iteration_s` is this model; `Roofline.profile` puts it into the form of ``fleet/profile.py``, where both
simulators take it. What that form cannot hold, see there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS, LatencyProfile
from rl_autoscale.sim.fit import SIGNIFICANT_DIGITS
from rl_autoscale.sim.kv_capacity import KvCapacity

Attention = Literal["flash", "standard"]
ATTENTIONS: tuple[str, ...] = get_args(Attention)

BYTES = 2
"""Per weight, activation and KV number: bf16."""
WeightBits = Literal[16, 8, 4]
WEIGHT_BITS: tuple[int, ...] = get_args(WeightBits)
RUNTIME_BYTES = 3e9
"""CUDA context and graphs, libraries, fragmentation; ours, so that KV blocks land near those of measured profiles."""


class ModelShape(Config):
    """What a dense decoder-only model with grouped-query attention and a gated feed-forward layer is made of."""

    name: str
    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_size: PositiveInt
    intermediate: PositiveInt
    vocabulary: PositiveInt

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the weight matrices of a layer: queries, keys and values; output; gate and up; down."""
        attention, feed_forward = self.heads * self.head_size, self.intermediate
        qkv = attention + 2 * self.kv_heads * self.head_size
        return (
            (self.hidden, qkv),
            (attention, self.hidden),
            (self.hidden, 2 * feed_forward),
            (feed_forward, self.hidden),
        )

    def weights_bytes(self, weight_bits: int = 8 * BYTES) -> float:
        """All weights: the layers' at so many bits each, embedding and output layer in bf16."""
        of_layer = sum(rows * columns for rows, columns in self.matrices)
        return self.layers * of_layer * weight_bits / 8 + float(BYTES * 2 * self.vocabulary * self.hidden)

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of one token over all layers."""
        return float(2 * self.layers * self.kv_heads * self.head_size * BYTES)


class GpuLimits(Config):
    """The roofs of one GPU and vLLM's limits on it."""

    name: str
    flops_per_s: PositiveFloat = Field(description="dense bf16")
    bandwidth_bytes_per_s: PositiveFloat
    link_bytes_per_s: PositiveFloat = Field(description="to the other GPUs of the node, one direction")
    memory_bytes: PositiveFloat
    max_num_seqs: PositiveInt
    max_num_batched_tokens: PositiveInt


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape(name="llama-3.1-8b", layers=32, hidden=4096, heads=32, kv_heads=8, head_size=128,
                   intermediate=14_336, vocabulary=128_256),
        ModelShape(name="llama-3.1-70b", layers=80, hidden=8192, heads=64, kv_heads=8, head_size=128,
                   intermediate=28_672, vocabulary=128_256),
        ModelShape(name="qwen3-32b", layers=64, hidden=5120, heads=64, kv_heads=8, head_size=128,
                   intermediate=25_600, vocabulary=151_936),
        ModelShape(name="mistral-7b", layers=32, hidden=4096, heads=32, kv_heads=8, head_size=128,
                   intermediate=14_336, vocabulary=32_000),
        ModelShape(name="opt-13b", layers=40, hidden=5120, heads=40, kv_heads=40, head_size=128,
                   intermediate=13_653, vocabulary=50_272),
        ModelShape(name="opt-66b", layers=64, hidden=9216, heads=72, kv_heads=72, head_size=128,
                   intermediate=24_576, vocabulary=50_272),
    )
}  # fmt: skip
"""From the ``config.json`` that each publisher ships. OPT's feed-forward has no gate: two thirds of its width (20,480
and 36,864) with one are the same weights and operations."""

GPUS = {
    limits.name: limits
    for limits in (
        GpuLimits(name="A100", flops_per_s=312e12, bandwidth_bytes_per_s=2.039e12, link_bytes_per_s=300e9,
                  memory_bytes=80 * 2**30, max_num_seqs=256, max_num_batched_tokens=2048),
        GpuLimits(name="H100", flops_per_s=989e12, bandwidth_bytes_per_s=3.35e12, link_bytes_per_s=450e9,
                  memory_bytes=80 * 2**30, max_num_seqs=1024, max_num_batched_tokens=8192),
        GpuLimits(name="H200", flops_per_s=989e12, bandwidth_bytes_per_s=4.8e12, link_bytes_per_s=450e9,
                  memory_bytes=141 * 2**30, max_num_seqs=1024, max_num_batched_tokens=8192),
        GpuLimits(name="L40S", flops_per_s=362e12, bandwidth_bytes_per_s=0.864e12, link_bytes_per_s=32e9,
                  memory_bytes=45 * 2**30, max_num_seqs=256, max_num_batched_tokens=2048),
    )
}  # fmt: skip
"""NVIDIA's data sheets (SXM, no sparsity; L40S over PCIe, memory with ECC); vLLM's limits as in docs/profiles.md."""
TYPICAL_EFFICIENCY = 0.7
"""Share of either roof that kernels reach; chosen on the shipped profiles, to one digit (docs/profiles.md)."""


@dataclass(frozen=True)
class Roofline:
    """One model on one kind of GPU; see the module for the formulas.

    Attributes:
        model: its shape.
        gpu: its roofs.
        tensor_parallel: GPUs per replica.
        attention: ``flash`` or ``standard``.
        shared_prefix_tokens: that every prompt begins with and the traffic's lengths leave out.
        relay: read the shared prefix once per iteration, not once per sequence.
        window_tokens: sinks and window; None: all of the context.
        weight_bits: of the layers' weights; fewer than 16: weight-only quantisation, which moves fewer bytes and
            computes in bf16 (GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978); scales of groups are left out.
        compute_efficiency: share of the compute roof that kernels reach.
        memory_efficiency: share of the bandwidth that kernels reach.
        max_context_tokens: longest context for which ``standard`` keeps room for scores.
    """

    model: ModelShape
    gpu: GpuLimits
    tensor_parallel: int = 1
    attention: Attention = "flash"
    shared_prefix_tokens: int = 0
    relay: bool = False
    window_tokens: int | None = None
    weight_bits: WeightBits = 16
    compute_efficiency: float = TYPICAL_EFFICIENCY
    memory_efficiency: float = TYPICAL_EFFICIENCY
    max_context_tokens: int = 8192

    def __post_init__(self) -> None:
        for name in ("compute_efficiency", "memory_efficiency"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise SpecError(f"{name}={getattr(self, name)} must be above 0 and at most 1")
        if self.tensor_parallel < 1 or self.model.kv_heads % self.tensor_parallel:
            raise SpecError(
                f"tensor_parallel={self.tensor_parallel} must divide the {self.model.kv_heads} KV heads of "
                f"{self.model.name}"
            )
        if self.shared_prefix_tokens < 0 or (self.relay and not self.shared_prefix_tokens):
            raise SpecError(
                f"shared_prefix_tokens={self.shared_prefix_tokens} must be at least 0, and above 0 for relay attention"
            )
        if self.weight_bits not in WEIGHT_BITS:
            raise SpecError(f"weight_bits={self.weight_bits} is not allowed; choose one of 16, 8, 4")
        if self.window_tokens is not None and (self.window_tokens < 1 or self.shared_prefix_tokens):
            raise SpecError("window_tokens must be at least 1, and excludes a shared prefix")

    @cached_property
    def _flops_per_s(self) -> float:
        return self.gpu.flops_per_s * self.compute_efficiency

    @cached_property
    def _bytes_per_s(self) -> float:
        return self.gpu.bandwidth_bytes_per_s * self.memory_efficiency

    def linear_s(self, num_tokens: float) -> float:
        """Everything but attention, for so many new tokens."""
        model, gpus = self.model, self.tensor_parallel
        seconds = 0.0
        for rows, columns in model.matrices:
            flops = 2.0 * num_tokens * rows * columns / gpus
            moved = (rows * columns * self.weight_bits / 8 + BYTES * num_tokens * (rows + columns)) / gpus
            seconds += model.layers * max(flops / self._flops_per_s, moved / self._bytes_per_s)
        rotary = 2 * (model.heads + model.kv_heads) * model.head_size / gpus
        elementwise = 8 * model.hidden + rotary + 3 * model.intermediate / gpus
        seconds += model.layers * num_tokens * BYTES * elementwise / self._bytes_per_s
        seconds += BYTES * model.vocabulary * model.hidden / gpus / self._bytes_per_s
        reduced = 2 * model.layers * 2.0 * (gpus - 1) / gpus * num_tokens * model.hidden * BYTES
        return seconds + reduced / self.gpu.link_bytes_per_s

    @cached_property
    def _ridges(self) -> list[float]:
        """New tokens at which a matrix turns from memory-bound to compute-bound."""
        ratio = 2.0 * self._bytes_per_s / (BYTES * self._flops_per_s)
        gains = [ratio * rows * columns - (rows + columns) for rows, columns in self.model.matrices]
        bytes_share = self.weight_bits / (8 * BYTES)
        return [
            bytes_share * rows * columns / gain
            for (rows, columns), gain in zip(self.model.matrices, gains, strict=True)
            if gain > 0
        ]

    @cached_property
    def pair_s(self) -> float:
        """Seconds per (query, key) pair of a chunk: its operations, and with ``standard`` the traffic of scores."""
        size = self.model.head_size
        of_head = 4 * size / self._flops_per_s
        if self.attention == "standard":
            product = max(2 * size / self._flops_per_s, BYTES / self._bytes_per_s)
            of_head = 2 * product + 2 * BYTES / self._bytes_per_s
        return self.model.layers * self.model.heads / self.tensor_parallel * of_head

    @cached_property
    def kv_read_s(self) -> float:
        """Seconds to read one token's keys and values once."""
        return self.model.kv_bytes_per_token / self.tensor_parallel / self._bytes_per_s

    @cached_property
    def context_s(self) -> float:
        """Seconds per token that a decode sequence attends to: one pair with each query head, and one read."""
        scores = 4 * BYTES * self.model.layers * self.model.heads if self.attention == "standard" else 0
        return max(self.kv_read_s + scores / self.tensor_parallel / self._bytes_per_s, self.pair_s)

    def iteration_s(self, contexts: tuple[int, ...] = (), chunks: tuple[tuple[int, int], ...] = ()) -> float:
        """Predict one iteration.

        Args:
            contexts: KV tokens of each decode sequence, its new token included, the shared prefix not.
            chunks: one (new prompt tokens, prompt tokens already computed) pair per prompt chunk, likewise.

        Returns:
            Seconds, > 0.
        """
        window = np.inf if self.window_tokens is None else self.window_tokens
        num_new = len(contexts) + sum(new for new, _ in chunks)
        read = sum(min(context, window) for context in contexts)
        pairs = sum(_pairs(new, done, window) for new, done in chunks)
        kv_read = sum(min(done, window) + new for new, done in chunks)
        seconds = self.linear_s(num_new) + read * self.context_s
        seconds += max(pairs * self.pair_s, kv_read * self.kv_read_s)
        return seconds + self._prefix_s(num_new, len(contexts) + len(chunks))

    def _prefix_s(self, num_new: int, num_seqs: int) -> float:
        """Attention to the shared prefix: queries of all sequences together, or each sequence's own."""
        reads = min(1, num_seqs) if self.relay else num_seqs
        prefix = self.shared_prefix_tokens
        return max(prefix * reads * self.kv_read_s, prefix * num_new * self.pair_s)

    def kv_capacity(self, max_num_seqs: int, max_num_batched_tokens: int) -> KvCapacity:
        """Memory of one GPU of the replica; activations and logits are bounded by the engine's limits."""
        model, gpus = self.model, self.tensor_parallel
        activations = BYTES * max_num_batched_tokens * (4 * model.hidden + 3 * model.intermediate / gpus)
        logits = 2 * 4 * max_num_seqs * model.vocabulary / gpus
        scores = 0.0
        if self.attention == "standard":
            scores = 2 * BYTES * model.heads / gpus * max_num_batched_tokens * self.max_context_tokens
        return KvCapacity(
            gpu_bytes=self.gpu.memory_bytes,
            weights_bytes=model.weights_bytes(self.weight_bits) / gpus,
            reserve_bytes=RUNTIME_BYTES + activations + logits + scores,
            bytes_per_token=model.kv_bytes_per_token / gpus,
        )

    def kept_tokens(self, context_tokens: int) -> int:
        """KV tokens that a sequence keeps."""
        return context_tokens if self.window_tokens is None else min(context_tokens, self.window_tokens)

    def profile(
        self, *, name: str, max_num_seqs: int | None = None, max_num_batched_tokens: int | None = None
    ) -> LatencyProfile:
        """This roofline in the form that the simulators run.

        Linear layers, decode attention and relay attention are exact. Two terms are sums where the roofline takes the
        larger, so that an iteration is not predicted too fast: a chunk's reading of its context beside its pairs (by
        at most the share ``kv_read_s / (pair_s * new tokens)``), and without relay a prefix's reading beside its
        products. A chunk's own keys and values are left out, which matters below about 80 prompt tokens.
        ``max_num_batched_tokens`` is the chunk size of chunked prefill.

        Raises:
            SpecError: a window, which the form cannot hold: neither time nor blocks of a sequence stop growing in it.
        """
        if self.window_tokens is not None:
            raise SpecError(
                "a profile cannot hold a window: its attention grows with all of the context, and so do a sequence's "
                "KV blocks in the simulators; use Roofline.iteration_s and Roofline.kept_tokens"
            )
        seqs = max_num_seqs or self.gpu.max_num_seqs
        budget = max_num_batched_tokens or self.gpu.max_num_batched_tokens
        capacity, prefix = self.kv_capacity(seqs, budget), self.shared_prefix_tokens
        blocks = capacity.num_blocks - -(-prefix // BLOCK_SIZE_TOKENS)
        if blocks < 1:
            raise SpecError(f"no KV cache is left beside a shared prefix of {prefix} tokens; shorten it")
        own_reads = 0 if self.relay else prefix
        knots = self._knots(budget)
        return LatencyProfile(
            name=name,
            model=self.model.name,
            gpu=self.gpu.name,
            gpus_per_replica=self.tensor_parallel,
            kv_blocks=blocks,
            kv_bytes_per_token=self.model.kv_bytes_per_token,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            token_knots=tuple(knots),
            token_knot_s=tuple(_round(self._token_s(knot)) for knot in knots),
            decode_context_s=_round(self.context_s),
            decode_seq_s=_round(own_reads * self.kv_read_s),
            prefill_pair_s=_round(self.pair_s),
            prefill_context_s=_round(self.kv_read_s),
            prefill_seq_s=_round(own_reads * self.kv_read_s),
            source=f"analytic roofline ({self.attention} attention), nothing measured",
            notes=f"{capacity.derivation}. {self._describe()}",
        )

    def _token_s(self, num_tokens: float) -> float:
        """What depends on the number of new tokens alone."""
        products_s = self.shared_prefix_tokens * num_tokens * self.pair_s
        if self.relay:
            products_s = max(products_s, self.shared_prefix_tokens * self.kv_read_s)
        return self.linear_s(num_tokens) + products_s

    def _knots(self, budget: int) -> list[int]:
        """Token counts between which `_token_s` is a line, up to rounding."""
        bends = [*self._ridges, *([self.kv_read_s / self.pair_s] if self.relay else [])]
        inner = {int(bend) + k for bend in bends for k in (0, 1)}
        return sorted({1, budget, *(knot for knot in inner if 1 < knot < budget)})

    def _describe(self) -> str:
        parts = [f"Reached: {self.compute_efficiency:g} of compute, {self.memory_efficiency:g} of bandwidth."]
        if self.weight_bits < 8 * BYTES:
            parts.append(f"Weights of {self.weight_bits} bits, computed with in bf16.")
        if self.shared_prefix_tokens:
            how = "once per iteration" if self.relay else "once per sequence"
            parts.append(f"Prompts leave out a shared prefix of {self.shared_prefix_tokens} tokens, read {how}.")
        return " ".join(parts)


def _pairs(new: int, done: int, window: float) -> float:
    """(query, key) pairs of a chunk, as the profile counts them: new (done + new / 2), each query within the window."""
    if done + new <= window:
        return new * (done + new / 2.0)
    growing = max(min(window - done, new), 0.0)  # queries that still see all of their context
    return growing * (done + growing / 2.0) + (new - growing) * window


def _round(seconds: float) -> float:
    return float(f"{seconds:.{SIGNIFICANT_DIGITS}g}")
