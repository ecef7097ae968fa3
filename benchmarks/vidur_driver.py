"""Runs in Vidur's own environment: one workload through Vidur's simulation loop, its CPU seconds as JSON on stdout.

    python vidur_driver.py CHECKOUT WORKLOAD.json REPLICAS

CHECKOUT is a folder that holds Vidur's package (microsoft/vidur, MIT). Scheduler sarathi, chunks of 512, metrics off.
Vidur looks iteration times up in dense tables that its random forests filled; here a straight line fills them, since
the loop's speed depends on the look-up and not on the values. Reading, imports and the tables are not counted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

MAX_TOKENS = 4096
MAX_BATCH = 128


class Line(dict):
    """A dense table over one or two sizes."""

    def __init__(self, base: float, *slopes_and_ranges: tuple[float, range]) -> None:
        slopes = [slope for slope, _ in slopes_and_ranges]
        sizes = product(*(values for _, values in slopes_and_ranges))
        super().__init__({size: base + sum(s * x for s, x in zip(slopes, size, strict=True)) for size in sizes})


def tables() -> dict[str, Line]:
    """About the times of an 8B model on an A100, milliseconds per layer."""
    tokens = range(1, MAX_TOKENS + 1)
    names = ("attn_post_proj", "mlp_up_proj", "mlp_down_proj", "mlp_act", "attn_rope", "attn_kv_cache_save",
             "input_layernorm", "post_attention_layernorm", "add")  # fmt: skip
    linear = {name: Line(0.03, (0.0002, tokens)) for name in names}
    context = range(0, 16 * MAX_TOKENS + 1, 64)
    squares = {
        (kv, chunk * chunk): 0.01 + 1e-5 * chunk * (kv + chunk / 2) / 256
        for kv in context[: 4 * MAX_TOKENS // 64]
        for chunk in range(1, 513)
    }
    return linear | {
        "attn_pre_proj": Line(0.06, (0.0003, tokens)),
        "attn_decode": Line(0.01, (0.0005, range(1, MAX_BATCH + 1)), (1e-5, range(0, MAX_TOKENS + 1, 64))),
        "attn_prefill": squares,  # type: ignore[dict-item]
    }


def main() -> None:
    """Read, run, report."""
    checkout, workload, replicas = Path(sys.argv[1]).resolve(), json.loads(Path(sys.argv[2]).read_text()), sys.argv[3]
    sys.path.insert(0, str(checkout))
    os.chdir(tempfile.mkdtemp())
    sys.argv = [
        "vidur", "--replica_config_device", "a100", "--replica_config_model_name", "meta-llama/Meta-Llama-3-8B",
        "--replica_config_network_device", "a100_dgx", "--cluster_config_num_replicas", replicas,
        "--replica_scheduler_config_type", "sarathi", "--sarathi_scheduler_config_chunk_size", "512",
        "--sarathi_scheduler_config_batch_size_cap", str(MAX_BATCH), "--sarathi_scheduler_config_num_blocks", "30208",
        "--no-metrics_config_write_metrics", "--no-metrics_config_store_plots",
        "--no-metrics_config_write_json_trace", "--no-metrics_config_enable_chrome_trace", "--log_level", "error",
    ]  # fmt: skip
    import atexit

    import vidur.simulator as simulator_module
    from vidur.config import SimulationConfig
    from vidur.entities import Request
    from vidur.execution_time_predictor.sklearn_execution_time_predictor import SklearnExecutionTimePredictor

    filled = tables()
    SklearnExecutionTimePredictor._get_input_files = lambda self: ("",) * 5
    SklearnExecutionTimePredictor._train_models = lambda self: {}
    SklearnExecutionTimePredictor._predict_from_models = lambda self: filled

    class Recorded:
        def generate(self) -> list[Any]:
            return [Request(arrival, prompt, output) for arrival, prompt, output in workload]

    simulator_module.RequestGeneratorRegistry.get = lambda *_: Recorded()  # type: ignore[method-assign]
    simulator = simulator_module.Simulator(SimulationConfig.create_from_cli_args())
    atexit.unregister(simulator._write_output)
    started = time.process_time()
    simulator.run()
    print(json.dumps({"cpu_s": time.process_time() - started, "requests": len(workload)}))


if __name__ == "__main__":
    main()
