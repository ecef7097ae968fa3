"""Everything that can be compared with the data in a folder, one comparison after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from rl_autoscale.experiments.validation import iterations, queues, vidur_runs, vllm_runs
from rl_autoscale.experiments.validation.report import Findings
from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS, load_profile, shipped_profile_names
from rl_autoscale.sim.fit_operators import read_operators
from rl_autoscale.sim.fit_sources import GpuSystem

PARTS = ("iterations", "vidur", "vllm", "queues")
Progress = Callable[[str, int, int], None]
"""Told what is being done, how many comparisons are done, and how many there are."""

_OPERATOR_MODEL, _OPERATOR_KV_TOKENS = "meta-llama/Llama-3.1-8B", 2_587 * BLOCK_SIZE_TOKENS
_OPERATOR_LIMITS = (2048, 256)
"""What the operator tables say nothing about: token budget and batch limit are vLLM's defaults below 70 GiB; the KV
cache is that of the smallest GPU among them, so that all are judged on the same iterations."""

Task = tuple[str, Callable[[], None]]


def validate(data: Path, *, parts: Iterable[str] = PARTS, progress: Progress = lambda *_: None) -> Findings:
    """Compare the simulator with everything a folder holds.

    Args:
        data: folder of measured iteration times and recorded runs; see docs/fidelity.md.
        parts: which of `PARTS`.
        progress: told before each comparison.

    Raises:
        SpecError: the folder does not exist, a part is unknown or a file cannot be used.
    """
    chosen = _checked(data, parts)
    found: dict[str, list[Any]] = {name: [] for name in (*PARTS, "vllm_measured")}
    makers = {"iterations": _iteration_tasks, "vidur": _vidur_tasks, "vllm": _vllm_tasks, "queues": _queue_tasks}
    tasks = [task for name in chosen for task in makers[name](data, found)]
    for done, (what, task) in enumerate(tasks):
        progress(what, done, len(tasks))
        task()
    progress("done", len(tasks), len(tasks))
    return Findings(**{name: tuple(items) for name, items in found.items()})


def _checked(data: Path, parts: Iterable[str]) -> list[str]:
    chosen = list(parts)
    if unknown := [name for name in chosen if name not in PARTS]:
        raise SpecError(f"unknown part '{unknown[0]}'; known: {', '.join(PARTS)}")
    if chosen != ["queues"] and not data.is_dir():
        raise SpecError(f"{data}: no such folder; --data names a folder of measured times, see docs/fidelity.md")
    return chosen


def _iteration_tasks(data: Path, found: dict[str, list[Any]]) -> list[Task]:
    results = found["iterations"]

    def shipped(name: str) -> None:
        profile = load_profile(name)
        results.extend(iterations.against_new_sample(profile))
        for file, compare in (
            (iterations.AIC_GRID, iterations.against_aic_grid),
            (vidur_runs.VIDUR_PREDICTIONS, iterations.against_vidur),
            (iterations.ENGINE_2023, iterations.against_engine_2023),
        ):
            if (data / file).is_file():
                results.extend(compare(profile, data))

    def fitted(stem: Path) -> None:
        system = GpuSystem(stem.name.split("_")[0], "", *_OPERATOR_LIMITS)
        layers = vllm_runs.MODELS[_OPERATOR_MODEL].num_layers
        operators = read_operators(stem, system, num_layers=layers, kv_tokens=_OPERATOR_KV_TOKENS)
        results.extend(iterations.against_operators(operators, name=stem.name, model=_OPERATOR_MODEL))

    return [
        *((f"profile {name}", partial(shipped, name)) for name in shipped_profile_names()),
        *((f"operators {stem.name}", partial(fitted, stem)) for stem in iterations.operator_stems(data)),
    ]


def _vidur_tasks(data: Path, found: dict[str, list[Any]]) -> list[Task]:
    times: dict[vidur_runs.Hardware, Any] = {}

    def replay(path: Path) -> None:
        run = vidur_runs.read_run(path)
        if run.hardware not in times:
            times[run.hardware] = vidur_runs.read_times(data, run.hardware)
        found["vidur"].extend(vidur_runs.validate_run(run, times[run.hardware]))

    paths = sorted((data / vidur_runs.VIDUR_RUNS).glob("*.csv"))
    return [(f"Vidur {path.stem}", partial(replay, path)) for path in paths]


def _vllm_tasks(data: Path, found: dict[str, list[Any]]) -> list[Task]:
    def predict(path: Path) -> None:
        run = vllm_runs.read_vllm_run(path)
        operators = vllm_runs.run_operators(path, run)
        profile = vllm_runs.fit_operators(operators, name=run.name, model=run.model)
        found["vllm"].extend(vllm_runs.predict_run(run, operators, profile))
        found["vllm_measured"].append((run.name, run.times))

    return [(f"vLLM {path.stem}", partial(predict, path)) for path in vllm_runs.find_runs(data)]


def _queue_tasks(_: Path, found: dict[str, list[Any]]) -> list[Task]:
    def measure(queue: queues.Queue) -> None:
        found["queues"].append(queues.measure(queue))

    return [(f"queue {queue.name}", partial(measure, queue)) for queue in queues.QUEUES]
