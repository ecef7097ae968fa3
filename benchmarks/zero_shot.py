"""A network on models, GPUs and traffic that its training had not: fronts against every rule, nothing adapted.

    python benchmarks/zero_shot.py --traces FOLDER --profiles FOLDER [--out runs/zero-shot] [--cases model trace]

`pretrained/single-pool` was trained on Llama-3.1 (8B and 70B) on A100, H100, H200 and L40S, and on the traffic of its
20 scenarios. Each case here changes one thing, the last two; what is not named is as in `azure-conversation`. Knob
values, seeds and rules are those of the suite ``fronts``. An interrupted run goes on where it stopped.

The traces are Azure's and ServeGen's m-large (day 2, request by request; training had seen lengths drawn from a fit to
it, and none of its arrivals). The GPU is an RTX PRO 6000 whose operators LLMServingSim measured under vLLM; its profile
is fitted here. A case whose file is not there is left out, and said so.
"""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from rl_autoscale.cli.benchmark import BenchmarkBar
from rl_autoscale.experiments.benchmark import run_benchmark
from rl_autoscale.experiments.report import write_report
from rl_autoscale.experiments.suites import learned_sweeps, load_suite
from rl_autoscale.experiments.validation.iterations import operator_stems
from rl_autoscale.experiments.validation.vllm_runs import MODELS, fit_operators
from rl_autoscale.fleet.profile import BLOCK_SIZE_TOKENS
from rl_autoscale.sim.fit_operators import read_operators
from rl_autoscale.sim.fit_sources import GpuSystem
from rl_autoscale.sim.profile_file import write_profile
from rl_autoscale.workload.store import TraceStore

BASE = "azure-conversation"
NETWORK = "pretrained/single-pool"
SERVEGEN = {"trace": "resampled_servegen_mlarge_day2_10rps", "slice_s": [32400, 34200], "rate_scale": 12}
"""09:00 to 09:30, where the rate of the day rises."""

GPU, GPU_MODEL = "rtxpro6000_llama3.1-8b_tp1", "meta-llama/Llama-3.1-8B"
GPU_MEMORY_BYTES, RESERVE_BYTES = 96e9, 4.5e9
"""RTX PRO 6000 Blackwell by its data sheet, of which vLLM takes nine tenths; activations, CUDA context and graphs."""

CASES: dict[str, dict[str, Any]] = {
    "model": {"pool": {"profile": "qwen3-30b-a3b_h100_tp1", "name": "h100", "initial_replicas": 14}},
    "model-on-two-gpus": {"pool": {"profile": "qwen3-32b_h100_tp2", "name": "h100", "initial_replicas": 20}},
    "gpu": {"pool": {"profile": GPU, "name": "rtxpro6000", "initial_replicas": 20}},
    "trace": {"stream": SERVEGEN},
    "model-and-trace": {
        "pool": {"profile": "qwen3-30b-a3b_h100_tp1", "name": "h100", "initial_replicas": 10},
        "stream": SERVEGEN,
    },
}


def scenario_of(case: str, out: Path) -> Path:
    """Write a case as a scenario file; returns its path."""
    shipped = resources.files("rl_autoscale") / "experiments" / "scenarios" / f"{BASE}.yaml"
    data = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    change = CASES[case]
    data["name"] = f"unseen-{case}"
    data["description"] = f"As {BASE}, but for {', '.join(change)}: {change}. Nothing was trained on it."
    data["fleet"]["pools"][0] |= change.get("pool", {})
    if data["fleet"]["pools"][0]["profile"] == GPU:
        data["fleet"]["pools"][0]["profile"] = str((out / f"{GPU}.yaml").resolve())
    if "stream" in change:
        data["test"]["streams"] = [change["stream"]]
    path = out / f"{data['name']}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def write_gpu(folder: Path, out: Path) -> bool:
    """Fit the GPU's profile from its measured operators; False where they are not there."""
    stem = next((stem for stem in operator_stems(folder) if stem.name == GPU), None)
    if stem is None:
        return False
    model = MODELS[GPU_MODEL]
    kv_bytes = 0.9 * GPU_MEMORY_BYTES - 2 * model.num_params - RESERVE_BYTES
    blocks = int(kv_bytes / model.kv_bytes_per_token / BLOCK_SIZE_TOKENS)
    limits = GpuSystem("RTX PRO 6000", "", max_num_batched_tokens=2048, max_num_seqs=256)  # as far as was measured
    operators = read_operators(stem, limits, num_layers=model.num_layers, kv_tokens=blocks * BLOCK_SIZE_TOKENS)
    write_profile(fit_operators(operators, name=GPU, model=GPU_MODEL), out / f"{GPU}.yaml", overwrite=True)
    return True


def main() -> None:
    """Write the scenarios, run them, print where the report is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, action="append", default=[], help="folder of traces, looked at first")
    parser.add_argument("--profiles", type=Path, help="folder with LLMServingSim's measured operators")
    parser.add_argument("--out", type=Path, default=Path("runs/zero-shot"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cases, store = list(options.cases), TraceStore(options.traces)
    left_out = [case for case in cases if "stream" in CASES[case]]
    if left_out and store.find(SERVEGEN["trace"]) is None:
        cases = [case for case in cases if case not in left_out]
        print(f"note: no trace {SERVEGEN['trace']} in --traces: left out: {', '.join(left_out)}", file=sys.stderr)
    if "gpu" in cases and not (options.profiles and write_gpu(options.profiles, options.out)):
        cases.remove("gpu")
        print(f"note: no {GPU} below --profiles {options.profiles}: the case 'gpu' is left out", file=sys.stderr)
    if not cases:
        raise SystemExit("error: no case is left; name folders that hold the files")
    paths = [str(scenario_of(case, options.out)) for case in cases]
    config = load_suite("fronts", learned_sweeps([NETWORK]), paths)
    with BenchmarkBar() as bar:
        run_benchmark(config, options.out, num_processes=options.jobs, trace_folders=options.traces, progress=bar)
    print(f"wrote {write_report(options.out, trace_folders=options.traces).html}")


if __name__ == "__main__":
    main()
