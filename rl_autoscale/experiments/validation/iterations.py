"""Latency profiles against measured iterations, by kind of iteration.

Sources, most trusted first:

- ``kernels, grid``: AIConfigurator's sums of kernels measured under vLLM, on a regular grid, apart from the fit;
- ``kernels, new sample``: the same asked for anew, with another seed than the fit's (needs the ``profiles`` extra);
- ``operators``: attention of whole batches and every other operator, measured under vLLM (LLMServingSim); no profile
  ships for these GPUs, so one is fitted first, as a user would;
- ``engine, 2023``: whole iterations of vLLM as of 2023, CPU work included (splitwise-sim);
- ``Vidur``: another simulator's predictor, with its own kernels of 2023.

The first three judge the form of the profile and its fit; the last two say what other software would have taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rl_autoscale.experiments.validation.vidur_runs import HARDWARE, VIDUR_PREDICTIONS
from rl_autoscale.experiments.validation.vllm_runs import fit_operators
from rl_autoscale.fleet.errors import MissingExtraError
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS, LatencyProfile
from rl_autoscale.sim.fit import predict_s
from rl_autoscale.sim.fit_operators import OperatorTimes
from rl_autoscale.sim.fit_sources import SYSTEMS, AicModel, sample_iterations
from rl_autoscale.sim.iteration_table import (
    REGIONS,
    REQUIRED_COLUMNS,
    IterationTable,
    read_columns,
    table_from_columns,
)
from rl_autoscale.sim.layout import FloatArray

AIC_GRID = "aic_iteration_times.parquet"
OPERATORS = "llmservingsim"
ENGINE_2023 = "splitwise-sim/perf_model.csv"
SAMPLE_ROWS, SAMPLE_SEED = 3_000, 1


@dataclass(frozen=True, slots=True)
class IterationErrors:
    """Errors of one profile on one kind of iteration, as fractions.

    Attributes:
        profile: its name.
        source: what it is compared with.
        judged: whether the source judges the profile; otherwise it is other software, for comparison.
        kind: one of `REGIONS`.
        num_rows: iterations compared.
        mean: mean absolute error.
        p99: its 99th percentile.
        bias: median of predicted / measured - 1.
    """

    profile: str
    source: str
    judged: bool
    kind: str
    num_rows: int
    mean: float
    p99: float
    bias: float


def iteration_errors(
    profile: LatencyProfile, table: IterationTable, source: str, *, judged: bool
) -> list[IterationErrors]:
    """One entry per kind of iteration in the table, which is cut to what the profile's engine can run."""
    table = table[
        (table.kv_tokens <= profile.kv_blocks * BLOCK_SIZE_TOKENS)
        & (table.new_tokens <= profile.max_num_batched_tokens)
        & (table.num_decode <= profile.max_num_seqs)
    ]
    error: FloatArray = predict_s(profile, table) / table.iteration_s - 1.0
    found = []
    for kind in REGIONS:
        rows = error[table.region(kind)]
        if len(rows):
            size = np.abs(rows)
            found.append(
                IterationErrors(
                    profile.name, source, judged, kind, len(rows), float(size.mean()),
                    float(np.quantile(size, 0.99)), float(np.median(rows)),
                )
            )  # fmt: skip
    return found


def against_aic_grid(profile: LatencyProfile, data: Path) -> list[IterationErrors]:
    """A shipped profile on the regular grid; empty where the grid lacks its model and GPU."""
    columns = read_columns(data / AIC_GRID)
    system = system_of(profile)
    keep = (columns["model"].astype(str) == profile.model) & (columns["system"].astype(str) == system)
    keep &= columns["tp"] == profile.gpus_per_replica
    if not keep.any():
        return []
    return iteration_errors(
        profile, aic_grid({name: column[keep] for name, column in columns.items()}), "kernels, grid", judged=True
    )


def aic_grid(columns: dict[str, FloatArray]) -> IterationTable:
    """A grid of AIConfigurator's mixed steps, brought back to the attention that each chunk really costs.

    The tool's mixed step divides the attention of a chunk by ceil((context + chunk) / chunk), the average over all
    chunks of its prompt; see sim/fit_sources.py.
    """
    columns = dict(columns)
    chunk = columns["prefill_chunk_tokens"].astype(np.float64)
    averaged_over = np.ceil((columns["prefill_kv_context"] + chunk) / np.maximum(chunk, 1.0)) * (chunk > 0)
    extra_ms = columns["attn_prefill_ms"] * np.maximum(averaged_over - 1.0, 0.0)
    columns["iter_time_ms"] = columns["iter_time_ms"] + extra_ms
    return table_from_columns({name: columns[name] for name in REQUIRED_COLUMNS}, where="AIConfigurator grid")


def against_new_sample(profile: LatencyProfile) -> list[IterationErrors]:
    """A shipped profile on iterations that its fit did not see; empty without the ``profiles`` extra."""
    system = system_of(profile)
    if system is None:
        return []
    try:
        source = AicModel(profile.model, system, profile.gpus_per_replica)
    except MissingExtraError:
        return []
    sample = sample_iterations(source, np.random.default_rng(SAMPLE_SEED), SAMPLE_ROWS)
    return iteration_errors(profile, sample, "kernels, new sample", judged=True)


def against_vidur(profile: LatencyProfile, data: Path) -> list[IterationErrors]:
    """A shipped profile on Vidur's predictions for the same layers; empty where there are none."""
    for hardware in HARDWARE.values():
        if hardware.profile == profile.name:
            columns = read_columns(data / VIDUR_PREDICTIONS)
            keep = (columns["model"].astype(str) == hardware.model) & (columns["device"].astype(str) == hardware.device)
            keep &= columns["tp"] == hardware.tensor_parallel
            rows = {name: columns[name][keep] for name in REQUIRED_COLUMNS}
            return iteration_errors(profile, table_from_columns(rows, where=VIDUR_PREDICTIONS), "Vidur", judged=False)
    return []


def against_engine_2023(profile: LatencyProfile, data: Path) -> list[IterationErrors]:
    """A 70B Llama's profile on whole prompt phases and decode iterations of Llama-2-70B, same GPUs and parallelism."""
    gpu = {"A100": "a100-80gb", "H100": "h100-80gb"}.get(profile.gpu)
    if gpu is None or "70b" not in profile.name:
        return []
    columns = read_columns(data / ENGINE_2023)
    keep = (columns["model"] == "llama2-70b") & (columns["hardware"] == gpu)
    keep &= columns["tensor_parallel"].astype(np.int64) == profile.gpus_per_replica
    names = ("prompt_size", "batch_size", "token_size", "prompt_time", "token_time")
    prompt, batch, output, prompt_ms, token_ms = (columns[name][keep].astype(np.float64) for name in names)
    none = np.zeros_like(prompt)
    both = {
        "prefill_chunk_tokens": np.concatenate([prompt, none]),
        "prefill_chunks": np.concatenate([batch, none]),
        "prefill_kv_context": np.concatenate([none, none]),
        "decode_batch_size": np.concatenate([none, batch]),
        "mean_decode_context": np.concatenate([none, prompt + output / 2.0]),
        "iter_time_ms": np.concatenate([prompt_ms, token_ms]),
    }
    return iteration_errors(profile, table_from_columns(both, where=ENGINE_2023), "engine, 2023", judged=False)


def operator_stems(data: Path) -> list[Path]:
    """Beginnings of the operator tables in the data folder: one GPU each (no all-reduce was measured)."""
    found = sorted((data / OPERATORS).glob("*_tp1_attention.parquet"))
    return [path.with_name(path.name.removesuffix("_attention.parquet")) for path in found]


def against_operators(operators: OperatorTimes, *, name: str, model: str) -> list[IterationErrors]:
    """A profile fitted here, on the very batches at which attention was measured."""
    profile = fit_operators(operators, name=name, model=model)
    table = operators.measured_table(max_tokens=profile.max_num_batched_tokens)
    return iteration_errors(profile, table, "operators", judged=True)


def system_of(profile: LatencyProfile) -> str | None:
    """AIConfigurator's name of a profile's GPU; None where it has none."""
    return next((name for name, system in SYSTEMS.items() if system.gpu == profile.gpu), None)
