"""The hardware profile: how long one engine iteration takes, and how much KV cache a replica has.

One *iteration* is one forward pass of a vLLM engine over a batch that mixes decode sequences (one new token each)
and chunks of prompts (chunked prefill). Its duration is modelled as

    iteration_s = token_time(tokens)        linear layers, weight reads, launches
                + decode_context_s  x  KV tokens read by decode sequences
                + decode_seq_s      x  decode sequences
                + prefill_pair_s    x  sum over chunks of chunk * (context + chunk / 2)
                + prefill_context_s x  sum over chunks of context tokens read
                + prefill_seq_s     x  chunks
                + host_s                    scheduler and CPU work not hidden by async scheduling

and, in an iteration that holds a chunk, where one kernel computes the attention of prompts and decode together,

                + mixed_context_s   x  KV tokens read by decode sequences
                + mixed_seq_s       x  decode sequences

``token_time`` is piecewise linear in the number of new tokens, which holds the roofline (weight-read floor, then
compute) without choosing where it bends. While a decode batch does not change, the time of the k-th iteration is
affine in k, so k iterations have a closed form: this is what lets the compiled engine leap
(docs/design/event-leaping.md).

Profiles ship as YAML in ``rl_autoscale/profiles`` and are made by ``rl-autoscale profile fit``; each holds its fit
error.
"""

from __future__ import annotations

from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rl_autoscale.fleet.config import Config
from rl_autoscale.fleet.errors import UnknownNameError

FloatArray = npt.NDArray[np.float64]

BLOCK_SIZE_TOKENS = 16
"""Tokens per KV block; vLLM's default on CUDA (vllm 0.33.0, config/cache.py)."""

TYPICAL_PROMPT_TOKENS, TYPICAL_OUTPUT_TOKENS = 1024, 200
"""Lengths where none are known yet (Azure 2023 conversation: means 1155 and 211)."""


ATTENTION_COEFFICIENTS = (
    "decode_context_s", "decode_seq_s", "prefill_pair_s", "prefill_context_s", "prefill_seq_s", "mixed_context_s",
    "mixed_seq_s",
)  # fmt: skip
"""Fields of a profile that multiply what attention does, in the order in which fits and kernels hold them."""


class LatencyProfile(Config):
    """Fitted iteration times and KV capacity of one (model, GPU, tensor parallelism) triple. All seconds, all >= 0."""

    name: str
    model: str
    gpu: str
    gpus_per_replica: PositiveInt
    kv_blocks: PositiveInt = Field(description="KV blocks of 16 tokens in one replica")
    kv_bytes_per_token: PositiveFloat | None = Field(
        default=None, description="keys and values of one token over all layers and GPUs of a replica; for KV transfer"
    )
    max_num_seqs: PositiveInt = Field(description="vLLM's default for this device")
    max_num_batched_tokens: PositiveInt = Field(description="vLLM's default token budget for this device")
    token_knots: tuple[int, ...] = Field(
        description="new tokens in the iteration, strictly increasing, first is 0 or 1"
    )
    token_knot_s: tuple[float, ...] = Field(description="seconds at each knot, non-decreasing")
    decode_context_s: float = Field(ge=0, description="per KV token read by a decode sequence")
    decode_seq_s: float = Field(ge=0, description="per decode sequence")
    prefill_pair_s: float = Field(ge=0, description="per (query, key) pair of a prompt chunk")
    prefill_context_s: float = Field(ge=0, description="per KV token read by a prompt chunk")
    prefill_seq_s: float = Field(ge=0, description="per prompt chunk")
    mixed_context_s: float = Field(
        default=0.0, ge=0, description="more per KV token read by a decode sequence, beside a prompt chunk"
    )
    mixed_seq_s: float = Field(default=0.0, ge=0, description="more per decode sequence, beside a prompt chunk")
    host_s: float = Field(default=0.0, ge=0, description="per iteration, not hidden by async scheduling")
    source: str = Field(description="where the numbers come from: tool, version, licence")
    fit_error: dict[str, float] = Field(
        default_factory=dict, description="mean and p99 absolute percentage error by kind"
    )
    notes: str = ""

    @model_validator(mode="after")
    def _knots_make_a_function(self) -> LatencyProfile:
        knots, seconds = np.asarray(self.token_knots), np.asarray(self.token_knot_s)
        if len(knots) < 2 or len(knots) != len(seconds):
            raise ValueError(
                f"token_knots ({len(knots)}) and token_knot_s ({len(seconds)}) must have the same length >= 2"
            )
        if np.any(np.diff(knots) <= 0) or knots[0] not in (0, 1):
            raise ValueError("token_knots must increase strictly and start at 0 or 1")
        if np.any(np.diff(seconds) < 0) or seconds[0] <= 0:
            raise ValueError("token_knot_s must be positive and non-decreasing")
        return self

    def token_time_s(self, num_tokens: int | FloatArray) -> FloatArray:
        """Seconds of the linear part for that many new tokens; extrapolates with the last slope."""
        tokens = np.asarray(num_tokens, dtype=np.float64)
        knots = np.asarray(self.token_knots, dtype=np.float64)
        seconds = np.asarray(self.token_knot_s, dtype=np.float64)
        last_slope = (seconds[-1] - seconds[-2]) / (knots[-1] - knots[-2])
        beyond = np.maximum(tokens - knots[-1], 0.0)
        return np.asarray(np.interp(tokens, knots, seconds) + beyond * last_slope)

    def token_time_table_s(self, max_tokens: int) -> FloatArray:
        """Table of ``token_time_s + host_s`` for 0..max_tokens, shape (max_tokens + 1,)."""
        return self.token_time_s(np.arange(max_tokens + 1, dtype=np.float64)) + self.host_s

    @cached_property
    def attention_coefficients_s(self) -> FloatArray:
        """Shape (7,): decode context and sequence; prefill pair, context and sequence; mixed context and sequence."""
        return np.array([getattr(self, name) for name in ATTENTION_COEFFICIENTS])

    def iteration_s(
        self,
        *,
        num_decode: int = 0,
        decode_context_tokens: float = 0.0,
        num_drafts: int = 0,
        chunks: tuple[tuple[int, int], ...] = (),
    ) -> float:
        """Predict one iteration.

        Args:
            num_decode: decode sequences in the batch.
            decode_context_tokens: KV tokens they read in total, the new tokens included.
            num_drafts: tokens that they verify beyond their next one each, in total.
            chunks: one (new prompt tokens, prompt tokens already computed) pair per prompt chunk.

        Returns:
            Seconds, > 0.
        """
        tokens = num_decode + num_drafts + sum(new for new, _ in chunks)
        pairs = sum(new * (done + new / 2.0) for new, done in chunks)
        context = sum(done for _, done in chunks)
        decode = np.array([decode_context_tokens, num_decode])
        features = np.concatenate([decode, [pairs, context, len(chunks)], decode * (len(chunks) > 0)])
        return float(self.token_time_s(tokens) + self.host_s + self.attention_coefficients_s @ features)

    def prefill_s_per_token(self, prompt_tokens: int = 1024) -> float:
        """Seconds of one replica per prompt token when chunks fill the token budget."""
        budget = self.max_num_batched_tokens
        per_prompt = prompt_tokens * prompt_tokens / 2.0
        prompts = budget / prompt_tokens
        total = (
            float(self.token_time_s(budget))
            + self.host_s
            + prompts * (self.prefill_pair_s * per_prompt + self.prefill_seq_s)
        )
        return total / budget

    @property
    def decode_beside_chunks_s(self) -> tuple[float, float]:
        """Seconds of an iteration per sequence decoded beside prompt chunks, and per token of its context."""
        return self.decode_seq_s + self.mixed_seq_s, self.decode_context_s + self.mixed_context_s

    def full_batch_decode_s(
        self, prompt_tokens: float, output_tokens: float, *, verified_tokens: int = 1, kept_tokens: float = 1.0
    ) -> float:
        """Seconds of one replica per generated token of such requests, in batches that compute prompts as well.

        An iteration computes ``verified_tokens`` tokens of a decode sequence and keeps ``kept_tokens`` on average.
        """
        context_tokens = prompt_tokens + output_tokens / 2.0
        linear_s = verified_tokens * self.prefill_s_per_token(TYPICAL_PROMPT_TOKENS)
        seq_s, context_s = self.decode_beside_chunks_s
        return (linear_s + (seq_s + context_s * context_tokens)) / kept_tokens

    def decode_s_per_token(
        self, batch_size: int, context_tokens: float, *, verified_tokens: int = 1, kept_tokens: float = 1.0
    ) -> float:
        """Seconds of one replica per generated token in a decode-only batch of that size and mean context."""
        num_drafts = verified_tokens - 1
        iteration_s = self.iteration_s(
            num_decode=batch_size,
            decode_context_tokens=batch_size * (context_tokens + num_drafts),
            num_drafts=batch_size * num_drafts,
        )
        return iteration_s / (batch_size * kept_tokens)


def shipped_profile_names() -> list[str]:
    """Names of the profiles in the package, sorted."""
    folder = resources.files("rl_autoscale") / "profiles"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


@cache
def _shipped_profile(name: str) -> LatencyProfile:
    text = (resources.files("rl_autoscale") / "profiles" / f"{name}.yaml").read_text(encoding="utf-8")
    data: Any = yaml.safe_load(text)
    return LatencyProfile.from_dict(data, where=f"profile {name}")


def load_profile(name_or_path: str) -> LatencyProfile:
    """Load a shipped profile by name, or any profile by path (anything that ends in .yaml).

    Raises:
        UnknownNameError: no shipped profile has that name.
        SpecError: the file is missing or not a profile.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        return LatencyProfile.from_yaml(Path(name_or_path))
    if name_or_path not in shipped_profile_names():
        raise UnknownNameError("profile", name_or_path, shipped_profile_names())
    return _shipped_profile(name_or_path)
