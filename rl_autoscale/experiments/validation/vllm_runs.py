"""Request by request against a real vLLM server, with a profile fitted from operators measured on the same GPU.

A run is four kinds of files with one stem, as LLMServingSim (MIT) publishes them: ``<stem>_vllm_requests.csv`` (stamps
of each request), ``<stem>_vllm_meta.json`` (the engine's limits), and the operator tables of `fit_operators`. The
request stamps are used for comparison only; nothing is fitted to them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rl_autoscale.experiments.validation.compare import (
    MetricError,
    RequestTimes,
    compare,
    request_times,
    times_of_records,
)
from rl_autoscale.experiments.validation.replay import (
    MeasuredHardware,
    one_replica,
    recorded_workload,
    run_compiled,
    run_reference,
)
from rl_autoscale.fleet.errors import SpecError, UnknownNameError
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS, LatencyProfile
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.fit import Hardware, fit_profile, split_rows
from rl_autoscale.sim.fit_operators import OperatorTimes, read_operators
from rl_autoscale.sim.fit_sources import NUM_ROWS, GpuSystem, sample_iterations
from rl_autoscale.sim.iteration_table import read_columns
from rl_autoscale.sim.layout import RecordArray
from rl_autoscale.workload.trace import Workload

REQUESTS_SUFFIX = "_vllm_requests.csv"
_RESERVE_BYTES = 4.5e9
"""Activations, CUDA context and graphs where the server's block count is not recorded; see docs/profiles.md."""


@dataclass(frozen=True, slots=True)
class Model:
    """What the operator tables do not say about a model."""

    num_layers: int
    num_params: float
    kv_bytes_per_token: int


MODELS = {
    "meta-llama/Llama-3.1-8B": Model(32, 8.03e9, 131_072),
    "Qwen/Qwen3-32B": Model(64, 32.76e9, 262_144),
}


@dataclass(frozen=True, slots=True, eq=False)
class VllmRun:
    """A recorded run.

    Attributes:
        name: stem of its files.
        model: as vLLM names it.
        gpu: as CUDA names it.
        max_num_seqs: of the engine.
        max_num_batched_tokens: of the engine.
        kv_blocks: that requests can use: vLLM sets one of its blocks aside.
        workload: arrivals and lengths.
        times: what each request experienced.
    """

    name: str
    model: str
    gpu: str
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_blocks: int
    workload: Workload
    times: RequestTimes


@dataclass(frozen=True, slots=True, eq=False)
class RunPrediction:
    """One way of predicting a run.

    Attributes:
        run: its name.
        engine: ``compiled`` or ``reference``.
        iteration_times: ``fitted profile`` or ``measured operators``.
        prefix_cache: whether preempted requests find what is left of their blocks.
        errors: one per metric.
        preemptions: how often a request lost its blocks.
        times: predicted.
    """

    run: str
    engine: str
    iteration_times: str
    prefix_cache: bool
    errors: tuple[MetricError, ...]
    preemptions: int
    times: RequestTimes


def find_runs(folder: Path) -> list[Path]:
    """Request files of the recorded runs in a folder and below it."""
    return sorted(folder.rglob(f"*{REQUESTS_SUFFIX}"))


def read_vllm_run(path: Path) -> VllmRun:
    """Read a run from its request file and the meta file beside it.

    Raises:
        SpecError: a file is missing or lacks what is needed.
        UnknownNameError: nothing is known of the model.
    """
    name = path.name.removesuffix(REQUESTS_SUFFIX)
    meta = _read_meta(path.with_name(f"{name}_vllm_meta.json"))
    columns = read_columns(path)
    stamps = {key: columns[key].astype(np.float64) for key in ("queued_ts", "first_token_ts", "last_token_ts")}
    order = np.argsort(stamps["queued_ts"], kind="stable")
    arrival_s = stamps["queued_ts"][order] - stamps["queued_ts"].min()
    origin_s = stamps["queued_ts"].min()
    output_tokens = columns["output_toks"].astype(np.int64)[order]
    engine = meta["engine_kwargs"]
    return VllmRun(
        name=name,
        model=str(meta["model"]),
        gpu=str(meta["hardware"]["device_name"]),
        max_num_seqs=int(engine["max_num_seqs"]),
        max_num_batched_tokens=int(engine["max_num_batched_tokens"]),
        kv_blocks=_kv_blocks(meta) - 1,
        workload=recorded_workload(arrival_s, columns["input_toks"].astype(np.int64)[order], output_tokens),
        times=request_times(
            arrival_s,
            stamps["first_token_ts"][order] - origin_s,
            stamps["last_token_ts"][order] - origin_s,
            output_tokens.astype(np.float64),
        ),
    )


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: not readable as JSON ({error}); a run needs it beside its requests") from None
    if meta.get("model") not in MODELS:
        raise UnknownNameError("model", str(meta.get("model")), MODELS)
    return meta


def _kv_blocks(meta: dict[str, Any]) -> int:
    """Blocks that the server had; computed from its memory where the run does not record them."""
    cache = meta.get("kv_cache", {})
    if cache.get("num_gpu_blocks"):
        return int(cache["num_gpu_blocks"])
    model = MODELS[meta["model"]]
    share = float(cache.get("gpu_memory_utilization") or 0.9)
    free_bytes = share * meta["hardware"]["device_total_memory_bytes"] - 2 * model.num_params - _RESERVE_BYTES
    return int(free_bytes / model.kv_bytes_per_token / BLOCK_SIZE_TOKENS)


def run_operators(path: Path, run: VllmRun) -> OperatorTimes:
    """The operator tables beside a run."""
    system = GpuSystem(run.gpu, "", run.max_num_batched_tokens, run.max_num_seqs)
    return read_operators(
        path.with_name(run.name),
        system,
        num_layers=MODELS[run.model].num_layers,
        kv_tokens=run.kv_blocks * BLOCK_SIZE_TOKENS,
    )


def fit_operators(operators: OperatorTimes, *, name: str, model: str, seed: int = 0) -> LatencyProfile:
    """Fit a profile to a sample of the iterations that measured operators add up to."""
    rng = np.random.default_rng(seed)
    train, test = split_rows(sample_iterations(operators, rng, NUM_ROWS), rng)
    system = operators.system
    hardware = Hardware(
        name=name,
        model=model,
        gpu=system.gpu,
        gpus_per_replica=1,
        kv_blocks=operators.kv_tokens // BLOCK_SIZE_TOKENS,
        max_num_seqs=system.max_num_seqs,
        max_num_batched_tokens=system.max_num_batched_tokens,
        source="operators measured under vLLM",
    )
    return fit_profile(train, test, hardware)


def predict_run(run: VllmRun, operators: OperatorTimes, profile: LatencyProfile) -> list[RunPrediction]:
    """Predict a run without and with the prefix cache, on the engine that ships and with every operator looked up."""

    def measured(chunks: Any, num_decode: int, context: float) -> float:
        return operators.batch_s(chunks, num_decode, context / max(num_decode, 1))

    looked_up = MeasuredHardware.of(profile, measured)
    predictions = []
    for cached in (False, True):
        compiled = run_compiled(_spec(run, profile, cached), run.workload)
        reference = run_reference(_spec(run, looked_up, cached), run.workload)
        predictions.append(_prediction(run, "compiled", "fitted profile", cached, compiled))
        predictions.append(_prediction(run, "reference", "measured operators", cached, reference))
    return predictions


def _spec(run: VllmRun, hardware: LatencyProfile, prefix_caching: bool) -> FleetSpec:
    return one_replica(
        hardware,
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=run.max_num_batched_tokens,
        kv_blocks=run.kv_blocks,
        prefix_caching=prefix_caching,
    )


def _prediction(run: VllmRun, engine: str, times: str, prefix_cache: bool, records: RecordArray) -> RunPrediction:
    predicted = times_of_records(records)
    preemptions = int(records["num_preemptions"].sum())
    return RunPrediction(run.name, engine, times, prefix_cache, compare(predicted, run.times), preemptions, predicted)
