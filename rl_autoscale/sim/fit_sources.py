"""Where iteration times come from: NVIDIA's AIConfigurator, asked for the iterations a vLLM engine really runs.

AIConfigurator (aiconfigurator-core, Apache-2.0) interpolates kernels measured on each GPU under vLLM and adds them up
over the layers of a model; its memory model gives KV capacity. No number here is ours, only the composition:

    iteration = everything but attention, at all new tokens together
              + attention of the prompt chunks
              + attention of the decode batch

The parts are asked for one by one, because its own mixed step divides the attention of a chunk that follows earlier
context by ``ceil((context + chunk) / chunk)``: the average over all chunks of a prompt, not the time of this one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any, Protocol

import numpy as np

from rl_autoscale.fleet.errors import MissingExtraError, SpecError, UnknownNameError
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS, LatencyProfile
from rl_autoscale.sim.fit import Hardware, fit_profile, split_rows
from rl_autoscale.sim.iteration_table import IterationTable
from rl_autoscale.sim.kv_capacity import GPU_MEMORY_UTILIZATION, KvCapacity

MAX_DECODE_CONTEXT = 16_384
MAX_PREFILL_CONTEXT = 12_288
MAX_CHUNKS = 8
"""Edges of the sampled region; what the KV cache cannot hold is left out."""

NUM_ROWS = 9_000
"""Iterations asked for per profile; twice as many change no error by 0.1 points."""

HOST_NOTE = (
    "host_s is 0: the times are sums of GPU kernels, and vLLM's async scheduling hides CPU work; "
    "calibrate host_s for a server where it does not."
)


@dataclass(frozen=True, slots=True)
class GpuSystem:
    """One of AIConfigurator's systems.

    Attributes:
        gpu: short name used in profiles.
        kernel_version: version of the vLLM kernel measurements that AIConfigurator holds as current for it.
        max_num_batched_tokens: vLLM's default token budget.
        max_num_seqs: vLLM's default batch limit.

    Reference: vllm 0.33.0, engine/arg_utils.py (API server): 8192 tokens and 1024 sequences from 70 GiB of device
    memory on, except on A100; otherwise 2048 and 256.
    """

    gpu: str
    kernel_version: str
    max_num_batched_tokens: int
    max_num_seqs: int


SYSTEMS: dict[str, GpuSystem] = {
    "a100_sxm": GpuSystem("A100", "0.14.0", 2048, 256),
    "h100_sxm": GpuSystem("H100", "0.24.0", 8192, 1024),
    "h200_sxm": GpuSystem("H200", "0.24.0", 8192, 1024),
    "l40s": GpuSystem("L40S", "0.24.0", 2048, 256),
}
"""Systems with known vLLM defaults."""


class IterationSource(Protocol):
    """Whatever can be asked how long an iteration takes."""

    @property
    def system(self) -> GpuSystem:
        """The GPU and vLLM's limits on it."""

    @property
    def kv_tokens(self) -> int:
        """KV tokens that a replica holds."""

    def iteration_s(
        self, chunks: int, chunk_tokens: int, chunk_context: int, num_decode: int, decode_context: int
    ) -> float:
        """Seconds of one iteration of equal prompt chunks, decode sequences of equal context, or both."""


class AicModel:
    """AIConfigurator's estimates for one (model, system, tensor parallelism).

    Args:
        model: Hugging Face id, for example ``meta-llama/Meta-Llama-3.1-8B``.
        system: one of `SYSTEMS`.
        tensor_parallel: GPUs per replica.

    Raises:
        MissingExtraError: aiconfigurator-core is not installed.
        UnknownNameError: no such system.
        SpecError: AIConfigurator cannot build the model so.
    """

    def __init__(self, model: str, system: str, tensor_parallel: int) -> None:
        if system not in SYSTEMS:
            raise UnknownNameError("system", system, SYSTEMS)
        try:
            from aiconfigurator_core.sdk import EngineHandle
        except ImportError:
            raise MissingExtraError("fitting from AIConfigurator", "profiles") from None
        self.model, self.system_name, self.tensor_parallel = model, system, tensor_parallel
        self.system = SYSTEMS[system]
        # It warns of every table it holds that is not vLLM's own, also those that this model never reads.
        logging.getLogger("aiconfigurator_core").setLevel(logging.CRITICAL)
        try:
            self._engine: Any = EngineHandle.compile(
                model, system, "vllm", backend_version=self.system.kernel_version, tp_size=tensor_parallel
            )
        except Exception as error:  # it raises plain Exceptions, AssertionErrors and its own types alike
            raise SpecError(
                f"AIConfigurator cannot build {model} on {system} with tp={tensor_parallel}: "
                f"{' '.join(str(error).split())}"
            ) from None

    def iteration_s(
        self, chunks: int, chunk_tokens: int, chunk_context: int, num_decode: int, decode_context: int
    ) -> float:
        """Seconds of one iteration of equal prompt chunks, decode sequences of equal context, or both."""
        if chunks == 0:
            return float(self._engine.decode_step_latency(num_decode, decode_context, 2)) / 1e3
        milliseconds = self._shared_ms(chunks * chunk_tokens, num_decode)
        milliseconds += self._prefill_attention_ms(chunks, chunk_tokens, chunk_context)
        if num_decode:
            milliseconds += _attention_ms(self._engine.decode_step_per_op(num_decode, decode_context, 2))
        return milliseconds / 1e3

    def _shared_ms(self, prompt_tokens: int, num_decode: int) -> float:
        """Everything but attention, for an iteration that holds prompt tokens."""
        if num_decode:
            return float(self._engine.mixed_step_breakdown(prompt_tokens, num_decode, prompt_tokens, 2, 0)[1])
        ops = self._engine.run_static_per_op(batch_size=1, isl=prompt_tokens, osl=2)[0]
        return float(sum(ms for _, ms, *_ in ops)) - _attention_ms(ops)

    def _prefill_attention_ms(self, chunks: int, chunk_tokens: int, context_tokens: int) -> float:
        isl = context_tokens + chunk_tokens  # AIConfigurator counts the prefix as part of the input
        return _attention_ms(
            self._engine.run_static_per_op(batch_size=chunks, isl=isl, osl=2, prefix=context_tokens)[0]
        )

    @property
    def kv_tokens(self) -> int:
        """KV tokens that a replica holds."""
        return self.kv_capacity.num_blocks * BLOCK_SIZE_TOKENS

    @cached_property
    def kv_capacity(self) -> KvCapacity:
        """Memory of one GPU of the replica at vLLM's default settings.

        Raises:
            SpecError: AIConfigurator has no memory model for it.
        """
        from aiconfigurator_core.sdk import estimate_kv_cache

        try:
            estimate: dict[str, Any] = estimate_kv_cache(
                self.model,
                self.system_name,
                "vllm",
                self.system.kernel_version,
                max_num_tokens=self.system.max_num_batched_tokens,
                max_batch_size=self.system.max_num_seqs,
                memory_fraction_kind="of_total",
                memory_fraction_value=GPU_MEMORY_UTILIZATION,
                tp_size=self.tensor_parallel,
            )
        except ValueError as error:
            raise SpecError(
                f"{self.model} on {self.system_name} with tp={self.tensor_parallel}: {error}; raise --tp"
            ) from None
        parts = estimate["memory_breakdown"]
        return KvCapacity(
            gpu_bytes=float(estimate["total_gpu_capacity_bytes"]),
            weights_bytes=float(parts["weights_bytes"]),
            reserve_bytes=float(sum(size for part, size in parts.items() if part != "weights_bytes")),
            bytes_per_token=float(estimate["kv_size_per_token_bytes"]),
        )


def _attention_ms(ops: list[tuple[str, float, float, str]]) -> float:
    return float(sum(ms for name, ms, *_ in ops if name.endswith("_attention")))


def fit_from_aic(
    model: str,
    system: str,
    tensor_parallel: int,
    *,
    name: str,
    notes: str = "",
    num_rows: int = NUM_ROWS,
    seed: int = 0,
) -> LatencyProfile:
    """Sample AIConfigurator, fit, and judge the fit on a quarter of the sample that it did not see.

    Raises:
        MissingExtraError, UnknownNameError, SpecError: see `AicModel`.
    """
    source = AicModel(model, system, tensor_parallel)
    rng = np.random.default_rng(seed)
    train, test = split_rows(sample_iterations(source, rng, num_rows), rng)
    hardware = Hardware(
        name=name,
        model=model,
        gpu=source.system.gpu,
        gpus_per_replica=tensor_parallel,
        kv_blocks=source.kv_capacity.num_blocks,
        max_num_seqs=source.system.max_num_seqs,
        max_num_batched_tokens=source.system.max_num_batched_tokens,
        source=(
            f"NVIDIA AIConfigurator (PyPI aiconfigurator-core {metadata.version('aiconfigurator-core')}, Apache-2.0), "
            f"system {system}, kernels measured under vLLM {source.system.kernel_version}, bf16"
        ),
        notes=" ".join(part for part in (f"{source.kv_capacity.derivation}.", HOST_NOTE, notes) if part),
        kv_bytes_per_token=source.kv_capacity.bytes_per_token * tensor_parallel,
    )
    return fit_profile(train, test, hardware, joint_attention=False)


def sample_iterations(source: IterationSource, rng: np.random.Generator, num_rows: int) -> IterationTable:
    """Ask for `num_rows` iterations, a third of each kind, that the replica's KV cache can hold.

    Sizes are log-uniform, so that every octave counts: decode batches of 1 to max_num_seqs with 128 to 16k context; up
    to 8 prompt chunks, a third of them without earlier context and the rest after up to 12k. A quarter of the
    iterations with prompts fill the token budget, as a busy engine's do.
    """
    capacity_tokens = source.kv_tokens
    rows: list[tuple[int, int, int, int, int]] = []
    while len(rows) < num_rows:
        row = _draw(source.system, rng, kind=len(rows) % 3)
        chunks, chunk_tokens, context, num_decode, decode_context = row
        if chunks * (context + chunk_tokens) + num_decode * decode_context <= capacity_tokens:
            rows.append(row)
    columns = np.array(rows, dtype=np.float64)
    return IterationTable(
        num_chunks=columns[:, 0],
        chunk_tokens=columns[:, 1],
        chunk_context_tokens=columns[:, 2],
        num_decode=columns[:, 3],
        decode_context_tokens=columns[:, 4],
        iteration_s=np.array([source.iteration_s(*row) for row in rows]),
    )


def _draw(system: GpuSystem, rng: np.random.Generator, *, kind: int) -> tuple[int, int, int, int, int]:
    """One (chunks, chunk tokens, chunk context, decode batch, decode context); kind is 0 decode, 1 prefill, 2 mixed."""
    num_decode = decode_context = chunks = chunk_tokens = context = 0
    if kind != 1:
        num_decode = _log_uniform(rng, 1, system.max_num_seqs)
        decode_context = _log_uniform(rng, 128, MAX_DECODE_CONTEXT)
    if kind != 0:
        budget = system.max_num_batched_tokens - num_decode
        new_tokens = budget if rng.random() < 1 / 4 else _log_uniform(rng, 1, budget)
        chunks = _log_uniform(rng, 1, min(MAX_CHUNKS, new_tokens))
        chunk_tokens = new_tokens // chunks
        context = 0 if rng.random() < 1 / 3 else _log_uniform(rng, 16, MAX_PREFILL_CONTEXT)
    return chunks, chunk_tokens, context, num_decode, decode_context


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    """An integer in low..high, every octave as likely as another."""
    return min(high, int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))))
