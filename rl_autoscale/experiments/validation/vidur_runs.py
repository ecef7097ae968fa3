"""Request by request against Vidur, with its own iteration times (which isolates the scheduler) and with ours.

Each replica of a run is replayed alone with the requests that Vidur sent it, so that routing plays no part.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rl_autoscale.experiments.validation.compare import (
    MetricError,
    RequestTimes,
    compare,
    request_times,
    times_of_records,
)
from rl_autoscale.experiments.validation.replay import (
    MakeScheduler,
    MeasuredHardware,
    one_replica,
    recorded_workload,
    run_compiled,
    run_reference,
)
from rl_autoscale.experiments.validation.vidur_schedulers import PrefillFirstScheduler, SarathiScheduler
from rl_autoscale.experiments.validation.vidur_times import VidurTimes, read_vidur_times
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import LatencyProfile, load_profile
from rl_autoscale.fleet.spec import FleetSpec
from rl_autoscale.sim.iteration_table import read_columns
from rl_autoscale.sim.layout import FloatArray, IntArray, RecordArray
from rl_autoscale.workload.trace import Workload

VIDUR_PREDICTIONS = "iteration_times.parquet"
VIDUR_OPERATORS = "vidur/mlp_layer_times.parquet"
VIDUR_RUNS = "vidur_runs"
"""Where the data folder holds what is needed here."""

MAX_NUM_SEQS = 128
TOKEN_BUDGETS = {"sarathi": 512, "vllm": 4096}
OWN_SCHEDULERS: dict[str, MakeScheduler] = {
    "sarathi": SarathiScheduler,
    "vllm": PrefillFirstScheduler,
}
REGIMES = ((0.7, "rho < 0.7"), (0.9, "0.7-0.9"), (1.0, "> 0.9"), (np.inf, "overload"))
"""Upper end of each load regime and its name."""

_NAME = re.compile(
    r"(?P<hardware>.+_tp\d+)_(?P<scheduler>sarathi|vllm)_(?P<traffic>[^_]+)_r(?P<replicas>\d+)"
    r"(?:_(?P<router>rr|lor))?_qps(?P<rate>[\d.]+)(?:_(?P<variant>\w+))?"
)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What stands behind the hardware part of a run's name.

    Attributes:
        model: in the table of Vidur's predictions.
        device: the same.
        tensor_parallel: GPUs per replica.
        kv_blocks: of a replica.
        profile: ours for the same layers on the same GPUs; None where none ships.
        grouped_query: whether key-value heads are shared.
    """

    model: str
    device: str
    tensor_parallel: int
    kv_blocks: int
    profile: str | None
    grouped_query: bool = True


HARDWARE = {
    "llama3-8b_a100_tp1": Hardware("meta-llama/Meta-Llama-3-8B", "a100", 1, 30_208, "llama-3.1-8b_a100_tp1"),
    "llama3-70b_a100_tp4": Hardware("meta-llama/Meta-Llama-3-70B", "a100", 4, 32_768, "llama-3.1-70b_a100_tp4"),
    # Llama-2-70B has the layer shapes of Llama-3.1-70B; only the vocabulary differs, and Vidur leaves the LM head out.
    "llama2-70b_h100_tp4": Hardware("meta-llama/Llama-2-70b-hf", "h100", 4, 32_768, "llama-3.1-70b_h100_tp4"),
    "llama2-7b_a100_tp1": Hardware("meta-llama/Llama-2-7b-hf", "a100", 1, 7_424, None, grouped_query=False),
}


@dataclass(frozen=True, slots=True, eq=False)
class VidurRun:
    """One run of Vidur.

    Attributes:
        name: of its file.
        scheduler: ``sarathi`` or ``vllm``.
        hardware: model and GPUs.
        kv_blocks: of a replica.
        replica: shape (num_requests,), who served each request.
        arrival_s, prompt_tokens, output_tokens: shape (num_requests,).
        times: what each request experienced.
        num_restarts: preemptions.
    """

    name: str
    scheduler: str
    hardware: Hardware
    kv_blocks: int
    replica: IntArray
    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    times: RequestTimes
    num_restarts: int


@dataclass(frozen=True, slots=True)
class RunErrors:
    """How far a replay is from a run.

    Attributes:
        run: its name.
        scheduler: Vidur's.
        load: of the busiest replica: time to serve its requests flat out over the time in which they arrive.
        regime: one of `REGIMES`.
        rules: whose scheduling rules were used, ``vLLM V1`` or ``Vidur``.
        iteration_times: whose iteration times, ``Vidur`` or the name of a profile.
        errors: one per metric.
        restarts: preemptions in the replay.
        measured_restarts: preemptions in the run.
    """

    run: str
    scheduler: str
    load: float
    regime: str
    rules: str
    iteration_times: str
    errors: tuple[MetricError, ...]
    restarts: int
    measured_restarts: int


def read_run(path: Path) -> VidurRun:
    """Read one file of ``vidur_runs``; what it was run with is in its name.

    Raises:
        SpecError: the name or the hardware in it is unknown.
    """
    match = _NAME.fullmatch(path.stem)
    if match is None or match["hardware"] not in HARDWARE:
        raise SpecError(f"{path}: expected <{'|'.join(HARDWARE)}>_<sarathi|vllm>_<traffic>_r<replicas>_qps<rate>.csv")
    columns = {name: values.astype(np.float64) for name, values in read_columns(path).items()}
    hardware = HARDWARE[match["hardware"]]
    blocks = re.fullmatch(r"blocks(\d+)", match["variant"] or "")
    return VidurRun(
        name=path.stem,
        scheduler=match["scheduler"],
        hardware=hardware,
        kv_blocks=int(blocks[1]) if blocks else hardware.kv_blocks,
        replica=columns["replica"].astype(np.int64),
        arrival_s=columns["arrival_s"],
        prompt_tokens=columns["prompt_tokens"].astype(np.int64),
        output_tokens=columns["output_tokens"].astype(np.int64),
        times=request_times(
            columns["arrival_s"], columns["first_token_s"], columns["completed_s"], columns["output_tokens"]
        ),
        num_restarts=int(columns["restarts"].sum()),
    )


def validate_run(run: VidurRun, times: VidurTimes) -> list[RunErrors]:
    """Replay a run in every way that can be compared with it.

    A ``sarathi`` run is chunked prefill, so vLLM V1's rules are tried on it too; a ``vllm`` run (2023, prompts first)
    has no counterpart in V1 and is replayed under Vidur's rules alone.
    """
    base = load_profile(run.hardware.profile or "llama-3.1-8b_a100_tp1")
    spec = _spec(run, MeasuredHardware.of(base, times))
    own = OWN_SCHEDULERS[run.scheduler]
    load = max(_load(run, spec, replica, own) for replica in np.unique(run.replica))
    regime = next(name for limit, name in REGIMES if load < limit)

    def errors(rules: str, iteration_times: str, replay: Callable[[Workload], RecordArray]) -> RunErrors:
        predicted, restarts = _replay(run, replay)
        found = compare(predicted, run.times)
        return RunErrors(
            run.name, run.scheduler, load, regime, rules, iteration_times, found, restarts, run.num_restarts
        )

    results = [errors("Vidur", "Vidur", lambda work: run_reference(spec, work, own))]
    if run.scheduler == "sarathi":
        results.append(errors("vLLM V1", "Vidur", lambda work: run_reference(spec, work)))
        if run.hardware.profile is not None:
            ours = _spec(run, base)
            results.append(errors("vLLM V1", base.name, lambda work: run_compiled(ours, work)))
    return results


def read_times(data: Path, hardware: Hardware) -> VidurTimes:
    """Vidur's iteration times for the hardware of a run, from the data folder."""
    return read_vidur_times(
        data / VIDUR_PREDICTIONS,
        data / VIDUR_OPERATORS,
        model=hardware.model,
        device=hardware.device,
        tensor_parallel=hardware.tensor_parallel,
        grouped_query=hardware.grouped_query,
    )


def _spec(run: VidurRun, hardware: LatencyProfile) -> FleetSpec:
    return one_replica(
        hardware,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=TOKEN_BUDGETS[run.scheduler],
        kv_blocks=run.kv_blocks,
    )


def _workload(run: VidurRun, rows: IntArray, *, at_once: bool = False) -> Workload:
    arrival_s = np.zeros(len(rows)) if at_once else run.arrival_s[rows]
    return recorded_workload(arrival_s, run.prompt_tokens[rows], run.output_tokens[rows])


def _replay(run: VidurRun, replay: Callable[[Workload], RecordArray]) -> tuple[RequestTimes, int]:
    """(times of all requests in the run's order, preemptions) of the run's replicas, one after the other."""
    times = np.empty((3, len(run.replica)))
    restarts = 0
    for replica in np.unique(run.replica):
        rows = np.flatnonzero(run.replica == replica)
        records = replay(_workload(run, rows))
        seen = times_of_records(records)
        times[:, rows] = seen.ttft_s, seen.tpot_s, seen.e2e_s
        restarts += int(records["num_preemptions"].sum())
    return RequestTimes(*times), restarts


def _load(run: VidurRun, spec: FleetSpec, replica: int, own: MakeScheduler) -> float:
    """Time to serve a replica's requests when all are there at once, over the time in which they arrived."""
    rows = np.flatnonzero(run.replica == replica)
    records = run_reference(spec, _workload(run, rows, at_once=True), own)
    return float(records["end_s"].max() / (run.arrival_s[rows[-1]] - run.arrival_s[rows[0]]))
